"""Pipeline schedules: each a pure function that gives an order. A new one is one file and one line here."""

from __future__ import annotations

from autotune.planners.schedules import gpipe, interleaved, one_f_one_b, solved
from autotune.planners.schedules.schedule import Order, Pipe, Place, Schedule, Step, held, linear, wave

SCHEDULES: dict[str, Schedule] = {
    "gpipe": gpipe.SCHEDULE,
    "1f1b": one_f_one_b.SCHEDULE,
    "interleaved-1f1b": interleaved.SCHEDULE,
    "solved": solved.SCHEDULE,
}

__all__ = ["SCHEDULES", "Order", "Pipe", "Place", "Schedule", "Step", "held", "linear", "wave"]
