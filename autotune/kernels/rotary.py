"""Rotary positions in one kernel: the fused q, k, v split, q and k normalised (where asked) and turned; and back.

torch has no such kernel: from its own operations it takes a dozen launches and as many passes over memory. The plain
reference is `runners/ops/rotary.py` on a CPU; `tests/gpu/check_ops.py` compares the two. Half-rotation layout: halves
a, b of a head become a cos - b sin, b cos + a sin (Su et al., 2104.09864, 3.4).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

HEADS = 8  # that one program of the kernel turns


class Heads(NamedTuple):
    """Query and key heads of this rank, a head's width (even), and tokens of one sequence."""

    queries: int
    keys: int
    width: int
    sequence: int


class Norms(NamedTuple):
    """Weights [width] of the RMSNorm over each head of q and of k, and its epsilon."""

    q: Tensor
    k: Tensor
    eps: float


@triton.jit
def _angles(cos, sin, positions, token, sequence, lane, half: tl.constexpr):
    """Of this token, cos and sin of each pair of lanes, as one row."""
    row = tl.load(positions + token % sequence) * 2 * half + lane
    c = tl.load(cos + row, mask=lane < half, other=0.0)
    s = tl.load(sin + row, mask=lane < half, other=0.0)
    return c[None, :], s[None, :]


@triton.jit
def _weights(q_weight, k_weight, is_q, lane, half: tl.constexpr):
    """Each head's norm weights, q's or k's, for the first and the second half of its lanes."""
    inside, is_q = lane < half, is_q[:, None]
    qa = tl.load(q_weight + lane, mask=inside, other=0.0).to(tl.float32)[None, :]
    qb = tl.load(q_weight + half + lane, mask=inside, other=0.0).to(tl.float32)[None, :]
    ka = tl.load(k_weight + lane, mask=inside, other=0.0).to(tl.float32)[None, :]
    kb = tl.load(k_weight + half + lane, mask=inside, other=0.0).to(tl.float32)[None, :]
    return tl.where(is_q, qa, ka), tl.where(is_q, qb, kb)


@triton.jit
def _forward(
    qkv, q, k, v, cos, sin, positions, q_weight, k_weight, eps,
    sequence, queries: tl.constexpr, keys: tl.constexpr, half: tl.constexpr, lanes: tl.constexpr,
    heads: tl.constexpr, norm: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * heads + tl.arange(0, heads)
    lane = tl.arange(0, lanes)
    inside = (lane < half)[None, :]
    here = (head < queries + 2 * keys)[:, None] & inside
    turned = (head < queries + keys)[:, None]
    at = token * (queries + 2 * keys) * 2 * half + head[:, None] * 2 * half + lane[None, :]
    a = tl.load(qkv + at, mask=here, other=0.0).to(tl.float32)
    b = tl.load(qkv + at + half, mask=here, other=0.0).to(tl.float32)
    c, s = _angles(cos, sin, positions, token, sequence, lane, half)
    x, y = a, b
    if norm:
        wa, wb = _weights(q_weight, k_weight, head < queries, lane, half)
        rstd = tl.rsqrt((tl.sum(a * a, 1) + tl.sum(b * b, 1)) / (2 * half) + eps)[:, None]
        x, y = a * rstd * wa, b * rstd * wb
    first = tl.where(turned, x * c - y * s, a)
    second = tl.where(turned, y * c + x * s, b)
    to = head[:, None] * 2 * half + lane[None, :]
    is_q = (head < queries)[:, None] & inside
    tl.store(q + token * queries * 2 * half + to, first, mask=is_q)
    tl.store(q + token * queries * 2 * half + to + half, second, mask=is_q)
    to_k = to - queries * 2 * half
    is_k = ((head >= queries) & (head < queries + keys))[:, None] & inside
    tl.store(k + token * keys * 2 * half + to_k, first, mask=is_k)
    tl.store(k + token * keys * 2 * half + to_k + half, second, mask=is_k)
    to_v = to_k - keys * 2 * half
    is_v = (head >= queries + keys)[:, None] & here
    tl.store(v + token * keys * 2 * half + to_v, first, mask=is_v)
    tl.store(v + token * keys * 2 * half + to_v + half, second, mask=is_v)


@triton.jit
def _backward(
    dqkv, dq, dk, dv, qkv, cos, sin, positions, q_weight, k_weight, eps,
    sequence, queries: tl.constexpr, keys: tl.constexpr, half: tl.constexpr, lanes: tl.constexpr,
    heads: tl.constexpr, norm: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * heads + tl.arange(0, heads)
    lane = tl.arange(0, lanes)
    inside = (lane < half)[None, :]
    here = (head < queries + 2 * keys)[:, None] & inside
    turned = (head < queries + keys)[:, None]
    at = head[:, None] * 2 * half + lane[None, :]
    is_q = (head < queries)[:, None] & inside
    is_k = ((head >= queries) & (head < queries + keys))[:, None] & inside
    is_v = (head >= queries + keys)[:, None] & here
    of_q = dq + token * queries * 2 * half + at
    of_k = dk + token * keys * 2 * half + at - queries * 2 * half
    of_v = dv + token * keys * 2 * half + at - (queries + keys) * 2 * half
    a = tl.load(of_q, mask=is_q, other=0.0).to(tl.float32)
    a += tl.load(of_k, mask=is_k, other=0.0).to(tl.float32)
    a += tl.load(of_v, mask=is_v, other=0.0).to(tl.float32)
    b = tl.load(of_q + half, mask=is_q, other=0.0).to(tl.float32)
    b += tl.load(of_k + half, mask=is_k, other=0.0).to(tl.float32)
    b += tl.load(of_v + half, mask=is_v, other=0.0).to(tl.float32)
    c, s = _angles(cos, sin, positions, token, sequence, lane, half)
    first, second = a * c + b * s, b * c - a * s
    to = token * (queries + 2 * keys) * 2 * half + at
    if norm:
        wa, wb = _weights(q_weight, k_weight, head < queries, lane, half)
        x = tl.load(qkv + to, mask=here, other=0.0).to(tl.float32)
        y = tl.load(qkv + to + half, mask=here, other=0.0).to(tl.float32)
        rstd = tl.rsqrt((tl.sum(x * x, 1) + tl.sum(y * y, 1)) / (2 * half) + eps)[:, None]
        x, y = x * rstd, y * rstd
        ga, gb = first * wa, second * wb
        mean = ((tl.sum(ga * x, 1) + tl.sum(gb * y, 1)) / (2 * half))[:, None]
        first, second = rstd * (ga - x * mean), rstd * (gb - y * mean)
    tl.store(dqkv + to, tl.where(turned, first, a), mask=here)
    tl.store(dqkv + to + half, tl.where(turned, second, b), mask=here)


def _launch(
    kernel: Any, heads: Heads, tokens: int, tensors: tuple[Tensor, ...], rope: tuple[Tensor, Tensor],
    positions: Tensor, norms: Norms | None,
) -> None:  # fmt: skip
    half = heads.width // 2
    grid = (tokens, triton.cdiv(heads.queries + 2 * heads.keys, HEADS))
    weights = (norms.q, norms.k, norms.eps) if norms else (rope[0], rope[0], 0.0)
    kernel[grid](
        *tensors, *rope, positions, *weights,
        len(positions), heads.queries, heads.keys, half, triton.next_power_of_2(half), HEADS, norms is not None,
    )  # fmt: skip


def split_and_turn(
    qkv: Tensor, heads: Heads, rope: tuple[Tensor, Tensor], positions: Tensor, norms: Norms | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """qkv [tokens, (queries + 2 keys) width] -> q, k turned and v, each [tokens, its heads * width].

    `rope`: cos and sin, fp32 [positions, width]; `positions` int64 [sequence], or
    [tokens] where sequences differ. fp32, bf16 or fp16, computed in fp32.
    """
    tokens = qkv.shape[0]
    q = torch.empty((tokens, heads.queries * heads.width), dtype=qkv.dtype, device=qkv.device)
    k, v = (torch.empty((tokens, heads.keys * heads.width), dtype=qkv.dtype, device=qkv.device) for _ in range(2))
    _launch(_forward, heads, tokens, (qkv.contiguous(), q, k, v), rope, positions, norms)
    return q, k, v


def turn_back(
    grads: tuple[Tensor, Tensor, Tensor],
    heads: Heads,
    rope: tuple[Tensor, Tensor],
    positions: Tensor,
    norms: Norms | None = None,
    qkv: Tensor | None = None,
) -> Tensor:
    """Gradients of q, k and v -> that of the fused qkv (which is needed where heads were normalised)."""
    dq, dk, dv = (g.contiguous() for g in grads)
    tokens = dq.shape[0]
    made = torch.empty((tokens, dq.shape[1] + 2 * dk.shape[1]), dtype=dq.dtype, device=dq.device)
    before = made if qkv is None else qkv
    _launch(_backward, heads, tokens, (made, dq, dk, dv, before), rope, positions, norms)
    return made
