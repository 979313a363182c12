"""A training run as a worker does it: check, warm up, time, save, measure memory, trace."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import torch

from autotune.runners.check import check_step
from autotune.runners.corpus import open_corpus
from autotune.runners.data import batch
from autotune.runners.interpreter import Trace
from autotune.runners.job import Job, RankReport
from autotune.runners.kernels import NAME, record_kernels
from autotune.runners.memory import peak_during
from autotune.runners.mesh import barrier
from autotune.runners.rows import Batch, prepared
from autotune.runners.save import save_weights
from autotune.runners.state import Loader
from autotune.runners.training import Trainer


def batches(job: Job, data: int) -> Iterator[Batch]:
    """This replica's part of every global batch, from real text."""
    corpus = open_corpus(job.workload.data, job.model.vocab)
    each = job.workload.global_batch // job.plan.data
    step = 0
    while True:
        text = batch(corpus, step, job.workload.global_batch, job.workload.sequence_length, data * each, each)
        yield prepared(job.model, job.workload, Batch(*text), step)
        step += 1


def train_run(
    job: Job, rank: int, device: torch.device, load: Loader, folder: Path, load_target: Loader | None = None
) -> RankReport:
    """Steps are timed one by one between barriers' ends; the slowest rank's time is the step's (see launch).

    What is saved has taken the steps whose losses are reported. Memory and timeline are those of two steps more.
    """
    trainer = Trainer.build(job.plan, job.model, job.workload, rank, device, load, load_target)
    feed = batches(job, trainer.mesh.data)
    losses: list[float] = []

    def step(trace: Trace | None = None) -> float:
        trainer.feed(next(feed))
        barrier(device)
        begin = time.perf_counter()
        trainer.interpreter.step(trace)
        seconds = time.perf_counter() - begin
        losses.append(float(trainer.interpreter.values.get("loss", 0.0)))
        return seconds

    equal, difference = check_step(job, rank, trainer, feed, folder, losses) if job.check else (None, None)
    for _ in range(job.warmup):
        step()
    seconds = [step() for _ in range(job.steps)]
    if job.saved:
        save_weights(trainer, job.saved, load, folder)
    peak = peak_during(step, trainer.interpreter.values, device)
    trace = Trace()
    if job.trace:
        step(trace)
    if job.kernels:
        record_kernels(step, device, None if rank else folder / NAME)
    trainer.finish()
    trainer.mesh.close()
    return RankReport(
        rank,
        seconds,
        peak,
        losses[: int(job.check) + job.warmup + job.steps],
        trace.spans,
        trace.memory,
        equal=equal,
        max_difference=difference,
        host={"threads": torch.get_num_threads(), "torch": torch.__version__, "device": str(device)},
    )
