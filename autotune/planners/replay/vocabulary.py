"""Vocabulary parallelism's utilisation and peak memory on 8 GPUs (2411.05288, table 5).

1F1B on 8 A100, 32 layers of 3072, sequences of 2048, 128 micro-batches of one. Not expressed: `redis` (its rows are not
among the figures at hand).
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from autotune.planners.costs.works import model_flops
from autotune.planners.replay.machine import A100, A100_FLOPS, gpt, predicted, telling
from autotune.planners.replay.row import Row, Table
from autotune.spec.model import ModelSpec
from autotune.spec.plan import Plan
from autotune.spec.prediction import Prediction
from autotune.spec.workload import Workload

RANKS = 8
WORK = Workload(sequence_length=2048, global_batch=128)
SIZES = (32, 64, 128, 256)  # thousands (of 1024) of tokens
# (the paper's name, our axis, MFU in percent by size, peak GB of the fullest rank by size)
PUBLISHED = (
    ("baseline", "ends", (46.16, 40.48, 33.11, 25.23), (14.86, 16.32, 19.25, 25.64)),
    ("vocab-1", "vocab-1", (50.42, 50.28, 49.93, 50.12), (15.63, 16.02, 16.84, 18.59)),
    ("vocab-2", "vocab-2", (50.23, 50.18, 49.82, 49.69), (14.83, 15.23, 16.04, 17.78)),
    ("interlaced", "interlaced", (51.18, 50.94, 50.97, 50.92), (17.20, 17.57, 18.43, 20.17)),
)


def model(size: int) -> ModelSpec:
    return gpt("gpt-4b", 32, 3072, 24, size * 1024)


def step(axis: str, size: int) -> Prediction:
    return predicted(model(size), WORK, Plan(pipeline=RANKS, vocabulary=axis, attention="flash"))


def utilisation(size: int, said: Prediction) -> float:
    """MFU in percent."""
    flops = model_flops(model(size), WORK.global_batch, WORK.sequence_length)
    return 100 * flops / (said.step_s * RANKS * A100_FLOPS)


def peak(size: int, said: Prediction) -> float:
    """GiB (as which the paper's "GB" is read) handed out by the allocator on the fullest rank."""
    return max(said.peak_bytes) / 2**30


def rows() -> Iterator[Row]:
    for name, axis, rates, memories in PUBLISHED:
        for metric, values, ours in (("MFU %", rates, utilisation), ("peak GiB", memories, peak)):
            for size, value in zip(SIZES, values, strict=True):
                told = telling(partial(step, axis, size), partial(ours, size))
                yield Row("2411.05288, table 5", f"p=8 V={size}k", name, metric, value, *told)


TABLE = Table("Vocabulary parallelism", f"8 x shipped profile {A100}", True, rows)
