"""Every operation's forward and gradients against autograd of the reference; sharded, chunked, cached and in bf16."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from autotune.runners import reference, rope
from autotune.runners.ops import OPERATIONS, Env, KVCache, attention, cross_entropy, linear
from autotune.spec.errors import UsageError
from autotune.spec.graph import Block, Node, Weight, blocks
from autotune.spec.model import ModelSpec
from autotune.spec.opset import OPS

BATCH, SEQUENCE = 2, 7
TINY = ModelSpec("tiny", "LlamaForCausalLM", 20, 2, 4, 2, 6, 14, 22, norm_eps=1e-5, max_positions=64)
MODELS = {
    "llama": TINY,
    "one key head": replace(TINY, kv_heads=1),
    "all key heads": replace(TINY, kv_heads=4),
    "biases": replace(TINY, qkv_bias=True, out_bias=True),
    "qk norm": replace(TINY, qk_norm=True, qkv_bias=True),
    "window": replace(TINY, window=3),
}


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def random_weights(node: Node, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    return {w.name: random(*w.shape, seed=i + 1, dtype=dtype) for i, w in enumerate(node.weights)}


def make_env(model: ModelSpec, weights: dict[str, Tensor], **changes: object) -> Env:
    sequence = int(str(changes.get("sequence", SEQUENCE)))
    env = Env(
        model=model,
        batch=BATCH,
        sequence=sequence,
        positions=torch.arange(sequence),
        rope=rope.tables(model, 64),
        weights=weights,
        loss_scale=1 / (BATCH * sequence),
    )
    return replace(env, **changes)  # type: ignore[arg-type]


def columns(model: ModelSpec, name: str) -> int:
    """Features of each value of a block."""
    q, kv = model.heads * model.head_dim, model.kv_heads * model.head_dim
    special = {"qkv": q + 2 * kv, "q": q, "o": q, "k": kv, "v": kv, "gu": 2 * model.ffn, "s": model.ffn}
    return {**special, "logits": model.vocab}.get(name, model.hidden)


def make_reads(model: ModelSpec, node: Node) -> list[Tensor]:
    """Random operands [tokens, features] of one node."""
    tokens = BATCH * SEQUENCE
    generator = torch.Generator().manual_seed(7)
    return [
        torch.randint(0, model.vocab, (tokens,), generator=generator)
        if name in ("tokens", "targets")
        else random(tokens, columns(model, name), seed=11 + i)
        for i, name in enumerate(node.reads)
    ]


def oracle(
    model: ModelSpec,
    node: Node,
    weights: dict[str, Tensor],
    reads: list[Tensor],
    upstream: Callable[[str, Tensor], Tensor],
) -> tuple[list[Tensor], list[Tensor | None], dict[str, Tensor]]:
    """Writes, gradients of the reads (None: not floating) and of the weights, by autograd through the reference."""
    leaves = [r.clone().requires_grad_() if r.is_floating_point() else r for r in reads]
    own = {name: w.clone().requires_grad_() for name, w in weights.items()}
    values = {n: t.view(BATCH, SEQUENCE, *t.shape[1:]) for n, t in zip(node.reads, leaves, strict=True)}
    block = Block("layer", 1, (node,))
    reference._run(block, values, {(1, n): w for n, w in own.items()}, rope.tables(model, SEQUENCE))
    writes = [values[name] for name in node.writes]
    writes = [w.reshape(BATCH * SEQUENCE, -1) if w.dim() else w for w in writes]
    total = sum((w * upstream(n, w)).sum() for n, w in zip(node.writes, writes, strict=True))
    assert isinstance(total, Tensor)
    wanted = [leaf for leaf in (*leaves, *own.values()) if leaf.requires_grad]
    found = dict(zip(map(id, wanted), torch.autograd.grad(total, wanted), strict=True))
    return (
        [w.detach() for w in writes],
        [found.get(id(leaf)) for leaf in leaves],
        {name: found[id(w)] for name, w in own.items()},
    )


def upstream(name: str, value: Tensor) -> Tensor:
    """The gradient that reaches a write: random, but 1 for the loss, which has none coming in."""
    return torch.ones_like(value) if name == "loss" else random(*value.shape, seed=len(name) + 29)


def pick(
    rule_part: tuple[tuple[str, int], ...], reads: list[Tensor], results: tuple[Tensor, ...], node: Node
) -> tuple[Tensor, ...]:
    """The saved tensors that opset lists, in its order."""
    count = len(node.writes)
    groups = {"read": reads, "write": list(results[:count]), "stat": list(results[count:])}
    return tuple(groups[where][i].clone() for where, i in rule_part)


def gradients(
    env: Env, node: Node, reads: list[Tensor], results: tuple[Tensor, ...], grads: tuple[Tensor, ...]
) -> tuple[Tensor, ...]:
    """Weight gradients into env.grads, then the input gradients; each is given only what opset says it needs."""
    rule, operation = OPS[node.op], OPERATIONS[node.op]
    needed, kept = pick(rule.wgrad, reads, results, node), pick(rule.dgrad, reads, results, node)
    for tensor in (*reads, *results):  # what opset does not list may be gone by now
        tensor.fill_(float("nan") if tensor.is_floating_point() else 0)
    if operation.wgrad:
        operation.wgrad(env, node, grads, needed)
    return operation.dgrad(env, node, grads, kept) if operation.dgrad else ()


def close(found: Tensor, wanted: Tensor, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(found.to(wanted.dtype).view(wanted.shape), wanted, rtol=tolerance, atol=tolerance)


NODES = [
    (name, node) for name, m in MODELS.items() for b in (blocks(m)[0], blocks(m)[1], blocks(m)[-1]) for node in b.nodes
]


CASES = [
    pytest.param(name, node, backend, id=f"{name}-{node.name}-{backend}")
    for name, node in NODES
    for backend in (("sdpa", "math") if node.op == "attention" else ("sdpa",))
]


@pytest.mark.parametrize(("variant", "node", "backend"), CASES)
def test_an_operation_equals_the_reference_and_needs_only_what_opset_lists(
    variant: str, node: Node, backend: str
) -> None:
    model = MODELS[variant]
    weights, reads = random_weights(node), make_reads(model, node)
    writes, of_reads, of_weights = oracle(model, node, weights, reads, upstream)
    with torch.inference_mode():
        start = {name: random(*w.shape, seed=91) for name, w in weights.items()}
        totals = {name: w.clone() for name, w in start.items()}
        env = make_env(model, weights, grads=totals, attention=backend)
        results = OPERATIONS[node.op].forward(env, node, *reads)
        assert len(results) == len(node.writes) + len(OPS[node.op].stats)
        for found, wanted in zip(results, writes, strict=False):
            close(found, wanted)
        grads = tuple(upstream(n, w) for n, w in zip(node.writes, writes, strict=True) if n != "loss")
        made = gradients(env, node, reads, results, grads)
        if OPERATIONS[node.op].dgrad:
            assert len(made) == OPS[node.op].inputs
        for found, wanted in zip(made, of_reads, strict=False):
            assert wanted is not None
            close(found, wanted)
        for name, wanted in of_weights.items():  # accumulated, not overwritten
            close(totals[name] - start[name], wanted)


def test_the_table_matches_the_declarations() -> None:
    dense = {node.op for model in MODELS.values() for block in blocks(model) for node in block.nodes}
    assert set(OPERATIONS) == dense
    for name, operation in OPERATIONS.items():
        rule = OPS[name]
        weighted = any(n.weights for _, n in NODES if n.op == name)
        assert (operation.dgrad is not None) == (rule.inputs > 0 and not rule.through), name
        assert (operation.wgrad is not None) == weighted, name


# Tensor parallelism: two threads stand for two tensor ranks.


class Group:
    """An all-reduce between threads: a barrier on each side of the sum."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.barrier = threading.Barrier(size, timeout=20)
        self.slots: list[Tensor | None] = [None] * size

    def all_reduce(self, rank: int) -> Callable[[Tensor, str], Tensor]:
        def reduce(tensor: Tensor, how: str) -> Tensor:
            self.slots[rank] = tensor.clone()
            self.barrier.wait()
            stacked = torch.stack([s for s in self.slots if s is not None])
            tensor.copy_(stacked.sum(0) if how == "sum" else stacked.amax(0))
            self.barrier.wait()
            return tensor

        return reduce

    def run(self, function: Callable[[int], None]) -> None:
        errors: list[BaseException] = []

        def guarded(rank: int) -> None:
            try:
                function(rank)
            except BaseException as error:
                errors.append(error)
                self.barrier.abort()

        threads = [threading.Thread(target=guarded, args=(rank,)) for rank in range(self.size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if errors:
            raise errors[0]


def parts_of(model: ModelSpec, name: str) -> list[int]:
    """Widths that are sharded each by itself within one fused value."""
    q, kv = model.heads * model.head_dim, model.kv_heads * model.head_dim
    return {"qkv": [q, kv, kv], "gu": [model.ffn, model.ffn]}.get(name, [columns(model, name)])


def shard(x: Tensor, parts: list[int], rank: int, size: int, dim: int) -> Tensor:
    return torch.cat([p.chunk(size, dim)[rank] for p in x.split(parts, dim)], dim)


def shard_weight(weight: Weight, full: Tensor, rank: int, size: int) -> Tensor:
    if weight.shard is None:
        return full.clone()
    parts = [rows for _, rows in weight.parts] if weight.shard == 0 else [full.shape[1]]
    return shard(full, parts, rank, size, weight.shard)


SHARDED = [(name, node) for name, node in NODES if node.split and name in ("biases", "qk norm")]


@pytest.mark.parametrize(("variant", "node"), SHARDED, ids=[f"{name}-{node.name}" for name, node in SHARDED])
def test_two_tensor_ranks_make_the_whole(variant: str, node: Node) -> None:
    model, size = MODELS[variant], 2
    weights, reads = random_weights(node), make_reads(model, node)
    writes, of_reads, of_weights = oracle(model, node, weights, reads, upstream)
    inner = node.split in ("row", "heads")  # the operands are sharded, not only the results
    outer = node.split in ("column", "heads")
    grads = [upstream(n, w) for n, w in zip(node.writes, writes, strict=True)]
    group, found = Group(size), {}

    def work(rank: int) -> None:
        mine = [
            shard(t, parts_of(model, n), rank, size, 1) if inner and t.is_floating_point() else t.clone()
            for n, t in zip(node.reads, reads, strict=True)
        ]
        local = {w.name: shard_weight(w, weights[w.name], rank, size) for w in node.weights}
        totals = {n: torch.zeros_like(w) for n, w in local.items()}
        env = make_env(
            model, local, grads=totals, tensor_rank=rank, tensor_size=size, all_reduce=group.all_reduce(rank)
        )
        results = OPERATIONS[node.op].forward(env, node, *mine)
        copies = tuple(r.clone() for r in results)
        given = tuple(
            shard(g, parts_of(model, n), rank, size, 1) if outer else g
            for n, g in zip(node.writes, grads, strict=True)
            if n != "loss"
        )
        found[rank] = (copies, gradients(env, node, mine, results, given), totals)

    group.run(work)
    for i, (name, wanted) in enumerate(zip(node.writes, writes, strict=True)):
        pieces = [found[rank][0][i] for rank in range(size)]
        if name == "loss":
            close(pieces[0], wanted)
            close(pieces[1], wanted)
        elif outer:
            for rank, piece in enumerate(pieces):
                close(piece, shard(wanted, parts_of(model, name), rank, size, 1))
        else:
            close(pieces[0] + pieces[1], wanted)
    for i in range(OPS[node.op].inputs):
        pieces, wanted = [found[rank][1][i] for rank in range(size)], of_reads[i]
        assert wanted is not None
        if inner:
            for rank, piece in enumerate(pieces):
                close(piece, shard(wanted, parts_of(model, node.reads[i]), rank, size, 1))
        else:
            close(pieces[0] + pieces[1], wanted)
    for weight in node.weights:
        pieces, wanted = [found[rank][2][weight.name] for rank in range(size)], of_weights[weight.name]
        if weight.shard is not None:
            for rank, piece in enumerate(pieces):
                close(piece, shard_weight(weight, wanted, rank, size))
        elif node.op == "rotary_norm":  # each rank saw its own heads
            close(pieces[0] + pieces[1], wanted)
        else:
            close(pieces[0], wanted)
            close(pieces[1], wanted)


def test_a_sharded_operation_without_a_group_is_refused() -> None:
    node = blocks(TINY)[-1].nodes[-1]
    env = make_env(TINY, {}, tensor_size=2)
    logits, targets = make_reads(TINY, node)
    with pytest.raises(ValueError, match="all_reduce"):
        OPERATIONS["cross_entropy"].forward(env, node, logits[:, :11], targets)


# Memory: chunks, in place, accumulators.


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_cross_entropy_in_chunks_and_in_place(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    node = blocks(TINY)[-1].nodes[-1]
    logits, targets = make_reads(TINY, node)
    logits = logits.mul_(30).to(dtype)  # a row's exponentials would overflow without its maximum
    wide = logits.double().clone().requires_grad_()
    wanted = torch.nn.functional.cross_entropy(wide, targets)
    (of_logits,) = torch.autograd.grad(wanted, wide)
    monkeypatch.setattr(cross_entropy, "CHUNK_BYTES", 3 * TINY.vocab * 8)
    assert sum(1 for _ in cross_entropy._chunks(logits)) > 1
    env = make_env(TINY, {})
    loss, lse = OPERATIONS["cross_entropy"].forward(env, node, logits, targets)
    exact = dtype == torch.float64
    close(loss, wanted.detach().to(loss.dtype), 1e-12 if exact else 1e-5)
    (made,) = OPERATIONS["cross_entropy"].dgrad(env, node, (), (logits, targets, lse))  # type: ignore[misc]
    assert made.data_ptr() == logits.data_ptr()
    close(made, of_logits.to(dtype), 1e-12 if exact else 1e-2)


def test_a_gradient_of_the_loss_scales_that_of_the_logits() -> None:
    node = blocks(TINY)[-1].nodes[-1]
    logits, targets = make_reads(TINY, node)
    env = make_env(TINY, {})
    dgrad = OPERATIONS["cross_entropy"].dgrad
    assert dgrad is not None
    _, lse = OPERATIONS["cross_entropy"].forward(env, node, logits, targets)
    (once,) = dgrad(env, node, (), (logits.clone(), targets, lse))
    (thrice,) = dgrad(env, node, (torch.tensor(3.0, dtype=torch.float64),), (logits.clone(), targets, lse))
    close(thrice, once * 3, 1e-12)


def test_bf16_weight_gradients_add_up_in_fp32_chunk_by_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    model = MODELS["biases"]
    node = next(n for n in blocks(model)[1].nodes if n.name == "qkv")
    weights = random_weights(node, torch.bfloat16)
    g, x = random(14, 48, seed=3, dtype=torch.bfloat16), random(14, 20, seed=4, dtype=torch.bfloat16)
    totals = {n: torch.full(w.shape, 1.0) for n, w in weights.items()}
    monkeypatch.setattr(linear, "WGRAD_CHUNK_BYTES", 5 * 20 * 2)
    linear.wgrad(make_env(model, weights, grads=totals), node, (g,), (x,))
    close(totals["qkv.weight"].double(), g.double().t() @ x.double() + 1, 2e-2)
    close(totals["qkv.bias"].double(), g.double().sum(0) + 1, 1e-5)


@pytest.mark.parametrize(("variant", "node"), NODES, ids=[f"{name}-{node.name}" for name, node in NODES])
def test_bf16_stays_near_the_reference_and_keeps_its_types(variant: str, node: Node) -> None:
    model = MODELS[variant]
    weights = random_weights(node, torch.bfloat16)
    reads = [r.bfloat16() if r.is_floating_point() else r for r in make_reads(model, node)]
    exact = [r.double() if r.is_floating_point() else r for r in reads]
    wide = {n: w.double() for n, w in weights.items()}
    writes, of_reads, of_weights = oracle(model, node, wide, exact, lambda n, w: upstream(n, w).bfloat16().double())
    totals = {n: torch.zeros(w.shape) for n, w in weights.items()}
    env = make_env(model, weights, grads=totals)
    results = OPERATIONS[node.op].forward(env, node, *reads)
    types = [torch.float32 if n == "loss" else torch.bfloat16 for n in node.writes]
    assert [r.dtype for r in results] == types + [torch.float32] * len(OPS[node.op].stats)
    for found, wanted in zip(results, writes, strict=False):
        assert (found.double().view(wanted.shape) - wanted).norm() <= 1e-2 * wanted.norm()
    grads = tuple(upstream(n, w).bfloat16() for n, w in zip(node.writes, writes, strict=True) if n != "loss")
    made = gradients(env, node, reads, results, grads)
    for found, wanted_or_none in zip(made, of_reads, strict=False):
        assert found.dtype == torch.bfloat16 and wanted_or_none is not None
        assert (found.double() - wanted_or_none).norm() <= 2e-2 * wanted_or_none.norm()
    for name, wanted in of_weights.items():
        assert (totals[name].double() - wanted).norm() <= 1e-2 * wanted.norm()


# Attention backends.


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [0, 5])
@pytest.mark.parametrize("kv_heads", [1, 2, 6])
def test_attention_backends_agree_on_the_cpu(dtype: torch.dtype, window: int, kv_heads: int) -> None:
    sequence, width, device = 37, 16, torch.device("cpu")
    shapes = [(2, sequence, heads, width) for heads in (6, kv_heads, kv_heads, 6)]
    q, k, v, g = (random(*s, seed=i, dtype=dtype).transpose(1, 2) for i, s in enumerate(shapes))
    plain = attention.BACKENDS["math"]
    wide = [x.double() for x in (q, k, v, g)]
    o, lse = plain.forward(*wide[:3], window)
    wanted = (o, lse, *plain.backward(wide[3], *wide[:3], o, lse, window))
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 4e-2}[dtype]
    ran = 0
    for backend in attention.BACKENDS.values():
        if backend.supported(device, dtype, width, sequence, window) is not None:
            continue
        o, lse = backend.forward(q, k, v, window)
        assert lse.shape == q.shape[:3] and lse.dtype == (dtype if dtype == torch.float64 else torch.float32)
        for found, want in zip((o, lse, *backend.backward(g, q, k, v, o, lse, window)), wanted, strict=True):
            close(found, want.to(found.dtype), tolerance)
        ran += 1
    assert ran == 2  # math, and sdpa as the CPU kernel


@pytest.mark.parametrize("name", ["flash", "cudnn", "efficient"])
def test_the_cuda_backends_fit_the_signatures_of_this_torch(name: str) -> None:
    """On meta tensors: no values, but torch's own declarations of arguments, results and shapes."""
    shapes = [(2, 37, heads, 16) for heads in (6, 2, 2, 6)]
    q, k, v, g = (torch.empty(s, dtype=torch.bfloat16, device="meta").transpose(1, 2) for s in shapes)
    for window in (0, 5) if name == "flash" else (0,):
        o, lse = attention.BACKENDS[name].forward(q, k, v, window)
        assert o.shape == q.shape and lse.shape == q.shape[:3] and lse.dtype == torch.float32
        made = attention.BACKENDS[name].backward(g, q, k, v, o, lse, window)
        assert [m.shape for m in made] == [q.shape, k.shape, v.shape]


def test_a_backend_says_why_it_cannot_run() -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    for name in ("flash", "cudnn", "efficient"):
        assert "CUDA" in str(attention.unsupported(name, cpu, torch.bfloat16, 64))
    assert "float64" in str(attention.unsupported("flash", cuda, torch.float64, 64))
    assert attention.unsupported("cudnn", cuda, torch.bfloat16, 64, sequence=1) is not None
    assert attention.unsupported("math", cpu, torch.float64, 7) is None
    with pytest.raises(UsageError) as error:
        attention.unsupported("flsh", cpu, torch.float32, 64)
    assert error.value.hint == "did you mean flash?"


# Generation.


def run_model(
    model: ModelSpec, weights: reference.Weights, tokens: Tensor, cache: KVCache, start: int, backend: str
) -> Tensor:
    """Logits [batch, new, vocab] of the tokens at `start`, through OPERATIONS and the cache."""
    batch, new = tokens.shape
    value = tokens.reshape(-1)
    for block in blocks(model):
        env = make_env(
            model,
            {w.name: weights[block.index, w.name] for w in block.weights()},
            batch=batch,
            sequence=new,
            positions=torch.arange(start, start + new),
            cache=cache,
            layer=block.index - 1,
            start=start,
            attention=backend,
        )
        values = {block.nodes[0].reads[0]: value}
        for node in block.nodes:
            if node.op != "cross_entropy":
                results = OPERATIONS[node.op].forward(env, node, *(values[r] for r in node.reads))
                assert len(results) == len(node.writes) + len(OPS[node.op].stats)
                values.update(zip(node.writes, results, strict=False))
        value = values["logits" if block.kind == "head" else block.nodes[-1].writes[0]]
    return value.view(batch, new, -1)


@pytest.mark.parametrize("variant", ["llama", "one key head", "qk norm", "window"])
@pytest.mark.parametrize("backend", ["sdpa", "math"])
def test_cached_decoding_equals_the_full_forward(variant: str, backend: str) -> None:
    model = MODELS[variant]
    weights = {
        k: w + random(*w.shape, seed=5) * 0.2 for k, w in reference.init_weights(model, 3, torch.float64).items()
    }
    tokens = torch.randint(0, model.vocab, (2, 12), generator=torch.Generator().manual_seed(1))
    wanted = reference.reference_logits(model, weights, tokens)
    cache = KVCache.empty(model, model.layers, 2, 12, dtype=torch.float64)
    cache.k.fill_(float("nan"))
    cache.v.fill_(float("nan"))
    start = 0
    for new in (4, 1, 3, 1, 1, 2):  # prefill, single tokens, and several at once as speculation verifies them
        found = run_model(model, weights, tokens[:, start : start + new], cache, start, backend)
        close(found, wanted[:, start : start + new])
        start += new


def test_a_cache_refuses_what_does_not_fit() -> None:
    cache = KVCache.empty(TINY, 2, 1, 4)
    assert cache.nbytes == 2 * 2 * TINY.kv_heads * 4 * TINY.head_dim * 4
    x = torch.zeros(1, TINY.kv_heads, 3, TINY.head_dim)
    cache.append(0, x, x, 1)
    with pytest.raises(ValueError, match=r"2\.\.4 .* 4 tokens"):
        cache.append(0, x, x, 2)
