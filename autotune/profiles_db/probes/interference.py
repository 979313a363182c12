"""Probe: how much slower compute and communication get while they run at the same time.

Both loops are first timed alone, at lengths about equal, then together. The one that ends first was overlapped all its
life: its slowdown is direct. The other ran free for the rest, which is taken out before its slowdown is formed.
"""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F

from autotune.profiles_db.probes.crew import Crew
from autotune.profiles_db.probes.pool import DTYPES
from autotune.spec.machine import Interference

ROUNDS = 3


@dataclass(frozen=True)
class Loops:
    """One step of each loop. `communicate` returns a handle whose wait() ends when the collective has."""

    compute: Callable[[], Any]
    communicate: Callable[[], Any]


def slowdowns(
    compute: float, communication: float, both_compute: float, both_communication: float
) -> tuple[float, float]:
    """Slowdown of each (at least 1) from seconds alone and seconds until each ended when both started at once."""

    def longer(alone: float, ended: float, first_end: float) -> float:
        overlapped = alone - (ended - first_end)  # what it got done, in seconds of running alone
        return first_end / overlapped if overlapped > 0 else 1.0

    if both_compute <= both_communication:
        pair = both_compute / compute, longer(communication, both_communication, both_compute)
    else:
        pair = longer(compute, both_compute, both_communication), both_communication / communication
    return max(1.0, pair[0]), max(1.0, pair[1])


def _loops(crew: Crew, size: int, side: int) -> Loops:
    dtype = DTYPES["bf16" if crew.device == "cuda" else "fp32"]
    x = crew.pool.take((side, side), dtype)
    weights = [crew.pool.take((side, side), dtype) for _ in range(4)]
    message = crew.pool.fresh((size // dtype.itemsize,), dtype).mul_(1e-3)
    turn = iter(range(1 << 62))

    def compute() -> torch.Tensor:
        return F.linear(x, weights[next(turn) % 4])

    return Loops(compute, lambda: dist.all_reduce(message, async_op=True))


def _on_host(loops: Loops, computes: int, communications: int) -> tuple[float, float]:
    """Seconds until each loop ended, both started at once; either may be empty (0 steps)."""
    ended = [0.0]
    start = time.perf_counter()

    def talk() -> None:
        for _ in range(communications):
            loops.communicate().wait()
        ended[0] = time.perf_counter() - start

    thread = threading.Thread(target=talk)
    thread.start()
    for _ in range(computes):
        loops.compute()
    compute_s = time.perf_counter() - start
    thread.join()
    return compute_s, ended[0]


def _on_device(loops: Loops, computes: int, communications: int) -> tuple[float, float]:
    cuda: Any = torch.cuda  # untyped in torch
    events = [cuda.Event(enable_timing=True) for _ in range(3)]
    main, side = torch.cuda.current_stream(), cuda.Stream()
    torch.cuda.synchronize()
    cuda._sleep(20_000_000)  # long enough to issue both loops behind it
    events[0].record(main)
    side.wait_event(events[0])
    with torch.cuda.stream(side):
        for _ in range(communications):
            loops.communicate().wait()
        events[2].record(side)
    for _ in range(computes):
        loops.compute()
    events[1].record(main)
    torch.cuda.synchronize()
    return float(events[0].elapsed_time(events[1])) * 1e-3, float(events[0].elapsed_time(events[2])) * 1e-3


def measure_interference(crew: Crew, seconds: float, size: int = 0, side: int = 0) -> Interference:
    """The medians of a few rounds, over the whole world, in about `seconds`. size: bytes reduced; side: of the product.

    Needs a crew of at least two. The result is at least 1 in both directions.
    """
    on_cuda = crew.device == "cuda"
    run = _on_device if on_cuda else _on_host
    loops = _loops(crew, size or (64 << 20 if on_cuda else 4 << 20), side or (4096 if on_cuda else 384))
    length = min(seconds / (4 * ROUNDS), 0.02 if on_cuda else 1.0)
    counts = []
    for probe in ((3, 0), (0, 3)):
        run(loops, *probe)
        crew.barrier()
        spent = max(run(loops, *probe)[0 if probe[0] else 1] / 3, 1e-6)
        counts.append(max(2.0, min(200.0, length / spent)))
    computes, communications = (int(c) for c in crew.agree(counts))
    found = []
    for _ in range(ROUNDS):
        times = []
        for pair in ((computes, 0), (0, communications), (computes, communications)):
            crew.barrier()
            times.append(run(loops, *pair))
        alone = times[0][0], times[1][1]
        found.append(slowdowns(*alone, *times[2]))
    mine = [statistics.median(pair[side] for pair in found) for side in (0, 1)]
    everyone = crew.gather(mine)
    compute, communication = (statistics.fmean(rank[side] for rank in everyone) for side in (0, 1))
    return Interference(compute, communication, crew.world)
