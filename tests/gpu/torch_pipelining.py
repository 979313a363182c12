"""Our executor beside `torch.distributed.pipelining`: the same model, weights, tokens and schedule in one world.

    torchrun --standalone --nproc-per-node 2 --max-restarts 8 tests/gpu/torch_pipelining.py [--device cpu --tiny]

Not collected by pytest. A Markdown row a schedule: median seconds of a step (the slower rank's) of both, theirs by
ours, peak bytes, and the last timed step's loss of both, which shows that the same was computed; where they differ
it says so. A row that fails ends the world; torchrun starts it again and the next schedule follows.

Alike: layers of each stage, micro-batches, bf16 weights from the same numbers, cuDNN attention with repeated key heads,
fused q, k, v and gate, up products, logits in bf16, fp32 masters and moments, one fused AdamW a step, no compiling.
Different: theirs runs under autograd; its gradients add up in bf16 (ours in fp32) and are widened once for the update;
its norm is torch's fused one; its loss widens the logits of a micro-batch whole (ours in chunks of 64 MiB); it makes
cos and sin tables in bf16. "interleaved zero bubble" is compared with the nearest of ours, 2bp-interleaved-fill.
"""

from __future__ import annotations

import argparse
import inspect
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.distributed import pipelining
from torch_model import LLAMA_1B, TINY, Update, loss_of
from torch_rows import Pair, chosen, parser, walk
from torch_side import Replicas, Side

from autotune.planners.lower.stage import cut_of, stage_blocks
from autotune.planners.lower.traits import micro_batches, place_of
from autotune.planners.schedules import held
from autotune.runners.job import Job
from autotune.runners.standing import Standing
from autotune.spec.plan import Plan
from autotune.spec.workload import Workload

DDP = "DistributedDataParallel"
PAIRS = {  # ours: (theirs, chunks a rank), in the order of their importance; GPipe holds most memory and comes last
    "1f1b": ("Schedule1F1B", 1),
    "interleaved-1f1b": ("ScheduleInterleaved1F1B", 2),
    "zb-v": ("ScheduleZBVZeroBubble", 2),
    "dualpipe-v": ("ScheduleDualPipeV", 2),
    "2bp-interleaved-fill": ("ScheduleInterleavedZeroBubble", 2),
    "breadth-first": ("ScheduleLoopedBFS", 2),
    "data": (DDP, 1),
    "gpipe": ("ScheduleGPipe", 1),
}


class Pipeline(Side):
    """torch.distributed.pipelining under the schedule `name`."""

    def __init__(self, job: Job, name: str, world: Standing) -> None:
        super().__init__(job, world)
        plan, model, work = job.plan, job.model, job.workload
        items = micro_batches(plan, work)
        cut = stage_blocks(model, cut_of(plan, model))
        self.stages = held(place_of(plan, items), world.rank)
        parts = [self.build(cut[stage]) for stage in self.stages]
        built = [
            pipelining.PipelineStage(part, stage, plan.stages, world.device)
            for stage, part in zip(self.stages, parts, strict=True)
        ]
        kind: Callable[..., Any] = getattr(pipelining, name)
        single = issubclass(kind, pipelining.schedules.PipelineScheduleSingle)
        loss = partial(loss_of, tokens=work.tokens)
        self.schedule = kind(built[0] if single else built, items, loss_fn=loss, scale_grads=False)
        self.update = Update([p for part in parts for p in part.parameters()], work)
        takes = inspect.signature(self.schedule.step).parameters
        self.quiet = {"return_outputs": False} if "return_outputs" in takes else {}

    def step(self, tokens: Tensor, targets: Tensor) -> float:
        losses: list[Tensor] = []
        last = self.job.plan.stages - 1 in self.stages
        given = {"target": targets, "losses": losses} if last else {}
        self.schedule.step(*((tokens,) if 0 in self.stages else ()), **given, **self.quiet)
        self.update.step()
        return float(torch.stack(losses).detach().sum()) if last else 0.0


def job_of(schedule: str, asked: argparse.Namespace, size: int) -> Job:
    """The job of one row: the shape of the suite `h200x2-schedules`, or a tiny one."""
    cuda = asked.device == "cuda"
    work = Workload(sequence_length=4096, global_batch=16, precision="bf16" if cuda else "fp32")
    if asked.tiny:
        work = replace(work, sequence_length=32, global_batch=8)
    attention = "cudnn" if cuda else "sdpa"
    if schedule == "data":
        plan = Plan(data=size, attention=attention)
    else:
        plan = Plan(pipeline=size, schedule=schedule, chunks=PAIRS[schedule][1], attention=attention)
    model = TINY if asked.tiny else LLAMA_1B
    return Job(plan, model, work, asked.steps, asked.warmup, device=asked.device, trace=False)


def pair(asked: argparse.Namespace, schedule: str, world: Standing) -> Pair:
    """One row."""
    job, theirs = job_of(schedule, asked, world.size), PAIRS[schedule][0]
    if theirs == DDP:
        return Pair(job, theirs, lambda: Replicas(job, world))
    lacks = "" if hasattr(pipelining, theirs) else f"torch {torch.__version__} has no {theirs}"
    return Pair(job, theirs, lambda: Pipeline(job, theirs, world), lacks)


def main() -> NoReturn:
    made = parser(__doc__, "--schedules", list(PAIRS))
    asked = made.parse_args()
    walk(chosen(made, "--schedules", asked.names, list(PAIRS)), partial(pair, asked), asked)


if __name__ == "__main__":
    main()
