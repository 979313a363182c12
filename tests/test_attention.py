"""Attention: backends agree, say why they cannot run, and decode from a cache as the whole forward does."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from autotune.runners import reference
from autotune.runners.ops import OPERATIONS, KVCache, attention
from autotune.runners.ops.attention_cache import Lengths
from autotune.spec.errors import UsageError
from autotune.spec.graph import blocks
from autotune.spec.model import ModelSpec
from autotune.spec.opset import OPS
from tests.operands import (
    MODELS,
    TINY,
    close,
    make_env,
    random,
)

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
    model: ModelSpec,
    weights: reference.Weights,
    tokens: Tensor,
    cache: KVCache,
    start: int,
    backend: str,
    told: bool = True,
    starts: tuple[int, ...] = (),
) -> Tensor:
    """Logits [batch, new, vocab] of the tokens at `start`, through OPERATIONS and the cache; whether the host is `told`
    where it starts, or only the device. `starts`: of each sequence, where they differ."""
    batch, new = tokens.shape
    lengths, positions = None, torch.arange(start, start + new)
    if starts or not told:
        lengths = Lengths.empty(batch, new, cache.max_len, tokens.device)
        lengths.move(torch.tensor(starts or [start] * batch))
    if starts:
        positions = (torch.tensor(starts)[:, None] + torch.arange(new)).flatten()
    value = tokens.reshape(-1)
    for block in blocks(model):
        env = make_env(
            model,
            {w.name: weights[block.index, w.name] for w in block.weights()},
            batch=batch,
            sequence=new,
            positions=positions,
            cache=cache,
            layer=block.index - 1,
            start=start if told else 0,
            lengths=lengths,
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


GENERATED = ["llama", "one key head", "qk norm", "window"]


def whole_sequences(variant: str, batch: int) -> tuple[ModelSpec, reference.Weights, Tensor, Tensor]:
    """A model, weights for it, twelve tokens a sequence and the reference's logits [batch, 12, vocab]."""
    model = MODELS[variant]
    weights = {
        k: w + random(*w.shape, seed=5) * 0.2 for k, w in reference.init_weights(model, 3, torch.float64).items()
    }
    tokens = torch.randint(0, model.vocab, (batch, 12), generator=torch.Generator().manual_seed(1))
    return model, weights, tokens, reference.reference_logits(model, weights, tokens)


@pytest.mark.parametrize("variant", GENERATED)
@pytest.mark.parametrize("backend", ["sdpa", "math"])
@pytest.mark.parametrize("told", [True, False], ids=["length on the host", "length on the device"])
def test_cached_decoding_equals_the_full_forward(variant: str, backend: str, told: bool) -> None:
    model, weights, tokens, wanted = whole_sequences(variant, 2)
    cache = KVCache.empty(model, model.layers, 2, 12, dtype=torch.float64)
    if told:  # nothing unfilled is read
        cache.k.fill_(float("nan"))
        cache.v.fill_(float("nan"))
    start = 0
    for new in (4, 1, 3, 1, 1, 2):  # prefill, single tokens, and several at once as speculation verifies them
        found = run_model(model, weights, tokens[:, start : start + new], cache, start, backend, told or start == 0)
        close(found, wanted[:, start : start + new])
        start += new


@pytest.mark.parametrize("variant", GENERATED)
@pytest.mark.parametrize("told", [True, False], ids=["longest on the host", "length on the device"])
def test_sequences_go_on_where_each_of_them_is(variant: str, told: bool) -> None:
    """Several new tokens of each, as speculation verifies them."""
    model, weights, tokens, wanted = whole_sequences(variant, 3)
    cache = KVCache.empty(model, model.layers, 3, 12, dtype=torch.float64)
    run_model(model, weights, tokens[:, :9], cache, 0, "math")
    starts = (9, 4, 6)  # what two of them have beyond is forgotten
    new = torch.stack([row[start : start + 3] for row, start in zip(tokens, starts, strict=True)])
    found = run_model(model, weights, new, cache, max(starts), "math", told, starts)
    for row, start in enumerate(starts):
        close(found[row], wanted[row, start : start + 3])


def test_a_cache_refuses_what_does_not_fit() -> None:
    cache = KVCache.empty(TINY, 2, 1, 4)
    assert cache.nbytes == 2 * 2 * TINY.kv_heads * 4 * TINY.head_dim * 4
    x = torch.zeros(1, TINY.kv_heads, 3, TINY.head_dim)
    cache.append(0, x, x, 1)
    with pytest.raises(ValueError, match=r"2\.\.4 .* 4 tokens"):
        cache.append(0, x, x, 2)
