"""The product of a few rows with a weight, as fast as the weight is read; the norm before it and the gated activation
or the sum after it in the same kernel.

One decoded token is bound by reading weights. Libraries' kernels for a single row read at nine tenths of what memory
gives, and what surrounds them (norm, activation, sum) is a launch each, as long as the reading of megabytes. Here a
program owns `rows` of the weight, holds them whole, and asks for them before it waits for its input (kernels.ahead).
Several tokens, of sequences side by side or proposed to be scored together, are the columns of matrix products with
blocks of these rows: reading the weight is still what takes the time.
Weights may be whole numbers of a byte, with a scale for each row (spec.int8_graph): half of what bf16 reads. They are
widened in registers, which loses nothing (bf16 has every whole number up to 256), and the scale comes after the sum.
The plain reference is the operations of `runners/ops` one after another; `tests/gpu/check_fused.py` compares them.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from autotune.kernels import ahead

MOST_ROWS = 16  # of x: with more, normalising them in every program takes longer than a kernel of its own does
LEAST_COLUMNS = 16  # of a matrix product
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
    x, gain, weight, scales, bias, more, out, eps, outputs, inputs,
    tokens: tl.constexpr, rows: tl.constexpr, lanes: tl.constexpr,
    norm: tl.constexpr, gated: tl.constexpr, scaled: tl.constexpr, biased: tl.constexpr, added: tl.constexpr,
    early: tl.constexpr,
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
    if scaled:
        of_row = tl.load(scales + row, mask=here, other=0.0)
        if gated:
            of_upper = tl.load(scales + outputs + row, mask=here, other=0.0)
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
        if scaled:
            y = y * of_row
        if biased:
            y += b
        if gated:
            z = tl.sum(u.to(tl.float32) * v[None, :], 1)
            if scaled:
                z = z * of_upper
            y = y * tl.sigmoid(y) * z
        if added:
            y += s
        tl.store(out + token * outputs + row, y, mask=here)


class Blocks(NamedTuple):
    """Rows of the weight that one program has (of a gated product: pairs of rows), of how many inputs at a time it
    multiplies them, for how many such blocks ahead it asks, and its warps."""

    rows: int
    inputs: int
    ahead: int
    warps: int


@triton.jit
def _block(
    x, gain, weight, row, here, token, real, lane, inputs, halves,
    norm: tl.constexpr, gated: tl.constexpr,
):  # fmt: skip
    """A block of inputs: weights [rows, lanes] (those of the upper half too, where gated), and of x [tokens, lanes]
    what is multiplied and its squares' sum."""
    inside = lane < inputs
    at = row.to(tl.int64)[:, None] * inputs + lane[None, :]
    both = here[:, None] & inside[None, :]
    w = tl.load(weight + at, mask=both, other=0.0)
    u = w
    if gated:
        u = tl.load(weight + halves + at, mask=both, other=0.0)
    v = tl.load(x + token[:, None] * inputs + lane[None, :], mask=real[:, None] & inside[None, :], other=0.0)
    square = tl.zeros([token.shape[0]], tl.float32)
    if norm:
        wide = v.to(tl.float32)
        square = tl.sum(wide * wide, 1)
        v = (wide * tl.load(gain + lane, mask=inside, other=0.0).to(tl.float32)[None, :]).to(v.dtype)
    return w, u, v, square


@triton.jit
def _products(
    x, gain, weight, scales, bias, more, out, eps, tokens, outputs, inputs,
    columns: tl.constexpr, rows: tl.constexpr, lanes: tl.constexpr, stages: tl.constexpr,
    norm: tl.constexpr, gated: tl.constexpr, scaled: tl.constexpr, biased: tl.constexpr, added: tl.constexpr,
    early: tl.constexpr,
):  # fmt: skip
    ahead.begin(early)
    row = tl.program_id(0) * rows + tl.arange(0, rows)
    token = tl.arange(0, columns)
    here, real = row < outputs, token < tokens
    halves = outputs.to(tl.int64) * inputs
    y = tl.zeros([rows, columns], tl.float32)
    z = tl.zeros([rows, columns], tl.float32)
    squares = tl.zeros([columns], tl.float32)
    ahead.wait(early)
    for start in tl.range(0, inputs, lanes, num_stages=stages):
        lane = start + tl.arange(0, lanes)
        w, u, v, square = _block(x, gain, weight, row, here, token, real, lane, inputs, halves, norm, gated)
        t = tl.trans(v)
        y = tl.dot(w.to(v.dtype), t, y, input_precision="ieee")
        if gated:
            z = tl.dot(u.to(v.dtype), t, z, input_precision="ieee")
        squares += square
    if norm:
        scale = tl.rsqrt(squares / inputs + eps)[None, :]
        y = y * scale
        z = z * scale
    if scaled:
        y = y * tl.load(scales + row, mask=here, other=0.0)[:, None]
        if gated:
            z = z * tl.load(scales + outputs + row, mask=here, other=0.0)[:, None]
    if biased:
        y += tl.load(bias + row, mask=here, other=0.0).to(tl.float32)[:, None]
    if gated:
        y = y * tl.sigmoid(y) * z
    at = token[None, :] * outputs + row[:, None]
    both = here[:, None] & real[None, :]
    if added:
        y += tl.load(more + at, mask=both, other=0.0).to(tl.float32)
    tl.store(out + at, y, mask=both)


def blocks(outputs: int, inputs: int, norm: bool) -> Blocks:
    """As measured on an H200 with 9 and 16 tokens: what is normalised, in as few programs as keep all processors
    busy."""
    if norm:
        return Blocks(64, 256, 3, 4)
    return Blocks(32, 256, 4, 4) if inputs > 8192 or outputs <= 2048 else Blocks(64, 128, 5, 4)


def tiles(inputs: int, gated: bool, width: int = 2) -> Tiles:
    """As measured on an H200 with weights of two bytes: enough bytes asked for by a program to cover what memory takes
    to answer. Of weights of a byte twice as many rows are as many bytes."""
    more = 2 if width == 1 else 1
    if inputs <= 4096:
        return Tiles((2 if gated else 4) * more, 4)
    return Tiles(2 * more, 8 if inputs <= 8192 else 16)


def product(
    x: Tensor,
    weight: Tensor,
    norm: Norm | None = None,
    bias: Tensor | None = None,
    more: Tensor | None = None,
    gated: bool = False,
    how: Tiles | Blocks | None = None,
    scales: Tensor | None = None,
) -> Tensor:
    """x [tokens, inputs] times weight [outputs, inputs], computed in fp32 and rounded once (of several tokens, and what
    is normed, also before it is multiplied): [tokens, outputs].

    `norm`: of x first. `gated`: the weight's upper half gates its lower, silu(x G) * (x U), of half as many outputs
    (without a bias). `more` [tokens, outputs] is added. At most MOST_ROWS tokens and MOST_INPUTS inputs. `scales`,
    fp32 [rows of the weight]: of an int8 weight. `how`: Tiles for one token, or a few one by one, Blocks for several.
    """
    tokens, inputs = x.shape
    outputs = weight.shape[0] // (2 if gated else 1)
    out = torch.empty((tokens, outputs), dtype=x.dtype, device=x.device)
    how = how or (
        tiles(inputs, gated, weight.element_size()) if tokens == 1 else blocks(outputs, inputs, norm is not None)
    )
    early = ahead.possible(x.device)
    gain, eps = norm or (x, 0.0)
    lent = x if scales is None else scales
    if isinstance(how, Blocks):
        _products[(triton.cdiv(outputs, how.rows),)](
            x.contiguous(), gain, weight, lent, x if bias is None else bias, x if more is None else more.contiguous(),
            out, eps, tokens, outputs, inputs,
            max(LEAST_COLUMNS, triton.next_power_of_2(tokens)), how.rows, how.inputs, how.ahead,
            norm is not None, gated, scales is not None, bias is not None, more is not None, early,
            num_warps=how.warps, **ahead.launched(early),
        )  # fmt: skip
        return out
    _product[(triton.cdiv(outputs, how.rows),)](
        x.contiguous(), gain, weight, lent, x if bias is None else bias, x if more is None else more.contiguous(), out,
        eps, outputs, inputs, tokens, how.rows, triton.next_power_of_2(inputs),
        norm is not None, gated, scales is not None, bias is not None, more is not None, early,
        num_warps=how.warps, **ahead.launched(early),
    )  # fmt: skip
    return out
