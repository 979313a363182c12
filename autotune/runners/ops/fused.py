"""Runs of operations that one kernel of ours computes: what `planners/lower/fuse.py` joins, by the joined name.

Where the kernel cannot (no GPU, a type it does not take, a length that only the host knows) the operations are done one
after another, which is what it is compared with.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from autotune.kernels import usable
from autotune.runners.ops import OPERATIONS, Env
from autotune.runners.ops.attention import window_of
from autotune.runners.ops.attention_cache import FLASH_DTYPES
from autotune.runners.ops.linear import operands
from autotune.runners.ops.rotary import on_gpu
from autotune.spec.graph import Node

Nodes = tuple[Node, ...]
Fused = Callable[..., tuple[Tensor, ...]]  # (env, nodes, one tensor a read) -> the last node's writes


def one_by_one(env: Env, nodes: Nodes, *reads: Tensor) -> tuple[Tensor, ...]:
    """The run's operations as they are: `reads` are what no node of the run makes, in order."""
    given, values = iter(reads), dict[str, Tensor]()
    for node in nodes:
        operands = [values[n] if n in values else values.setdefault(n, next(given)) for n in node.reads]
        values.update(zip(node.writes, OPERATIONS[node.op].forward(env, node, *operands), strict=False))
    return tuple(values[name] for name in nodes[-1].writes)


def _product(env: Env, nodes: Nodes, x: Tensor, more: Tensor | None = None) -> tuple[Tensor, ...]:
    """A linear layer with an RMSNorm before it, a gated activation or a sum after it, as `nodes` say."""
    if not usable(x):
        return one_by_one(env, nodes, *((x,) if more is None else (x, more)))
    from autotune.kernels import matvec

    weight, scales, bias = operands(env, next(n for n in nodes if n.op in PRODUCTS))
    gated = nodes[-1].op == "swiglu"
    if len(x) > matvec.MOST_ROWS or x.shape[1] > matvec.MOST_INPUTS or (gated and bias is not None):
        return one_by_one(env, nodes, *((x,) if more is None else (x, more)))
    norm = None
    if nodes[0].op == "rmsnorm":
        norm = matvec.Norm(env.weights[nodes[0].weights[0].name], nodes[0].number("eps"))
    return (matvec.product(x, weight, norm, bias, more, gated, scales=scales),)


@lru_cache(maxsize=8)
def _room(batch: int, heads: Any, device: torch.device) -> Any:
    """Where the programs of one attention leave their parts. Attentions of a device follow one another."""
    from autotune.kernels.decode import parts

    return parts(batch, heads, device)


def _attention(env: Env, nodes: Nodes, qkv: Tensor) -> tuple[Tensor, ...]:
    """A few new tokens a sequence over the cache, from the product that made q, k and v."""
    rotary, attention = nodes
    if env.cache is None or env.lengths is None or not usable(qkv) or qkv.dtype not in FLASH_DTYPES:
        return one_by_one(env, nodes, qkv)
    from autotune.kernels import decode

    _, heads, norms = on_gpu(env, rotary)
    room = _room(env.batch, heads, qkv.device)
    lengths, tree = env.lengths, env.lengths.visible is not None
    cache = decode.Cache(env.cache.k[env.layer], env.cache.v[env.layer], lengths.used, lengths.depths, lengths.visible)
    cache = cache._replace(depths=lengths.depths if tree else None, table=env.cache.table)
    return (decode.attend(qkv, heads, env.rope, cache, room, window_of(env, attention, env.sequence), norms),)


PRODUCTS = ("linear", "linear_int8")
FUSED: dict[str, Fused] = {
    "rmsnorm+linear+swiglu": _product,
    "rmsnorm+linear_int8+swiglu": _product,
    "rmsnorm+linear": _product,
    "rmsnorm+linear_int8": _product,
    "linear+add": _product,
    "linear_int8+add": _product,
    "rotary+attention": _attention,
    "rotary_norm+attention": _attention,
}
