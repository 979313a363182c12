"""Who measures: one process alone, or several that do the same work at the same time and agree on how often.

Control (agreeing, gathering, barriers) always goes over the host, so that it never shares a queue with what is timed.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from autotune.kernels.few_blocks import few_blocks
from autotune.profiles_db.probes.pace import Pace
from autotune.profiles_db.probes.pool import Pool


@dataclass
class Crew:
    """`rank` of `world` measuring processes on `device` ("cpu" or "cuda"); a world of one needs no process group."""

    device: str = "cpu"
    rank: int = 0
    world: int = 1
    pool: Pool = field(init=False)
    groups: dict[tuple[int, bool], Any] = field(default_factory=dict)
    pace: Pace = field(init=False)

    def __post_init__(self) -> None:
        self.pool = Pool(self.device)
        self.pace = Pace(self.device)

    @property
    def place(self) -> torch.device:
        return torch.device(self.device, torch.cuda.current_device()) if self.device == "cuda" else torch.device("cpu")

    def synchronize(self) -> None:
        """Waits until the device has done everything that was issued to it."""
        if self.device == "cuda":
            torch.cuda.synchronize()

    def tidy(self) -> None:
        """Gives memory that is cached but unused back to the device: the next probe may want it in other pieces."""
        if self.device == "cuda":
            torch.cuda.empty_cache()

    def barrier(self) -> None:
        """Returns once every rank has called it."""
        if self.world > 1:
            dist.all_reduce(torch.zeros(1))

    def agree(self, values: list[float]) -> list[float]:
        """Rank 0's `values`, on every rank."""
        if self.world == 1:
            return values
        shared = torch.tensor(values, dtype=torch.float64)
        dist.broadcast(shared, src=0)
        return [float(v) for v in shared]

    def gather(self, values: list[float]) -> list[list[float]]:
        """Every rank's `values` (equally many), in rank order, on every rank."""
        if self.world == 1:
            return [values]
        mine = torch.tensor(values, dtype=torch.float64)
        parts = [torch.empty_like(mine) for _ in range(self.world)]
        dist.all_gather(parts, mine)
        return [[float(v) for v in part] for part in parts]

    def block(self, size: int, few: bool = False) -> Any:
        """The process group of the `size` neighbouring ranks this one belongs to; None for a rank left over. `few`: one
        whose collectives get few thread blocks, where the device has such.

        Ranks 0..size-1 are one block, the next `size` another. Every rank must ask for the same sizes in the same
        order, since making a group is itself a collective.
        """
        options = few_blocks(self.device) if few else None
        if size == self.world and options is None:
            return dist.group.WORLD
        key = size, options is not None
        if key not in self.groups:
            self.groups[key] = None
            for first in range(0, self.world - size + 1, size):
                members = list(range(first, first + size))
                group = dist.new_group(members, pg_options=options)
                if self.rank in members:
                    self.groups[key] = group
        return self.groups[key]


def join(device: str, rank: int, world: int, rendezvous: str, timeout_s: float) -> Crew:
    """Joins a process group of `world` ranks on this host and returns the crew: gloo, and NCCL beside it on "cuda".

    `rendezvous` is a torch.distributed init method, e.g. file:///path; a collective that hangs fails after `timeout_s`.
    """
    from datetime import timedelta

    if os.path.exists("/sys/class/net/lo"):  # one host: a name that does not resolve must not matter
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    if device == "cuda":
        torch.cuda.set_device(rank)
    backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
    limit = timedelta(seconds=timeout_s)
    dist.init_process_group(backend, init_method=rendezvous, rank=rank, world_size=world, timeout=limit)
    return Crew(device, rank, world)
