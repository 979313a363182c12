"""Pipeline schedules: each a pure function that gives an order. A new one is one file and one line here."""

from __future__ import annotations

from autotune.planners.schedules import gpipe, interleaved, one_f_one_b
from autotune.planners.schedules.schedule import Schedule, Step, linear

SCHEDULES: dict[str, Schedule] = {
    "gpipe": gpipe.SCHEDULE,
    "1f1b": one_f_one_b.SCHEDULE,
    "interleaved-1f1b": interleaved.SCHEDULE,
}

__all__ = ["SCHEDULES", "Schedule", "Step", "linear"]
