"""Softmax and cross-entropy over rows of logits: each pass reads a row once, and writes it at most once, in its place.

From torch's own operations each takes four to six passes over wide temporaries. The plain references are
`runners/ops/cross_entropy.py` and `runners/ops/sharded_softmax.py` on a CPU; `tests/gpu/check_ops.py` compares them.
A row's maximum and sum are kept together while it is read (online softmax: Milakov & Gimelshein, 1805.02867).
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 8192  # columns that a program holds at once
WARPS = 8


@triton.jit
def _log_sum_exp(logits, lse, columns, block: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, block)
    top = tl.full((), -3.0e38, tl.float32)  # finite, so that a block of padding leaves the sum as it was
    total = tl.zeros((), tl.float32)
    for begin in range(0, columns, block):
        at = begin + lane
        x = tl.load(logits + row * columns + at, mask=at < columns, other=float("-inf")).to(tl.float32)
        higher = tl.maximum(top, tl.max(x, 0))
        total = total * tl.exp(top - higher) + tl.sum(tl.exp(x - higher), 0)
        top = higher
    tl.store(lse + row, top + tl.log(total))


@triton.jit
def _rows(
    values, by, targets, sums, scale, first, valid, columns,
    exponential: tl.constexpr, targeted: tl.constexpr, summed: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, block)
    own = tl.load(by + row)
    target = -1
    if targeted:
        target = (tl.load(targets + row) - first).to(tl.int32)
        target = tl.where(target < valid, target, -1)
    total = tl.zeros((), tl.float32)
    for begin in range(0, columns, block):
        at = begin + lane
        x = tl.load(values + row * columns + at, mask=at < columns, other=float("-inf")).to(tl.float32)
        y = tl.exp(x - own) * scale if exponential else x * (own * scale)
        if targeted:
            y = tl.where(at == target, y - scale, y)
        if summed:
            total += tl.sum(tl.where(at < columns, y, 0.0), 0)
        tl.store(values + row * columns + at, y, mask=at < columns)
    if summed:
        tl.store(sums + row, total)


def _launch(kernel: Any, values: Tensor, *rest: Any, **switches: bool) -> None:
    rows, columns = values.shape
    block = min(BLOCK, triton.next_power_of_2(columns))
    kernel[(rows,)](values, *rest, columns, **switches, block=block, num_warps=WARPS)


def log_sum_exp(logits: Tensor) -> Tensor:
    """[tokens, columns], contiguous -> the logarithm of each row's sum of exponentials, fp32 [tokens]."""
    lse = torch.empty(len(logits), dtype=torch.float32, device=logits.device)
    _launch(_log_sum_exp, logits, lse)
    return lse


def exponentials(logits: Tensor, top: Tensor) -> Tensor:
    """exp(logits - top) in the logits' place, `top` fp32 [tokens]; gives each row's sum, fp32 [tokens]."""
    total = torch.empty_like(top)
    _launch(_rows, logits, top, top, total, 1.0, 0, 0, exponential=True, targeted=False, summed=True)
    return total


def softmax(logits: Tensor) -> Tensor:
    """The softmax [tokens, columns] in the logits' place; gives what `log_sum_exp` does."""
    lse = log_sum_exp(logits)
    _launch(_rows, logits, lse, lse, lse, 1.0, 0, 0, exponential=True, targeted=False, summed=False)
    return lse


def cross_entropy_gradient(
    logits: Tensor, lse: Tensor, targets: Tensor, scale: float, first: int = 0, valid: int | None = None
) -> Tensor:
    """(exp(logits - lse) - one-hot) * scale in the logits' place.

    `targets` int64 [tokens] count over the whole vocabulary, of which the columns here are those from `first`, and only
    `valid` of them (default: all) are ever a target.
    """
    here = logits.shape[1] if valid is None else valid
    _launch(_rows, logits, lse, targets, lse, scale, first, here, exponential=True, targeted=True, summed=False)
    return logits


def rescaled_gradient(part: Tensor, factor: Tensor, targets: Tensor, scale: float, first: int, valid: int) -> Tensor:
    """(part * factor - one-hot) * scale in the part's place; `factor` fp32 [tokens], the rest as above."""
    _launch(_rows, part, factor, targets, factor, scale, first, valid, exponential=False, targeted=True, summed=False)
    return part
