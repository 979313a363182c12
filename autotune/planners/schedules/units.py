"""Two pipelines in opposite directions on the same ranks, in units that tile: what Chimera and BitPipe share.

Even micro-batches go down the ranks, odd ones up. A time slot holds one backward of a chunk or `width` forwards of it.
In a unit every direction starts one slot group each second slot, so that a chunk's slots on a rank have one parity
and, with an even number of ranks, the other direction's have the other; chunks and backwards then follow each other in
runs of D slots without a gap or a collision. A unit takes D x width micro-batches and (1 + width) v D slots of a rank;
the next unit starts that many slots later, in the holes that the last one leaves while it drains.

`width` 1 is Chimera's direct concatenation (Li and Hoefler, 2107.06925, section 3.5): no holes between units where
BW = F, but D-2 forwards of them where BW = 2F. `width` 2 is its forward doubling: two forwards fill the slot of one
backward, so that units join without holes at BW = 2F, for twice the activations.
"""

from __future__ import annotations

from autotune.planners.schedules.schedule import Order, Pipe, Place, Step, wave


def place(pipe: Pipe) -> Place:
    """Each stage on two ranks: a wave down the ranks (one chunk: a straight line) and its mirror image up."""
    return tuple((rank, pipe.ranks - 1 - rank) for (rank,) in wave(pipe))


def widths(pipe: Pipe) -> list[int]:
    """The units in turn. An odd number of D micro-batches leaves a narrow unit, which costs least at the start."""
    count = pipe.items // pipe.ranks
    if pipe.group == pipe.ranks:
        return [1] * count
    return [1] * (count % 2) + [2] * (count // 2)


def order(pipe: Pipe) -> Order:
    ranks, stages, where = pipe.ranks, pipe.stages, place(pipe)
    slots: list[list[tuple[int, int, Step]]] = [[] for _ in range(ranks)]  # (slot, position in the slot, step)
    begin = first = 0
    for width in widths(pipe):
        for item in range(first, first + width * ranks):
            turn, direction = divmod(item - first, 2)
            group, position = divmod(turn, width)
            down, up = begin + 2 * group, begin + 2 * group + 2 * stages - 1 + position * stages
            for stage in range(stages):
                mine = slots[where[stage][direction]]
                mine.append((down + stage, position, Step("F", stage, item)))
                mine.append((up - stage, 0, Step("BW", stage, item)))
        begin += (1 + width) * stages
        first += width * ranks
    return [[step for _, _, step in sorted(mine)] for mine in slots]


def refuse(pipe: Pipe, chunks: int) -> str | None:
    ranks, items = pipe.ranks, pipe.items
    if pipe.chunks != chunks:
        return f"{chunks} chunk{'s' if chunks > 1 else ''} a rank (found {pipe.chunks}; nearest {chunks})"
    if ranks < 2 or ranks % 2:
        return f"an even number of pipeline ranks (found {ranks}; nearest {ranks + 1})"
    if items < 1 or items % ranks:
        return f"micro-batches a multiple of {ranks} (found {items}; nearest {max(1, round(items / ranks)) * ranks})"
    if pipe.group not in (0, ranks, 2 * ranks):
        nearest = ranks if pipe.group < 1.5 * ranks else 2 * ranks
        return f"group {ranks} or {2 * ranks}, or 0 for the wider that fits (found {pipe.group}; nearest {nearest})"
    if pipe.group > items:
        return f"at least {pipe.group} micro-batches with group {pipe.group} (found {items}; nearest {pipe.group})"
    return None


def groups(pipe: Pipe) -> tuple[int, ...]:
    """Narrow units, and wide ones where two D micro-batches are there."""
    return (pipe.ranks, 2 * pipe.ranks) if pipe.items >= 2 * pipe.ranks else (pipe.ranks,)


def makespan(pipe: Pipe) -> float:
    """3 v m of work, and D-2 for each unit and once more, or 1.5 (D-2) for wide units, 2 (D-2) after a narrow one."""
    found, spare = widths(pipe), pipe.ranks - 2
    work = 3.0 * pipe.chunks * pipe.items
    if found[-1] == 1:
        return work + (len(found) + 1) * spare
    return work + (2.0 if found[0] == 1 else 1.5) * spare


def peak(pipe: Pipe) -> list[int]:
    """Nearly the micro-batches of a unit, on all their chunks; most on the ranks in the middle. Any m."""
    ranks, most = pipe.ranks, widths(pipe)[-1] * pipe.stages
    return [most - ranks // 2 + 1 + min(rank, ranks - 1 - rank) for rank in range(ranks)]
