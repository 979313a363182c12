"""ZeroPP's order (2402.03791): units of u micro-batches that run F, B and W by blocks, one block being u of a chunk.

Within a unit each stage's forwards are one block and its backwards another, so sharded weights are gathered once a unit
for each: a pass adds the gathers, units x stages of them where the plan says so (see passes.shard). W needs no weights:
each rank keeps back as many W's of a unit as the next one has idle slots in its warm-up, which closes the bubbles
between units from u = p on. `pipe.group` is u, 0 meaning p. A larger u gathers less often and holds more:
u v + 2(p-1) chunk activations.
The units are the paper's; where W's go is derived here.
"""

from __future__ import annotations

from collections import deque

from autotune.planners.schedules.schedule import Order, Pipe, Schedule, Step


def size(pipe: Pipe) -> int:
    """Micro-batches of a unit."""
    return min(pipe.items, pipe.group or pipe.ranks)


def units(pipe: Pipe) -> list[range]:
    """The items of each unit; the last unit takes what is left."""
    return [range(first, min(first + size(pipe), pipe.items)) for first in range(0, pipe.items, size(pipe))]


def order(pipe: Pipe) -> Order:
    return [_rank(pipe, rank) for rank in range(pipe.ranks)]


def turn(pipe: Pipe, rank: int) -> int:
    """Idle slots between a rank's last forward and its first backward of a unit: down to the last rank and back."""
    return 2 * (pipe.ranks - 1 - rank)


def wait(pipe: Pipe) -> int:
    """Idle slots between two blocks, until the first micro-batch has come around all ranks."""
    return max(0, pipe.ranks - size(pipe))


def _rank(pipe: Pipe, rank: int) -> list[Step]:
    stages = range(rank, pipe.stages, pipe.ranks)
    kept = min(turn(pipe, rank) + (pipe.chunks - 1) * wait(pipe), size(pipe) * pipe.chunks)
    steps: list[Step] = []
    weights: deque[Step] = deque()  # W's to come

    def weigh(count: int) -> None:
        steps.extend(weights.popleft() for _ in range(min(count, len(weights))))

    for items in units(pipe):
        for stage in stages:
            if stage != rank:
                weigh(wait(pipe))
            steps += [Step("F", stage, item) for item in items]
        weigh(turn(pipe, rank))
        for stage in reversed(stages):
            steps += [Step("B", stage, item) for item in items]
            weights.extend(Step("W", stage, item) for item in items)
            if stage != rank:
                weigh(wait(pipe))
        weigh(len(weights) - kept)
    weigh(len(weights))
    return steps


def refuse(pipe: Pipe) -> str | None:
    if pipe.group > pipe.items:
        return f"units of at most {pipe.items} micro-batches (found {pipe.group}; nearest {pipe.items})"
    return None


def _full(pipe: Pipe) -> bool:
    """Whether units are all alike and long enough to hide the way down the ranks and back."""
    per = size(pipe)
    return pipe.items % per == 0 and per >= pipe.ranks and per * pipe.chunks >= turn(pipe, 0)


def makespan(pipe: Pipe) -> float | None:
    return 3.0 * pipe.items * pipe.chunks + 2 * (pipe.ranks - 1) if _full(pipe) else None


def peak(pipe: Pipe) -> list[int] | None:
    """One unit, and from the second on the W's that the rank keeps back."""
    if not _full(pipe):
        return None
    held, more = size(pipe) * pipe.chunks, size(pipe) < pipe.items
    return [held + (turn(pipe, rank) if more else 0) for rank in range(pipe.ranks)]


def groups(pipe: Pipe) -> tuple[int, ...]:
    """Half as many micro-batches as ranks, as many, twice as many, and all."""
    ranks, items = pipe.ranks, pipe.items
    return tuple(sorted({min(items, count) for count in (-(-ranks // 2), ranks, 2 * ranks, items)}))


SCHEDULE = Schedule(order, refuse=refuse, makespan=makespan, peak=peak, splits=True, chunks=(1, 2, 4), groups=groups)
