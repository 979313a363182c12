"""Causal grouped-query attention as an operation of a block: training, prefill into a cache, decoding from it; and the
parts of it that ranks in a ring do one after another (planners.lower.context).

What computes it is a key of BACKENDS; a plan names one. Every backend takes and gives [batch, heads, sequence, width]
views of the two-dimensional activations, so that no layout is ever copied where the kernel reads strides. Its q, k and
v are of one width: narrower values (latent attention) are padded with zeros to it, and the result cut.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from autotune.runners.ops import attention_aten as fused
from autotune.runners.ops import attention_math as plain
from autotune.runners.ops.attention_cache import over_cache
from autotune.runners.ops.attention_masked import chosen
from autotune.runners.ops.env import Env
from autotune.spec.errors import UsageError, nearest_name
from autotune.spec.graph import Node


class Backend(Protocol):
    """One way to compute attention. q, o [batch, heads, sequence, width]; k, v with kv_heads; window 0: all before."""

    def supported(
        self, device: torch.device, dtype: torch.dtype, head_dim: int, sequence: int = 0, window: int = 0
    ) -> str | None:
        """Why it cannot run this, or None. `sequence` 0 stands for any length."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, window: int, causal: bool = True) -> tuple[Tensor, Tensor]:
        """o and lse [batch, heads, sequence] (fp32, or fp64 for fp64): log of the sum of exponentials of the scores."""

    def backward(
        self, g: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, window: int, causal: bool = True
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of q, k and v from that of o; o and lse may be those over more keys than these."""


# Causal masks end at the diagonal: row i sees columns max(0, i - window + 1)..i. Not causal, every query sees every
# key: there is no window then, and there may be more of either.
BACKENDS: dict[str, Backend] = {
    "math": plain.Math(),
    "flash": fused.Flash(),
    "cudnn": fused.Cudnn(),
    "efficient": fused.Efficient(),
    "sdpa": fused.Sdpa(),
}


def unsupported(
    name: str, device: torch.device, dtype: torch.dtype, head_dim: int, sequence: int = 0, window: int = 0
) -> str | None:
    """Why backend `name` cannot run this shape, or None. Raises UsageError for a name that is no backend."""
    if name not in BACKENDS:
        near = nearest_name(name, BACKENDS)
        hint = f"did you mean {near}?" if near else None
        raise UsageError(f"attention: found {name!r}; expected one of {', '.join(BACKENDS)}", hint=hint)
    return BACKENDS[name].supported(device, dtype, head_dim, sequence, window)


def _heads(env: Env, width: int, *flat: Tensor) -> list[Tensor]:
    """[tokens, heads * width] -> [batch, heads, sequence, width] views."""
    shape = (env.batch, len(flat[0]) // env.batch, -1, width)
    return [x.view(shape).transpose(1, 2) for x in flat]


def _values(env: Env, node: Node, *flat: Tensor) -> list[Tensor]:
    """As `_heads`, of what is as wide as values are: widened with zeros to the width of keys."""
    narrow, width = node.attr("v_dim"), node.attr("head_dim")
    if narrow < width:
        flat = tuple(F.pad(x.view(len(x), -1, narrow), (0, width - narrow)) for x in flat)
    return _heads(env, width, *flat)


def _flat(x: Tensor) -> Tensor:
    """[batch, heads, sequence, ...] -> [tokens, heads * ...]: a view where the kernel wrote token by token."""
    return x.transpose(1, 2).reshape(x.shape[0] * x.shape[2], -1)


def window_of(env: Env, node: Node, tokens: int) -> int:
    """The sliding window where it hides anything of sequences of so many tokens given now, or may, else 0."""
    window = node.attr("window")
    last = env.start + tokens if env.lengths is None or env.cache is None else env.cache.max_len
    return window if last > window else 0


def forward(env: Env, node: Node, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    """q [tokens, heads * head_dim], k and v [tokens, kv_heads * head_dim] -> o like q, lse [tokens, heads].

    v may be narrower, [tokens, kv_heads * v_dim], and so is o then: in training, not yet with a cache.

    With a cache, k and v are appended to it where the new tokens are, and the queries see everything before them too;
    past the prefill no lse is computed (no backward follows) and an empty tensor stands in its place.
    """
    queries, keys = _heads(env, node.attr("head_dim"), q, k)
    (values,) = _values(env, node, v)
    window = window_of(env, node, queries.shape[2])
    if env.cache is not None and env.lengths is not None:
        env.cache.append_at(env.layer, keys, values, env.lengths.places)
    elif env.cache is not None:
        env.cache.append(env.layer, keys, values, env.start)
    if env.sight is not None:
        o, lse = chosen(env.attention, queries).forward(queries, keys, values, env.sight[:, : keys.shape[2]])
        return _flat(o[..., : node.attr("v_dim")]), _flat(lse)
    if env.lengths is not None or env.start:
        return _flat(over_cache(env, queries, window)), q.new_empty(0)
    o, lse = BACKENDS[env.attention].forward(queries, keys, values, window)
    return _flat(o[..., : node.attr("v_dim")]), _flat(lse)


def dgrad(env: Env, node: Node, grads: tuple[Tensor, ...], saved: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Gradient of o [tokens, heads * head_dim] and saved q, k, v, o, lse -> gradients of q, k and v."""
    q, k = _heads(env, node.attr("head_dim"), *saved[:2])
    g, v, o = _values(env, node, grads[0], *saved[2:4])
    lse = saved[4].view(env.batch, g.shape[2], -1).transpose(1, 2)
    if env.sight is not None:
        dq, dk, dv = chosen(env.attention, q).backward(g, q, k, v, o, lse, env.sight[:, : k.shape[2]])
    else:
        dq, dk, dv = BACKENDS[env.attention].backward(g, q, k, v, o, lse, window_of(env, node, g.shape[2]))
    return _flat(dq), _flat(dk), _flat(dv[..., : node.attr("v_dim")])


def _seen(env: Env, tokens: int) -> tuple[slice, slice]:
    """Which of the queries here see which of the keys that have come env.hop ranks far: those of a rank before this one
    in the ring are of places before all queries in their first half, and after all in their second; those of a rank
    after this one are before the queries' second half, and after their first."""
    half, every = tokens // 2, slice(0, tokens)
    return (every, slice(0, half)) if env.hop <= env.ring_rank else (slice(half, tokens), every)


def more(env: Env, node: Node, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor) -> tuple[Tensor, ...]:
    """As `forward` over the keys that have come from another rank: merged into o and lse, in place.

    Two parts have lse log(e^a + e^b), and o the mean of theirs by e^(a - lse) and e^(b - lse) (2310.01889, 3).
    """
    queries, keys, values, known = _heads(env, node.attr("head_dim"), q, k, v, o)
    rows, columns = _seen(env, queries.shape[2])
    queries, known = queries[:, :, rows], known[:, :, rows]
    before = lse.view(env.batch, keys.shape[2], -1).transpose(1, 2)[:, :, rows]
    part, own = BACKENDS[env.attention].forward(queries, keys[:, :, columns], values[:, :, columns], 0, causal=False)
    both = torch.logaddexp(before, own)
    share = own.sub_(both).exp_().unsqueeze(-1)  # of this part
    known.copy_(torch.lerp(known.to(share.dtype), part.to(share.dtype), share))
    before.copy_(both)
    return o, lse


def more_dgrad(env: Env, node: Node, grads: tuple[Tensor, ...], saved: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """As `dgrad`, of the keys that have come from another rank; zero for queries that see none, and keys unseen."""
    width = node.attr("head_dim")
    g, q, k, v, o = _heads(env, width, grads[0], *saved[:4])
    rows, columns = _seen(env, g.shape[2])
    lse = saved[4].view(env.batch, g.shape[2], -1).transpose(1, 2)[:, :, rows]
    made = [torch.zeros_like(x) for x in saved[:3]]
    places = (rows, columns, columns)
    parts = BACKENDS[env.attention].backward(
        g[:, :, rows], q[:, :, rows], k[:, :, columns], v[:, :, columns], o[:, :, rows], lse, 0, causal=False
    )
    for whole, part, place in zip(_heads(env, width, *made), parts, places, strict=True):
        whole[:, :, place] = part
    return tuple(made)
