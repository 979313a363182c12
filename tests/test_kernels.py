"""Our kernels, interpreted on a CPU, compute what the plain operations do; on a GPU tests/gpu/check_ops.py says so."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from autotune.runners.ops import OPERATIONS, Env, elementwise, sharded_softmax
from autotune.runners.ops.sharded_softmax import Columns
from autotune.runners.rope import tables
from autotune.spec.graph import Node, blocks
from autotune.spec.model import ModelSpec

os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is defined
pytest.importorskip("triton", reason="Triton is not installed for this machine")
from autotune.kernels import rotary, softmax, swiglu, usable

BOUNDS = {torch.float32: 2e-6, torch.bfloat16: 1e-2}


def close(found: Tensor, wanted: Tensor, dtype: torch.dtype) -> None:
    assert found.dtype == wanted.dtype == dtype
    error = (found.double() - wanted.double()).norm() / wanted.double().norm()
    assert float(error) < BOUNDS[dtype]


def case(norm: bool, heads: int, keys: int, width: int, dtype: torch.dtype) -> tuple[Env, Node, rotary.Heads, Any]:
    """Two sequences of five tokens, not from the start of the tables."""
    model = ModelSpec("small", "Qwen3ForCausalLM", 64, 1, heads, keys, width, 128, 64, qk_norm=norm)
    node = next(n for n in blocks(model)[1].nodes if n.op.startswith("rotary"))
    weights = {w.name: (torch.rand(width) + 0.5).to(dtype) for w in node.weights}
    env = Env(model, 2, 5, torch.arange(3, 8), tables(model, 16, torch.device("cpu")), weights)
    norms = rotary.Norms(*weights.values(), node.number("eps")) if norm else None
    return env, node, rotary.Heads(heads, keys, width, 5), norms


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("norm", [False, True], ids=["turned", "normalised and turned"])
@pytest.mark.parametrize(("heads", "keys", "width"), [(6, 2, 24), (8, 8, 16), (3, 1, 64)])
def test_heads_are_split_and_turned(norm: bool, heads: int, keys: int, width: int, dtype: torch.dtype) -> None:
    torch.manual_seed(heads)
    env, node, sizes, norms = case(norm, heads, keys, width, dtype)
    qkv = torch.randn(10, (heads + 2 * keys) * width).to(dtype)
    wanted = OPERATIONS[node.op].forward(env, node, qkv)
    for a, b in zip(rotary.split_and_turn(qkv, sizes, env.rope, env.positions, norms), wanted, strict=True):
        close(a, b, dtype)
    grads = tuple(torch.randn_like(x) for x in wanted)
    back: Callable[..., Any] = OPERATIONS[node.op].dgrad  # type: ignore[assignment]
    saved = (qkv,) if norm else ()
    found = rotary.turn_back(grads, sizes, env.rope, env.positions, norms, *saved)  # type: ignore[arg-type]
    close(found, back(env, node, grads, saved)[0], dtype)


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("width", [96, 1500])
def test_gated_silu(width: int, dtype: torch.dtype) -> None:
    torch.manual_seed(width)
    both, grad = torch.randn(7, 2 * width).to(dtype), torch.randn(7, width).to(dtype)
    env: Any = None
    node: Any = None
    close(swiglu.swiglu(both), elementwise.swiglu(env, node, both)[0], dtype)
    wanted = elementwise.swiglu_dgrad(env, node, (grad,), (both,))[0]
    close(swiglu.swiglu_gradient(grad, both), wanted, dtype)


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("rank", [0, 2], ids=["full", "padded"])
@pytest.mark.parametrize("block", [32, 8192], ids=["blocks", "one block"])
def test_softmax_over_a_shard(block: int, rank: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each in-place pass, and the loss's gradient by both ways to it; the last shard of 250 columns has 34 of 108."""
    monkeypatch.setattr(softmax, "BLOCK", block)
    torch.manual_seed(rank)
    columns, targets = Columns.of(250, rank, 108), torch.randint(0, 250, (9,))
    targets[:2] = columns.first  # some are here
    logits = columns.mask((3 * torch.randn(9, 108)).to(dtype))
    ours, plain = logits.clone(), logits.clone()
    torch.testing.assert_close(softmax.softmax(ours), sharded_softmax.softmax(plain), rtol=1e-6, atol=1e-6)
    close(ours, plain, dtype)
    factor = torch.rand(9)
    sharded_softmax.logits_gradient(plain, factor, targets, columns, 0.3)
    close(softmax.rescaled_gradient(ours, factor, targets, 0.3, columns.first, columns.valid), plain, dtype)
    top, ours, plain = logits.amax(1).float(), logits.clone(), logits.clone()
    torch.testing.assert_close(softmax.exponentials(ours, top), sharded_softmax.exponentials(plain, top))
    close(ours, plain, dtype)


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
def test_cross_entropy(dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    logits, targets = (3 * torch.randn(9, 200)).to(dtype), torch.randint(0, 200, (9,))
    lse = softmax.log_sum_exp(logits)
    torch.testing.assert_close(lse, logits.float().logsumexp(1), rtol=1e-6, atol=1e-6)
    one_hot = torch.nn.functional.one_hot(targets, 200)
    wanted = ((logits.float().softmax(1) - one_hot) * 0.3).to(dtype)
    close(softmax.cross_entropy_gradient(logits, lse, targets, 0.3), wanted, dtype)


def test_a_cpu_runs_none_of_them() -> None:
    assert not usable(torch.zeros(1))
