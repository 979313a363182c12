"""One rank of torch's way to do a job of ours, timed as ours are; replicas of the model are the plainest of them."""

from __future__ import annotations

import statistics
import time
from abc import ABC, abstractmethod
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch_model import Rope, Update, loss_of, sequential

from autotune.runners.job import Job
from autotune.runners.mesh import barrier
from autotune.runners.rope import tables
from autotune.runners.standing import Standing
from autotune.runners.state import DTYPES
from autotune.runners.train_run import batches
from autotune.spec.graph import blocks


@dataclass(frozen=True)
class Timed:
    """Seconds of each step (the slower rank's), the larger peak in bytes, and the last step's loss."""

    seconds: list[float]
    peak: int
    loss: float

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


@dataclass(frozen=True)
class Choices:
    """What a user of torch may choose beside the way to parallelize."""

    attention: SDPBackend = SDPBackend.CUDNN_ATTENTION  # of CUDA; on a CPU there is one
    grouped: bool = False  # see torch_model.Attention
    compiled: bool = False  # torch.compile on each layer


class Side(ABC):
    """One rank of torch's way to do a job of ours. `build` makes blocks as one module."""

    def __init__(self, job: Job, world: Standing, choices: Choices = Choices()) -> None:
        self.job, self.world, self.choices = job, world, choices
        self.dtype = DTYPES[job.workload.precision]
        cos, sin = tables(job.model, job.workload.sequence_length, world.device)
        self.rope: Rope = (cos.to(self.dtype), sin.to(self.dtype))
        self.build = partial(
            sequential,
            model=job.model,
            dtype=self.dtype,
            rope=self.rope,
            grouped=choices.grouped,
            recompute=job.plan.recompute == "full",
            compiled=choices.compiled,
        )

    @abstractmethod
    def step(self, tokens: Tensor, targets: Tensor) -> float:
        """One step on this rank's sequences; this rank's part of the loss."""

    def micro_batches(self, tokens: Tensor, targets: Tensor) -> list[tuple[Tensor, Tensor]]:
        size = self.job.plan.micro_batch
        return list(zip(tokens.split(size), targets.split(size), strict=True))

    def run(self) -> Timed:
        job, device = self.job, self.world.device
        replica = self.world.rank % job.plan.data
        feed, seconds, loss = batches(job, replica), [], 0.0
        backends = sdpa_kernel([self.choices.attention]) if device.type == "cuda" else nullcontext()
        with torch.enable_grad(), backends:
            for number in range(job.warmup + job.steps):
                tokens, targets = (t.to(device) for t in next(feed)[:2])
                if device.type == "cuda" and number == job.warmup:
                    torch.cuda.reset_peak_memory_stats()
                barrier(device)
                begin = time.perf_counter()
                loss = self.step(tokens, targets)
                if device.type == "cuda":
                    torch.cuda.synchronize()
                seconds.append(time.perf_counter() - begin)
        peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else 0
        slowest = torch.tensor([*seconds[job.warmup :], float(peak)], dtype=torch.float64)
        dist.all_reduce(slowest, dist.ReduceOp.MAX)
        whole = torch.tensor(loss, dtype=torch.float64)
        dist.all_reduce(whole)
        *times, most = slowest.tolist()
        return Timed(times, int(most), float(whole))


class Replicas(Side):
    """DistributedDataParallel, its gradients summed (in their bf16) beside the last micro-batch's backward.

    Those that share sequences hold the same weights, so that they are replicas too.
    """

    def __init__(self, job: Job, world: Standing, choices: Choices = Choices()) -> None:
        super().__init__(job, world, choices)
        whole = self.build(blocks(job.model))
        devices = [world.device.index] if world.device.type == "cuda" else None
        self.model = nn.parallel.DistributedDataParallel(whole, devices, gradient_as_bucket_view=True)
        self.update = Update(list(whole.parameters()), job.workload)

    def step(self, tokens: Tensor, targets: Tensor) -> float:
        replicas = self.job.plan.replicas
        parts = self.micro_batches(tokens, targets)
        losses = []
        for number, (mine, wanted) in enumerate(parts):
            with nullcontext() if number == len(parts) - 1 else self.model.no_sync():
                # Gradients are averaged over the replicas: each takes the mean over its own tokens.
                loss = loss_of(self.model(mine), wanted, self.job.workload.tokens // replicas)
                loss.backward()
            losses.append(loss.detach() / replicas)
            del loss
        self.update.step()
        return float(torch.stack(losses).sum())
