"""The product of a few rows with a weight, as fast as the weight is read; the norm before it and the gated activation
or the sum after it in the same kernel.

One decoded token is bound by reading weights. Libraries' kernels for a single row read at nine tenths of what memory
gives, and what surrounds them (norm, activation, sum) is a launch each, as long as the reading of megabytes. Here a
program owns `rows` of the weight, holds them whole, and asks for them before it waits for its input (kernels.ahead).
The plain reference is the operations of `runners/ops` one after another; `tests/gpu/check_fused.py` compares them.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from autotune.kernels import ahead

MOST_ROWS = 4  # of x: each is multiplied by itself, so that more are bound by arithmetic
MOST_INPUTS = 32768  # a program holds a row of the weight in registers


class Norm(NamedTuple):
    """An RMSNorm of x before the product: its gain [inputs] and epsilon."""

    gain: Tensor
    eps: float


class Tiles(NamedTuple):
    """Rows of the weight that one program has (of a gated product: pairs of rows), and its warps."""

    rows: int
    warps: int


@triton.jit
def _product(
    x, gain, weight, bias, more, out, eps, outputs, inputs,
    tokens: tl.constexpr, rows: tl.constexpr, lanes: tl.constexpr,
    norm: tl.constexpr, gated: tl.constexpr, biased: tl.constexpr, added: tl.constexpr, early: tl.constexpr,
):  # fmt: skip
    ahead.begin(early)
    row = tl.program_id(0) * rows + tl.arange(0, rows)
    lane = tl.arange(0, lanes)
    here, inside = row < outputs, lane < inputs
    at = row.to(tl.int64)[:, None] * inputs + lane[None, :]
    both = here[:, None] & inside[None, :]
    w = tl.load(weight + at, mask=both, other=0.0)
    if gated:
        u = tl.load(weight + outputs.to(tl.int64) * inputs + at, mask=both, other=0.0)
    if norm:
        g = tl.load(gain + lane, mask=inside, other=0.0).to(tl.float32)
    if biased:
        b = tl.load(bias + row, mask=here, other=0.0).to(tl.float32)
    ahead.wait(early)
    for token in tl.static_range(tokens):
        v = tl.load(x + token * inputs + lane, mask=inside, other=0.0).to(tl.float32)
        if added:
            s = tl.load(more + token * outputs + row, mask=here, other=0.0).to(tl.float32)
        if norm:
            v = v * tl.rsqrt(tl.sum(v * v, 0) / inputs + eps) * g
        y = tl.sum(w.to(tl.float32) * v[None, :], 1)
        if biased:
            y += b
        if gated:
            y = y * tl.sigmoid(y) * tl.sum(u.to(tl.float32) * v[None, :], 1)
        if added:
            y += s
        tl.store(out + token * outputs + row, y, mask=here)


def tiles(inputs: int, gated: bool) -> Tiles:
    """As measured on an H200: enough bytes asked for by a program to cover what memory takes to answer."""
    if inputs <= 4096:
        return Tiles(2 if gated else 4, 4)
    return Tiles(2, 8 if inputs <= 8192 else 16)


def product(
    x: Tensor,
    weight: Tensor,
    norm: Norm | None = None,
    bias: Tensor | None = None,
    more: Tensor | None = None,
    gated: bool = False,
    how: Tiles | None = None,
) -> Tensor:
    """x [tokens, inputs] times weight [outputs, inputs], computed in fp32 and rounded once: [tokens, outputs].

    `norm`: of x first. `gated`: the weight's upper half gates its lower, silu(x G) * (x U), of half as many outputs
    (without a bias). `more` [tokens, outputs] is added. At most MOST_ROWS tokens and MOST_INPUTS inputs.
    """
    tokens, inputs = x.shape
    outputs = weight.shape[0] // (2 if gated else 1)
    out = torch.empty((tokens, outputs), dtype=x.dtype, device=x.device)
    how = how or tiles(inputs, gated)
    early = ahead.possible(x.device)
    gain, eps = norm or (weight, 0.0)
    _product[(triton.cdiv(outputs, how.rows),)](
        x.contiguous(), gain, weight, weight if bias is None else bias, x if more is None else more.contiguous(), out,
        eps, outputs, inputs, tokens, how.rows, triton.next_power_of_2(inputs),
        norm is not None, gated, bias is not None, more is not None, early,
        num_warps=how.warps, **ahead.launched(early),
    )  # fmt: skip
    return out
