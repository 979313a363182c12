"""Breadth-first pipeline (Lamy-Poirier, 2211.05953): GPipe with chunks, each of which takes all micro-batches in turn.

The bubble is GPipe's divided by the chunks, all activations are held. The gradients of a rank's last chunk are complete
after 1/v of its backward, so that their sum over replicas runs beside the rest: that holds with one pipeline rank too.
"""

from __future__ import annotations

from autotune.planners.schedules.schedule import Order, Pipe, Schedule, Step


def order(pipe: Pipe) -> Order:
    items = range(pipe.items)
    return [
        [Step("F", stage, item) for stage in range(rank, pipe.stages, pipe.ranks) for item in items]
        + [Step("BW", stage, item) for stage in reversed(range(rank, pipe.stages, pipe.ranks)) for item in items]
        for rank in range(pipe.ranks)
    ]


def refuse(pipe: Pipe) -> str | None:
    return None if pipe.chunks >= 2 else f"at least two chunks a rank (found {pipe.chunks}; nearest 2)"


def makespan(pipe: Pipe) -> float:
    """A chunk takes m slots, or p where the first micro-batch comes around the ranks after the last has left."""
    ranks, items = pipe.ranks, pipe.items
    return 3.0 * (max(items, ranks) * pipe.chunks + min(items, ranks) - 1)


SCHEDULE = Schedule(
    order,
    refuse=refuse,
    makespan=makespan,
    peak=lambda pipe: [pipe.items * pipe.chunks] * pipe.ranks,
    chunks=(2, 4),
)
