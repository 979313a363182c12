"""GPipe (Huang et al., 1811.06965): all forwards, then all backwards. Bubble (p-1)(F+BW), m activations a rank."""

from __future__ import annotations

from autotune.planners.schedules.schedule import Order, Schedule, Step


def order(ranks: int, items: int, chunks: int) -> Order:
    forwards = [[Step("F", rank, item) for item in range(items)] for rank in range(ranks)]
    return [steps + [Step("BW", rank, item) for item in range(items)] for rank, steps in enumerate(forwards)]


SCHEDULE = Schedule(
    order,
    makespan=lambda p, m, v: 3.0 * (m + p - 1),
    peak=lambda p, m, v: [m] * p,
)
