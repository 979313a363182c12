"""Probe: copies to and from the host at once, by all devices: how many of them its memory and the ways to it carry.

Each direction is first timed alone, on all devices at once, then both together; see `interference.slowdowns` for those
that end first. The shares that the copies get then add up to how many run at full speed.
"""

from __future__ import annotations

import statistics
from typing import Any

import torch

from autotune.profiles_db.probes.crew import Crew
from autotune.profiles_db.probes.interference import slowdowns

SIZE = 256 << 20  # bytes of a copy
COPIES, ROUNDS = 4, 3


def copies_at_once(crew: Crew) -> float:
    """Copies at full speed, of two for each rank of the crew, which is on accelerators. At most that many."""
    cuda: Any = torch.cuda  # untyped in torch
    host = [torch.empty(SIZE, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
    device = [torch.empty(SIZE, dtype=torch.uint8, device=crew.place) for _ in range(2)]
    pairs = ((device[0], host[0]), (host[1], device[1]))  # (target, source): up, down
    streams = [cuda.Stream() for _ in pairs]

    def run(*which: int) -> list[float]:
        crew.barrier()
        ends = []
        for way in which:
            begin, end = cuda.Event(enable_timing=True), cuda.Event(enable_timing=True)
            begin.record(streams[way])
            with cuda.stream(streams[way]):
                for _ in range(COPIES):
                    pairs[way][0].copy_(pairs[way][1], non_blocking=True)
            end.record(streams[way])
            ends.append((begin, end))
        torch.cuda.synchronize()
        return [float(begin.elapsed_time(end)) for begin, end in ends]

    run(0, 1)
    found = []
    for _ in range(ROUNDS):
        up, down = run(0)[0], run(1)[0]
        found.append(sum(1 / slow for slow in slowdowns(up, down, *run(0, 1))))
    return float(sum(rank[0] for rank in crew.gather([statistics.median(found)])))
