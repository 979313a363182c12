"""V-Min, V-Half and V-ZB (Qi et al., 2405.15362): two chunks a rank in a V, and memory chosen by the building block.

How far a step lies from the same step on the next rank decides how long activations live. For the first and the second
chunk, 1 and 1 slots keep a third of 1F1B's activations, 2 and 1 a half, 4 and 2 all of them but no bubble. Messages are
twice 1F1B's.
"""

from __future__ import annotations

from collections.abc import Callable

from autotune.planners.schedules import reorder
from autotune.planners.schedules.block import Block, Slot
from autotune.planners.schedules.schedule import Pipe, Schedule, wave

PERIOD = 6  # F, B and W of two chunks

# (rank, ranks) -> the slots of F, F, B and B, in the order in which a micro-batch comes by. The gaps keep the steps of
# a rank apart modulo the period.
Offsets = Callable[[int, int], tuple[int, int, int, int]]


def _v_min(i: int, p: int) -> tuple[int, int, int, int]:
    gap = 2 if p % 3 == 0 else 0
    return i, 2 * p - 1 - i, 2 * p + gap + i, 4 * p + gap - 1 - i


def _v_half(i: int, p: int) -> tuple[int, int, int, int]:
    gap = 3 if p % 2 == 0 else 0
    return 2 * i, 3 * p - 2 - i, 3 * p + gap - 1 + 2 * i, 6 * p + gap - 2 - i


def _v_zb(i: int, p: int) -> tuple[int, int, int, int]:
    return 4 * i, 6 * p - 5 - 2 * i, 6 * p - 4 + 4 * i, 12 * p - 9 - 2 * i


def block(offsets: Offsets, ranks: int) -> Block:
    """F and B of one micro-batch on each rank of a V; W goes where slots are free."""
    lists = []
    for rank in range(ranks):
        down, up = rank, 2 * ranks - 1 - rank
        steps = (("F", down), ("F", up), ("B", up), ("B", down))
        lists.append([Slot(op, stage, 0, at) for (op, stage), at in zip(steps, offsets(rank, ranks), strict=True)])
    return Block(lists, PERIOD)


def refuse(pipe: Pipe) -> str | None:
    if pipe.chunks != 2:
        return f"two chunks a rank (found {pipe.chunks}; nearest 2)"
    if pipe.ranks < 2:
        return f"at least two pipeline ranks (found {pipe.ranks}; nearest 2)"
    return None


def _schedule(offsets: Offsets, bubble: Callable[[int], int], peak: Callable[[int], int]) -> Schedule:
    """An entry; bubble (idle slots of the whole) and peak (chunk activations of each rank) are functions of p.

    Both forms are those of a pipeline that fills up: the bubble from 2p micro-batches on, the peak from p on.
    """
    return Schedule(
        lambda pipe: reorder.order(block(offsets, pipe.ranks), pipe.items),
        place=wave,
        refuse=refuse,
        makespan=lambda pipe: 6.0 * pipe.items + bubble(pipe.ranks) if pipe.items >= 2 * pipe.ranks else None,
        peak=lambda pipe: [peak(pipe.ranks)] * pipe.ranks if pipe.items >= pipe.ranks else None,
        splits=True,
        chunks=(2,),
    )


V_MIN = _schedule(_v_min, lambda p: 4 * p - (5 if p % 3 else 7), lambda p: 2 * ((p + 4) // 3))
V_HALF = _schedule(_v_half, lambda p: max(1, 3 * p - (4 if p % 2 else 7)), lambda p: 2 * ((p + 2) // 2))
V_ZB = _schedule(_v_zb, lambda p: p - 1, lambda p: 2 * p)  # a rank's start alone is late: none has a gap
