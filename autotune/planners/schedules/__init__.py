"""Pipeline schedules: each a pure function that gives an order. A new one is one file and one line here."""

from __future__ import annotations

from autotune.planners.schedules import bitpipe, chimera, dualpipe, dualpipe_v, gpipe, interleaved, one_f_one_b, text
from autotune.planners.schedules.schedule import Order, Pipe, Place, Schedule, Step, held, linear, wave

SCHEDULES: dict[str, Schedule] = {
    "given": text.SCHEDULE,
    "gpipe": gpipe.SCHEDULE,
    "1f1b": one_f_one_b.SCHEDULE,
    "interleaved-1f1b": interleaved.SCHEDULE,
    "chimera": chimera.SCHEDULE,
    "bitpipe": bitpipe.SCHEDULE,
    "dualpipe": dualpipe.SCHEDULE,
    "dualpipe-v": dualpipe_v.SCHEDULE,
}

__all__ = ["SCHEDULES", "Order", "Pipe", "Place", "Schedule", "Step", "held", "linear", "wave"]
