"""Pipeline schedules: each a pure function that gives an order. A new one is one file and one line here."""

from __future__ import annotations

from autotune.planners.schedules import breadth_first, gis, gpipe, hanayo, interleaved, one_f_one_b, zeropp
from autotune.planners.schedules import controllable_memory as v
from autotune.planners.schedules.schedule import Order, Pipe, Place, Schedule, Step, held, linear, wave

SCHEDULES: dict[str, Schedule] = {
    "gpipe": gpipe.SCHEDULE,
    "1f1b": one_f_one_b.SCHEDULE,
    "interleaved-1f1b": interleaved.SCHEDULE,
    "breadth-first": breadth_first.SCHEDULE,
    "gis": gis.GIS,
    "gis-h": gis.GIS_H,
    "v-min": v.V_MIN,
    "v-half": v.V_HALF,
    "v-zb": v.V_ZB,
    "hanayo": hanayo.SCHEDULE,
    "zeropp": zeropp.SCHEDULE,
}

__all__ = ["SCHEDULES", "Order", "Pipe", "Place", "Schedule", "Step", "held", "linear", "wave"]
