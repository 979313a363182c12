"""Probe: matrix products, from one row (decode) to thousands (training), in the three forms of a linear layer.

Weights and their gradients are rotated through more memory than the cache holds, since a step meets each once;
activations are not, since the operation before has just written them. Outputs are allocated each time, as the
executor's are; a weight gradient in fp32 adds to its accumulator in place.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F

from autotune.profiles_db.probes.crew import Crew
from autotune.profiles_db.probes.grid import Setting, spread_out
from autotune.profiles_db.probes.pool import DTYPES
from autotune.profiles_db.probes.timing import Trial
from autotune.spec.work import Matmul

# Features of the layers that a grid covers. Between them a price is interpolated, so they reach from the smallest
# model that trains on the device to the largest vocabulary projection.
CPU_WIDTHS = (128, 512, 2048)
CPU_ROWS = (1, 4, 16, 64, 256, 1024)
CUDA_WIDTHS = (1024, 4096, 14336)
CUDA_WIDTHS_FULL = (512, 1024, 2048, 4096, 8192, 14336)
CUDA_ROWS = (1, 8, 32, 128, 512, 2048, 8192)
CUDA_ROWS_FULL = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)

ALPHA = 1e-6  # keeps an accumulator finite over many additions; a product costs the same with any factor


def _forms(m: int, n: int, k: int, dtype: str, training_rows: int) -> Iterator[Matmul]:
    """One linear layer of k inputs and n outputs on m tokens: forward, and both gradients where it could train."""
    yield Matmul(m, k, n, dtype)
    if m >= training_rows:
        yield Matmul(m, n, k, dtype, "dgrad")
        yield Matmul(n, m, k, dtype, "wgrad")


def works(setting: Setting) -> list[Matmul]:
    """The grid, most telling shapes first: the extremes and the middle of each axis, then what lies between."""
    if setting.device == "cuda":
        widths: tuple[int, ...] = CUDA_WIDTHS if setting.quick else CUDA_WIDTHS_FULL
        rows: tuple[int, ...] = CUDA_ROWS if setting.quick else CUDA_ROWS_FULL
        peaks = [Matmul(s, s, s, "bf16") for s in (8192, 4096)] + [Matmul(4096, 4096, 4096, "fp32")]
        dtype, training = "bf16", 512
        vocabulary = [(m, 128256, 4096) for m in (1, 32, 2048)]
    else:
        widths = CPU_WIDTHS if setting.quick else (64, 128, 256, 512, 1024, 2048)
        rows = CPU_ROWS if setting.quick else (*CPU_ROWS, 2048)
        peaks = [Matmul(1024, 1024, 1024, "fp32"), Matmul(1024, 1024, 1024, "bf16")]
        dtype, training = "fp32", 64
        vocabulary = [(m, 16384, 256) for m in (1, 256)] + ([] if setting.quick else [(64, 32768, 512)])
    grid = [
        work
        for m, n, k in spread_out(rows, widths, widths)
        for work in _forms(m, n, k, dtype, training)
        if setting.device == "cuda" or work.flops < 5e9 or not setting.quick
    ]
    heads = [work for shape in vocabulary for work in _forms(*shape, dtype, training)]
    return list(dict.fromkeys([*peaks, *grid, *heads]))


def prepare(work: Matmul, crew: Crew) -> Trial:
    """fwd: linear(x (m,k), W (n,k)); dgrad: dy (m,k) @ W (k,n); wgrad: dy (k,m)^T @ x (k,n); `batch` of each."""
    dtype, pool = DTYPES[work.dtype], crew.pool
    lead = (work.batch,) if work.batch > 1 else ()
    if work.form == "wgrad":
        dy, x = pool.take((*lead, work.k, work.m), dtype), pool.take((*lead, work.k, work.n), dtype)
        if lead or dtype.itemsize < 4:  # narrow gradients are summed in fp32 afterwards: "accumulate" is that
            return Trial(lambda i: torch.matmul(dy.mT, x))
        totals = pool.targets((work.m, work.n), dtype)
        return Trial(lambda i: totals[i % len(totals)].addmm_(dy.t(), x, alpha=ALPHA))
    x = pool.take((*lead, work.m, work.k), dtype)
    if work.form == "dgrad":
        weights = pool.rotation((*lead, work.k, work.n), dtype)
        return Trial(lambda i: torch.matmul(x, weights[i % len(weights)]))
    weights = pool.rotation((*lead, work.n, work.k), dtype)
    if lead:
        return Trial(lambda i: torch.matmul(x, weights[i % len(weights)].mT))
    return Trial(lambda i: F.linear(x, weights[i % len(weights)]))
