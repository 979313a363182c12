"""1F1B (PipeDream-flush, 2006.09503; Megatron-LM, 2104.04473, section 2.2).

A rank warms up with one forward for each rank after it, then alternates one forward and one backward, then drains.
Bubble (p-1)(F+BW) as GPipe's, but rank s holds only min(m, p-s) activations.
"""

from __future__ import annotations

from autotune.planners.schedules.schedule import Order, Pipe, Schedule, Step


def order(pipe: Pipe) -> Order:
    return [_rank(rank, pipe.ranks, pipe.items) for rank in range(pipe.ranks)]


def _rank(rank: int, ranks: int, items: int) -> list[Step]:
    warm = min(items, ranks - rank - 1)
    steps = [Step("F", rank, item) for item in range(warm)]
    for item in range(items - warm):
        steps += [Step("F", rank, warm + item), Step("BW", rank, item)]
    return steps + [Step("BW", rank, item) for item in range(items - warm, items)]


SCHEDULE = Schedule(
    order,
    makespan=lambda pipe: 3.0 * (pipe.items + pipe.ranks - 1),
    peak=lambda pipe: [min(pipe.items, pipe.ranks - rank) for rank in range(pipe.ranks)],
)
