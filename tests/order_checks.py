"""What every pipeline order must be: complete, with the steps of a stage on its rank, and in an order that can run."""

from __future__ import annotations

from collections import Counter

from autotune.planners.schedules import SCHEDULES, Order, Pipe
from autotune.planners.schedules.timing import Timing, peaks, timed


def checked(name: str, pipe: Pipe) -> tuple[Order, Timing, list[float]]:
    """A legal pipe's order, its timing at unit cost and each rank's peak, after all that holds for any schedule."""
    schedule = SCHEDULES[name]
    assert schedule.refuse(pipe) is None
    order = schedule.order(pipe)
    assert len(order) == pipe.ranks
    place = schedule.place(pipe)
    seen: Counter[tuple[str, int, int]] = Counter()
    for rank, steps in enumerate(order):
        for op, stage, item in steps:
            assert rank in place[stage]
            if op in ("B", "BW"):
                assert seen["F", stage, item]
            if op == "W":
                assert seen["B", stage, item]
            seen[op, stage, item] += 1
    for stage in range(pipe.stages):
        for item in range(pipe.items):
            assert seen["F", stage, item] == 1
            assert (seen["B", stage, item], seen["W", stage, item], seen["BW", stage, item]) in ((1, 1, 0), (0, 0, 1))
    assert sum(seen.values()) == sum(map(len, order))
    timing, held = timed(order, pipe), peaks(order)
    if schedule.makespan is not None and (makespan := schedule.makespan(pipe)) is not None:
        assert timing.makespan == makespan
    if schedule.peak is not None and (peak := schedule.peak(pipe)) is not None:
        assert held == peak
    return order, timing, held
