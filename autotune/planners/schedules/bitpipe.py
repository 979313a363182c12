"""BitPipe (Wu et al., 2410.19367): two V-shaped interleaved pipelines in opposite directions.

2D stages go down the ranks and up again, and a mirror image of them up and down: a rank holds two stages of each, so
weights are there twice. The turn of the V needs no message. Bubbles (D-2)/(4N+D-2) of the time where BW = F and, for
N = D, (D-2)/(3N+D-2) where BW = 2F: half of Chimera's, in chunks of half a stage. Activations of at most 2D chunks,
or 4D with units of 2D micro-batches (`group`), whatever the number of micro-batches.
"""

from __future__ import annotations

from autotune.planners.schedules import units
from autotune.planners.schedules.schedule import Schedule

SCHEDULE = Schedule(
    units.order,
    place=units.place,
    refuse=lambda pipe: units.refuse(pipe, 2),
    makespan=units.makespan,
    peak=units.peak,
    chunks=(2,),
    groups=units.groups,
)
