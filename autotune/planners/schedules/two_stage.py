"""2BP (2405.18047): the usual schedules with the weight gradients after a rank's last input gradient, or in its waits.

A rank holds every micro-batch until the end, as GPipe does. At unit cost the step is the schedule's own with B for
its backward, and then the weight gradients of the first rank, whose last B comes last. At the end the W's of a stage
stand side by side: with `weight_gradients` "joined" they are one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from autotune.planners.schedules import gpipe, interleaved, one_f_one_b, zero_bubble
from autotune.planners.schedules.schedule import Order, Pipe, Schedule
from autotune.planners.schedules.split import Placement, split


def _order(base: Schedule, placement: Placement) -> Callable[[Pipe], Order]:
    return lambda pipe: split(base.order(pipe), placement, pipe)


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
