"""Pipeline schedules: each a pure function that gives an order. A new one is one file and one line here."""

from __future__ import annotations

from autotune.planners.schedules import (
    automatic,
    bitpipe,
    breadth_first,
    chimera,
    dualpipe,
    dualpipe_v,
    gis,
    gpipe,
    hanayo,
    interleaved,
    one_f_one_b,
    solved,
    text,
    two_stage,
    zero_bubble,
    zero_bubble_v,
    zeropp,
)
from autotune.planners.schedules import controllable_memory as v
from autotune.planners.schedules.schedule import Order, Pipe, Place, Schedule, Step, held, linear, wave
from autotune.planners.schedules.split import PLACEMENTS

SCHEDULES: dict[str, Schedule] = {
    "given": text.SCHEDULE,
    "gpipe": gpipe.SCHEDULE,
    "1f1b": one_f_one_b.SCHEDULE,
    "interleaved-1f1b": interleaved.SCHEDULE,
    "chimera": chimera.SCHEDULE,
    "bitpipe": bitpipe.SCHEDULE,
    "dualpipe": dualpipe.SCHEDULE,
    "dualpipe-v": dualpipe_v.SCHEDULE,
    "zb-h1": zero_bubble.H1,
    "zb-h2": zero_bubble.H2,
    "zb-auto": automatic.SCHEDULE,
    "zb-v": zero_bubble_v.SCHEDULE,
    "2bp-gpipe": two_stage.GPIPE,
    "2bp-1f1b": two_stage.ONE_F_ONE_B,
    "2bp-interleaved": two_stage.INTERLEAVED,
    "2bp-1f1b-fill": two_stage.ONE_F_ONE_B_FILL,
    "2bp-interleaved-fill": two_stage.INTERLEAVED_FILL,
    "breadth-first": breadth_first.SCHEDULE,
    "gis": gis.GIS,
    "gis-h": gis.GIS_H,
    "v-min": v.V_MIN,
    "v-half": v.V_HALF,
    "v-zb": v.V_ZB,
    "hanayo": hanayo.SCHEDULE,
    "zeropp": zeropp.SCHEDULE,
    "solved": solved.SCHEDULE,
}

OWN = "own"  # the `split` of a plan whose schedule says how backwards are split


def schedule_of(name: str, split: str = OWN) -> Schedule:
    """The entry of a schedule, with whole backwards split where that is asked for. It must have such."""
    entry = SCHEDULES[name]
    return entry if split == OWN else two_stage.in_two_stages(entry, PLACEMENTS[split])


__all__ = [
    "OWN",
    "PLACEMENTS",
    "SCHEDULES",
    "Order",
    "Pipe",
    "Place",
    "Schedule",
    "Step",
    "held",
    "linear",
    "schedule_of",
    "wave",
]
