"""Chimera (Li and Hoefler, 2107.06925): two model replicas, half of the micro-batches down the ranks and half up.

Bubbles (D-2)/(2N+D-2) of the time where BW = F and, for N = D, (D-2)/(1.5N+D-2) where BW = 2F: about half of 1F1B's.
Weights twice, and the gradients of a stage's two replicas must be summed; activations D/2+1 at the ends and D in the
middle. More than D micro-batches: units of D (`group` D) or of 2D (twice the activations, fewer bubbles).
"""

from __future__ import annotations

from autotune.planners.schedules import units
from autotune.planners.schedules.schedule import Schedule

SCHEDULE = Schedule(
    units.order,
    place=units.place,
    refuse=lambda pipe: units.refuse(pipe, 1),
    makespan=units.makespan,
    peak=units.peak,
    groups=units.groups,
)
