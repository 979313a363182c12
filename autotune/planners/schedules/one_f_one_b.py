"""1F1B (PipeDream-flush, 2006.09503; Megatron-LM, 2104.04473, section 2.2).

A rank warms up with one forward for each rank after it, then alternates one forward and one backward, then drains.
Bubble (p-1)(F+BW) as GPipe's, but rank s holds only min(m, p-s) activations.
"""

from __future__ import annotations

from autotune.planners.schedules.schedule import Order, Schedule, Step


def order(ranks: int, items: int, chunks: int) -> Order:
    return [_rank(rank, ranks, items) for rank in range(ranks)]


def _rank(rank: int, ranks: int, items: int) -> list[Step]:
    warm = min(items, ranks - rank - 1)
    steps = [Step("F", rank, item) for item in range(warm)]
    for item in range(items - warm):
        steps += [Step("F", rank, warm + item), Step("BW", rank, item)]
    return steps + [Step("BW", rank, item) for item in range(items - warm, items)]


SCHEDULE = Schedule(
    order,
    makespan=lambda p, m, v: 3.0 * (m + p - 1),
    peak=lambda p, m, v: [min(m, p - rank) for rank in range(p)],
)
