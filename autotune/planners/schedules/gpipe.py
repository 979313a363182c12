"""GPipe (Huang et al., 1811.06965): all forwards, then all backwards. Bubble (p-1)(F+BW), m activations a rank."""

from __future__ import annotations

from autotune.planners.schedules.schedule import Order, Pipe, Schedule, Step


def order(pipe: Pipe) -> Order:
    items = range(pipe.items)
    return [
        [Step("F", rank, item) for item in items] + [Step("BW", rank, item) for item in items]
        for rank in range(pipe.ranks)
    ]


SCHEDULE = Schedule(
    order,
    makespan=lambda pipe: 3.0 * (pipe.items + pipe.ranks - 1),
    peak=lambda pipe: [pipe.items] * pipe.ranks,
)
