"""A repeated building block of F and B on a grid of unit slots: W's in free slots, squeezing, the resulting order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from autotune.planners.schedules.block import Block, Slot
from autotune.planners.schedules.schedule import Order, Step


@dataclass(frozen=True)
class Grid:
    """The repeated block's F and B, numbered (rank * tracks + track) * items + item; a track is a slot of the block.

    `need` is the number of the one step that a step waits for (-1: none): F for that of the stage before it, B for
    that of the stage after it, the last stage's B for its own F. The other dependences follow from these.
    """

    block: Block
    items: int
    need: list[int]

    @property
    def ranks(self) -> int:
        return len(self.block.ranks)

    @property
    def tracks(self) -> int:
        return len(self.block.ranks[0])

    def times(self) -> list[int]:
        period = self.block.period
        return [
            at
            for slots in self.block.ranks
            for slot in slots
            for at in range(slot.at, slot.at + period * self.items, period)
        ]

    def rank(self, values: list[int], rank: int) -> list[int]:
        """A rank's part of a list over all steps."""
        size = self.tracks * self.items
        return values[rank * size : (rank + 1) * size]

    def forward(self) -> list[list[bool]]:
        """[rank][track] -> whether it is an F."""
        return [[slot.op == "F" for slot in slots] for slots in self.block.ranks]


def lay(block: Block, items: int) -> Grid:
    """The grid of a block with one micro-batch a period, each track the same kind of step on every rank."""
    tracks = len(block.ranks[0])
    where = {
        (slot.op, slot.stage): rank * tracks + track
        for rank, slots in enumerate(block.ranks)
        for track, slot in enumerate(slots)
    }
    need: list[int] = []
    for slots in block.ranks:
        for op, stage, *_ in slots:
            first = where.get(("F", stage - 1)) if op == "F" else where.get(("B", stage + 1), where["F", stage])
            need += [-1] * items if first is None else range(first * items, (first + 1) * items)
    return Grid(block, items, need)


def events(grid: Grid, times: list[int], rank: int) -> list[tuple[int, bool]]:
    """(slot, whether F) of a rank's F and B in time order."""
    kinds = grid.forward()[rank]
    own, items = grid.rank(times, rank), grid.items
    marked = [at * 2 + kinds[track] for track in range(grid.tracks) for at in own[track * items : (track + 1) * items]]
    marked.sort()
    return [(mark >> 1, mark & 1 == 1) for mark in marked]


def fill(grid: Grid, times: list[int]) -> list[list[int]]:
    """[rank] -> the slots of its W's: each in the first free slot after its B."""
    fills = []
    for rank in range(grid.ranks):
        found: list[int] = []
        backlog, free = 0, 0  # B's whose W is to come; the next slot not looked at
        for at, forward in events(grid, times, rank):
            if backlog and at > free:
                some = min(backlog, at - free)
                found += range(free, free + some)
                backlog -= some
            free = at + 1
            backlog += not forward
        fills.append(found + list(range(free, free + backlog)))
    return fills


def squeeze(grid: Grid, times: list[int], fills: list[list[int]]) -> list[int]:
    """The same order on every rank, each step as early as its inputs and its rank allow."""
    count, size = len(times), grid.tracks * grid.items
    weights = count // 2 // grid.ranks
    flat = times + [at for slots in fills for at in slots]
    total, need = len(flat), grid.need
    keys = [at * total + number for number, at in enumerate(flat)]
    keys.sort()
    clock = [0] * grid.ranks
    end = [0] * count
    for key in keys:
        number = key % total
        if number < count:
            rank = number // size
            at, before = clock[rank], need[number]
            if before >= 0 and end[before] > at:
                at = end[before]
            end[number] = clock[rank] = at + 1
        else:
            clock[(number - count) // weights] += 1
    return [at - 1 for at in end]


def steps_of(grid: Grid, times: list[int]) -> Order:
    """Each rank's steps, W's in the free slots: those of the track that comes first in the block first."""
    return [_rank_steps(slots, grid.items, grid.rank(times, rank)) for rank, slots in enumerate(grid.block.ranks)]


def _rank_steps(slots: Sequence[Slot], items: int, times: list[int]) -> list[Step]:
    total = len(times)
    backward = [track for track, slot in enumerate(slots) if slot.op == "B"]
    done, weighed = [0] * len(slots), [0] * len(slots)  # [track] -> steps issued, and of a B's track W's issued
    steps: list[Step] = []
    free, backlog = 0, 0  # the next slot not looked at; B's whose W is to come
    keys = [at * total + number for number, at in enumerate(times)]
    keys.sort()
    for key in [*keys, (total + keys[-1] // total + 1) * total]:  # after the last step there is room for every W
        at, number = divmod(key, total)
        while backlog and free < at:
            track = next(track for track in backward if weighed[track] < done[track])
            steps.append(Step("W", slots[track].stage, weighed[track]))
            weighed[track] += 1
            backlog, free = backlog - 1, free + 1
        if len(steps) == total + total // 2:
            break
        free = at + 1
        track, item = divmod(number, items)
        steps.append(Step(slots[track].op, slots[track].stage, item))
        done[track] += 1
        backlog += slots[track].op == "B"
    return steps
