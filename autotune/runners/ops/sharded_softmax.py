"""Softmax and cross-entropy over logits that are sharded by columns, in pieces that other ranks' sums come between.

Each shard makes its own softmax first; the factor exp(lse of the shard - lse of all) makes it a part of the whole one
afterwards (2411.05288, section 4.2; the rescaling is that of online softmax, Milakov & Gimelshein, 1805.02867).
Statistics are in `wide` precision. Columns beyond the vocabulary are minus infinity: probability and gradient are 0.
On CUDA each is a kernel of ours, without chunks.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from autotune.kernels import usable
from autotune.runners.ops.env import wide

CHUNK_BYTES = 64 * 2**20  # of one wide temporary [rows, columns of the shard]


@dataclass(frozen=True)
class Columns:
    """Which columns of the whole a shard has: `count` from `first`, those from `valid` on padding."""

    first: int
    count: int
    valid: int

    @classmethod
    def of(cls, vocab: int, rank: int, count: int) -> Columns:
        """Those of rank `rank`, each rank having `count`."""
        return cls(rank * count, count, max(0, min(count, vocab - rank * count)))

    def local(self, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Of each target int64 [tokens], its column here (0 where elsewhere) [tokens], and whether it is here."""
        local = targets - self.first
        here = (local >= 0) & (local < self.valid)
        return local.masked_fill(~here, 0), here

    def mask(self, logits: Tensor) -> Tensor:
        """The logits [tokens, count] with padding at minus infinity, in place."""
        if self.valid < self.count:
            logits[:, self.valid :] = float("-inf")
        return logits

    def target_logits(self, logits: Tensor, targets: Tensor) -> Tensor:
        """The targets' logits, 0 where they are elsewhere: wide [tokens]."""
        local, here = self.local(targets)
        return logits.gather(1, local.unsqueeze(1)).squeeze(1).to(wide(logits.dtype)).masked_fill_(~here, 0)


def _chunks(values: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Slices of rows with a wide buffer for each: the values themselves where they are wide already."""
    dtype = wide(values.dtype)
    if values.dtype == dtype:
        yield slice(None), values
        return
    rows = max(1, min(len(values), CHUNK_BYTES // (values.shape[1] * dtype.itemsize)))
    buffer = torch.empty((rows, values.shape[1]), dtype=dtype, device=values.device)
    for begin in range(0, len(values), rows):
        part = slice(begin, min(begin + rows, len(values)))
        yield part, buffer[: part.stop - begin]


def exponentials(logits: Tensor, top: Tensor) -> Tensor:
    """exp(logits - top) in place, `top` wide [tokens]; gives each row's sum, wide [tokens]."""
    if usable(logits):
        from autotune.kernels import softmax as kernel

        return kernel.exponentials(logits, top)
    total = torch.empty_like(top)
    for rows, buffer in _chunks(logits):
        torch.sub(logits[rows], top[rows].unsqueeze(1), out=buffer).exp_()
        torch.sum(buffer, 1, out=total[rows])
        if buffer.dtype != logits.dtype:
            logits[rows].copy_(buffer)
    return total


def softmax(logits: Tensor) -> Tensor:
    """The shard's own softmax in the logits' place; gives the logarithm of each row's sum of exponentials [tokens]."""
    if usable(logits):
        from autotune.kernels import softmax as kernel

        return kernel.softmax(logits)
    lse = torch.empty(len(logits), dtype=wide(logits.dtype), device=logits.device)
    for rows, buffer in _chunks(logits):
        top = logits[rows].amax(1, keepdim=True).to(lse.dtype)
        torch.sub(logits[rows], top, out=buffer).exp_()
        total = buffer.sum(1, keepdim=True)
        buffer.div_(total)
        lse[rows] = (total.log_() + top).squeeze(1)
        if buffer.dtype != logits.dtype:
            logits[rows].copy_(buffer)
    return lse


def joined(statistics: Tensor) -> tuple[Tensor, Tensor]:
    """Of all shards' (lse, target logit) [shards, 2, tokens]: the whole's, each [tokens]."""
    return torch.logsumexp(statistics[:, 0], 0), statistics[:, 1].sum(0)


def logits_gradient(part: Tensor, factor: Tensor, targets: Tensor, columns: Columns, scale: float) -> Tensor:
    """(part * factor - one-hot) * scale in `part`'s place [tokens, columns]; `factor` wide [tokens]."""
    if usable(part):
        from autotune.kernels import softmax as kernel

        return kernel.rescaled_gradient(part, factor, targets, scale, columns.first, columns.valid)
    local, here = columns.local(targets)
    minus = here.to(factor.dtype).mul_(-scale).unsqueeze(1)
    for rows, buffer in _chunks(part):
        torch.mul(part[rows], factor[rows].unsqueeze(1) * scale, out=buffer)
        buffer.scatter_add_(1, local[rows].unsqueeze(1), minus[rows])
        if buffer.dtype != part.dtype:
            part[rows].copy_(buffer)
    return part
