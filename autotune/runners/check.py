"""`--check`: one step beside the one-process reference, on the same batch and the same weights.

Bounds are relative L2 distances of a gradient tensor, or of the loss. fp32 is compared with an fp64 reference, bf16
with an fp32 reference on the same rounded weights: then the bound is bf16's own rounding through the depth of the
model (8 bits of mantissa: 0.4 % an operation).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from autotune.runners.checkpoint import open_checkpoint
from autotune.runners.corpus import open_corpus
from autotune.runners.data import batch
from autotune.runners.job import Job
from autotune.runners.pieces import gathered
from autotune.runners.reference import init_weight, init_weights, reference_gradients, with_target
from autotune.runners.rows import Batch, prepared
from autotune.runners.state import DTYPES, Key
from autotune.runners.training import Trainer
from autotune.spec.heads import HeadsSpec
from autotune.spec.program import Instruction

BOUNDS = {"fp64": 1e-10, "fp32": 2e-4, "bf16": 5e-2}
REFERENCE = {"fp64": torch.float64, "fp32": torch.float64, "bf16": torch.float32}


def capture(trainer: Trainer, found: dict[Key, torch.Tensor]) -> Any:
    """A hook that copies every gradient just before the optimizer takes it, whole over the data ranks."""

    def hook(instruction: Instruction, values: Mapping[str, Any]) -> None:
        grad = trainer.states[instruction.stage].grad
        for key, gradient in trainer.whole(instruction.stage, grad).items():
            found[key] = gradient.to("cpu", copy=True)

    return hook


def check_step(
    job: Job, rank: int, trainer: Trainer, feed: Iterator[Batch], folder: Path, losses: list[float]
) -> tuple[bool | None, float | None]:
    """Runs the first step and compares; every rank hands in its gradients, rank 0 judges."""
    found: dict[Key, torch.Tensor] = {}
    trainer.interpreter.hooks = {"OPT": capture(trainer, found)}
    trainer.feed(next(feed))
    trainer.interpreter.step()
    trainer.interpreter.hooks = {}
    loss = trainer.interpreter.values.get("loss", torch.zeros((), device=trainer.mesh.device)).detach().clone()
    losses.append(float(loss))
    total = torch.tensor([float(loss)], dtype=torch.float64)
    dist.all_reduce(total)
    whole = gathered(trainer, found, folder, "gradients")
    if whole is None:
        return None, None
    return judge(job, float(total) / job.plan.tensor, trainer.mesh.device, whole)


def judge(job: Job, loss: float, device: torch.device, whole: Mapping[Key, torch.Tensor]) -> tuple[bool, float]:
    """(within bounds, the largest relative difference) of the whole gradients and the loss."""
    dtype = REFERENCE[job.workload.precision]
    weights = init_weights(job.model, job.seed, DTYPES[job.workload.precision])
    if job.checkpoint:
        weights = open_checkpoint(job.checkpoint).whole(
            job.model, DTYPES[job.workload.precision], lambda weight, dtype: init_weight(weight, job.seed, dtype)
        )
    if isinstance(job.model, HeadsSpec) and job.model.target:
        target = init_weights(job.model.target, job.seed, DTYPES[job.workload.precision])
        if job.target_checkpoint:
            target = open_checkpoint(job.target_checkpoint).whole(job.model.target, DTYPES[job.workload.precision])
        weights = with_target(job.model, weights, target, begin=not job.checkpoint)
    corpus = open_corpus(job.workload.data, job.model.vocab)
    size = job.workload.global_batch
    text = Batch(*batch(corpus, 0, size, job.workload.sequence_length, 0, size))
    tokens, targets, rows = prepared(job.model, job.workload, text, 0)
    moved = {id(w): w.to(device) for w in weights.values()}
    weights = {key: moved[id(w)] for key, w in weights.items()}
    with torch.enable_grad():
        expected, gradients = reference_gradients(
            job.model, weights, tokens.to(device), targets.to(device), dtype, rows
        )
    worst = abs(loss - float(expected)) / abs(float(expected))
    for key, gradient in whole.items():
        ours, theirs = gradient.to(device, dtype), gradients[key].to(dtype)
        worst = max(worst, float((ours - theirs).norm() / theirs.norm().clamp_min(1e-30)))
    return worst <= BOUNDS[job.workload.precision], worst
