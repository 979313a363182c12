"""2BP (2405.18047): the usual schedules with the weight gradients after a rank's last input gradient, or in its waits.

A rank holds every micro-batch until the end, as GPipe does. At unit cost the step is the schedule's own with B for
its backward, and then the weight gradients of the first rank, whose last B comes last. At the end the W's of a stage
stand side by side: with `weight_gradients` "joined" they are one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache

from autotune.planners.schedules import gpipe, interleaved, one_f_one_b, zero_bubble
from autotune.planners.schedules.schedule import Order, Pipe, Schedule
from autotune.planners.schedules.split import Placement, split


def _order(base: Schedule, placement: Placement) -> Callable[[Pipe], Order]:
    return lambda pipe: split(base.order(pipe), placement, pipe)


@lru_cache(maxsize=256)
def in_two_stages(base: Schedule, placement: Placement) -> Schedule:
    """Any schedule of whole backwards with B and W for each, and the W's placed. Its closed forms: activations that
    end with their W as they ended with their BW, or all that a rank has."""

    def every(pipe: Pipe) -> list[int]:
        place = base.place(pipe)
        return [sum(pipe.items // len(ranks) for ranks in place if rank in ranks) for rank in range(pipe.ranks)]

    peaks = {"immediate": base.peak, "fill": None, "end": every}
    return replace(
        base,
        order=_order(base, placement),
        splits=True,
        makespan=None,
        peak=peaks[placement],
        row=(lambda pipe: pipe.items // len(base.place(pipe)[0])) if placement == "end" else None,
        timed=base.timed or placement == "fill",
    )


def _end(base: Schedule) -> Schedule:
    return replace(
        base,
        order=_order(base, "end"),
        splits=True,
        makespan=lambda pipe: 3.0 * pipe.items * pipe.chunks + 2 * (pipe.ranks - 1),
        peak=lambda pipe: [pipe.items * pipe.chunks] * pipe.ranks,
        row=lambda pipe: pipe.items,
    )


def _fill(base: Schedule, makespan: Callable[[Pipe], float]) -> Schedule:
    return replace(base, order=_order(base, "fill"), makespan=makespan, peak=None, splits=True, timed=True)


GPIPE = _end(gpipe.SCHEDULE)
ONE_F_ONE_B = _end(one_f_one_b.SCHEDULE)
INTERLEAVED = _end(interleaved.SCHEDULE)
# GPipe has no such entry: with equal stages its ranks wait only before the first B, when there is no W yet.
ONE_F_ONE_B_FILL = _fill(one_f_one_b.SCHEDULE, zero_bubble.makespan)
INTERLEAVED_FILL = _fill(interleaved.SCHEDULE, lambda pipe: 3.0 * pipe.items * pipe.chunks + pipe.ranks - 1)
