"""Every operation's forward and gradients against autograd of the reference; sharded, chunked and in bf16."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from autotune.runners import reference_parts as parts
from autotune.runners.ops import OPERATIONS, cross_entropy, linear
from autotune.spec.graph import Node, Weight, blocks
from autotune.spec.model import ModelSpec
from autotune.spec.opset import OPS
from tests.operands import (
    MIXED,
    MODELS,
    TINY,
    close,
    columns,
    gradients,
    make_env,
    make_reads,
    oracle,
    random,
    random_weights,
    upstream,
)
from tests.test_heads import BLOCKWISE, MEDUSA

NODES = [
    (name, node) for name, m in MODELS.items() for b in (blocks(m)[0], blocks(m)[1], blocks(m)[-1]) for node in b.nodes
]
# What lies between dispatch and combine is not in the reference, which computes densely: see tests/test_experts.py.
ROUTES = [(name, node) for name, m in MIXED.items() for node in blocks(m)[1].nodes if node.op == "route"]
KNOWN = {**MODELS, **MIXED}


CASES = [
    pytest.param(name, node, backend, id=f"{name}-{node.name}-{backend}")
    for name, node in (*NODES, *ROUTES)
    for backend in (("sdpa", "math") if node.op == "attention" else ("sdpa",))
]


@pytest.mark.parametrize(("variant", "node", "backend"), CASES)
def test_an_operation_equals_the_reference_and_needs_only_what_opset_lists(
    variant: str, node: Node, backend: str
) -> None:
    model = KNOWN[variant]
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
        floating = [(n, w) for n, w in zip(node.writes, writes, strict=True) if w.is_floating_point()]
        grads = tuple(upstream(n, w) for n, w in floating if n != "loss")
        made = gradients(env, node, reads, results, grads)
        if OPERATIONS[node.op].dgrad:
            assert len(made) == OPS[node.op].inputs
        for found, wanted in zip(made, of_reads, strict=False):
            assert wanted is not None
            close(found, wanted)
        for name, wanted in of_weights.items():  # accumulated, not overwritten
            close(totals[name] - start[name], wanted)


def test_the_table_matches_the_declarations() -> None:
    every = [node for model in KNOWN.values() for block in blocks(model) for node in block.nodes]
    every += [node for block in blocks(MEDUSA) for node in block.nodes]  # see test_heads.py
    elsewhere = {"attention_more", "linear_int8"}  # a part of attention: test_context.py; of generations: test_int8.py
    assert set(OPERATIONS) == {node.op for node in every} | elsewhere
    for name, operation in OPERATIONS.items():
        if operation.dgrad is None and name in elsewhere:
            continue
        rule = OPS[name]
        weighted = any(n.weights for n in every if n.op == name)
        assert (operation.dgrad is not None) == (rule.inputs > 0 and not rule.through), name
        assert (operation.wgrad is not None) == weighted, name


HEADS = [node for node in blocks(MEDUSA)[1].nodes if node.op in ("activate", "ahead_entropy")]
RELU = [node for node in blocks(BLOCKWISE)[1].nodes if node.op == "activate"]


@pytest.mark.parametrize("node", HEADS[-4:] + RELU[:1], ids=lambda node: node.name)
def test_what_heads_are_made_of_equals_autograd(node: Node) -> None:
    """Values and gradients of an activation and of the loss of tokens ahead, of two sequences of 6 tokens."""
    loss = node.op == "ahead_entropy"
    x = random(12, 32 if loss else node.attr("width"), seed=3)
    targets = torch.arange(12) * 5 % 32
    more = (targets, *((random(1, seed=5)[0],) if len(node.reads) > 2 else ())) if loss else ()
    env = replace(make_env(TINY, {}), batch=2, sequence=6, loss_scale=1.0 / 12)
    leaf = x.clone().requires_grad_()
    shaped = [leaf.view(2, 6, -1), *(t.view(2, 6) if t.ndim else t for t in more)]
    (wanted,) = parts.OPERATIONS[node.op](node, shaped, parts.Own((), (), ()))
    with torch.inference_mode():
        found, *stats = OPERATIONS[node.op].forward(env, node, x, *more)
        close(found, wanted.detach().view_as(found))
        coming = () if loss else (upstream("y", found),)
        saved = (x.clone(), targets, *stats) if loss else (x,)
        assert OPERATIONS[node.op].dgrad
        (made,) = OPERATIONS[node.op].dgrad(env, node, coming, saved)
    given = None if loss else coming[0].clone().view_as(wanted)
    (gradient,) = torch.autograd.grad(wanted, leaf, given)
    close(made, gradient)


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
