"""GIS and GIS-H (PipeOffload, 2503.01328): interleaved 1F1B with B and W apart and only the warm-up that chunks need.

GIS holds p v chunk activations where interleaved 1F1B holds p v + p - 1, and its bubble is (p-1)(F+B)/v. GIS-H takes
groups of g < p micro-batches: g (v-1) + p activations for (p-g)(v-1) more idle slots; `pipe.group` is g, 0 the
smallest, ceil(p/2). With fewer, what a group computes no longer covers its way around the ranks.
"""

from __future__ import annotations

from collections.abc import Callable

from autotune.planners.schedules.block import looped, repeat
from autotune.planners.schedules.interleaved import refuse as refuse_interleaved
from autotune.planners.schedules.schedule import Order, Pipe, Schedule


def smallest(ranks: int) -> int:
    """Micro-batches of GIS-H's smallest group."""
    return -(-ranks // 2)


def _order(pipe: Pipe, group: int) -> Order:
    return repeat(looped(pipe.ranks, pipe.chunks, group, hops=(1, 2), split=True), pipe.items)


def _makespan(pipe: Pipe, group: int) -> float:
    ranks, chunks = pipe.ranks, pipe.chunks
    return 3.0 * pipe.items * chunks + 2 * (ranks - 1) + (ranks - group) * (chunks - 1)


def _peak(pipe: Pipe, group: int) -> list[int]:
    """The warm-up and the forward after it: g (v-1) + p on rank 0, one less on each rank that follows."""
    full = group * (pipe.chunks - 1) + pipe.ranks
    return [min(pipe.items * pipe.chunks, full - rank) for rank in range(pipe.ranks)]


def _refuse_half(pipe: Pipe) -> str | None:
    ranks, least, group = pipe.ranks, smallest(pipe.ranks), pipe.group or smallest(pipe.ranks)
    if ranks < 2 or pipe.chunks < 2:
        return refuse_interleaved(pipe)
    if not least <= group <= ranks:
        nearest = min(max(group, least), ranks)
        return f"groups of {least} to {ranks} micro-batches (found {group}; nearest {nearest})"
    if pipe.items % group:
        nearest = max(1, round(pipe.items / group)) * group
        return f"micro-batches a multiple of the group of {group} (found {pipe.items}; nearest {nearest})"
    return None


def _groups(pipe: Pipe) -> tuple[int, ...]:
    """Every group that divides the micro-batches, except p, which is GIS; none if none does."""
    return tuple(group for group in range(smallest(pipe.ranks), pipe.ranks) if pipe.items % group == 0)


def _schedule(
    group: Callable[[Pipe], int],
    refuse: Callable[[Pipe], str | None],
    groups: Callable[[Pipe], tuple[int, ...]] = lambda pipe: (0,),
) -> Schedule:
    return Schedule(
        lambda pipe: _order(pipe, group(pipe)),
        refuse=refuse,
        makespan=lambda pipe: _makespan(pipe, group(pipe)),
        peak=lambda pipe: _peak(pipe, group(pipe)),
        splits=True,
        chunks=(2, 4),
        groups=groups,
    )


GIS = _schedule(lambda pipe: pipe.ranks, refuse_interleaved)
GIS_H = _schedule(lambda pipe: pipe.group or smallest(pipe.ranks), _refuse_half, _groups)
