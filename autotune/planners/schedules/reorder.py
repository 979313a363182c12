"""From a building block to an order: repeat, squeeze, use the idle slots of both ends, squeeze (2405.15362, section 3.3).

The block holds F and B alone, one micro-batch a period; W goes wherever a slot is free and a B is done. All times are
slots of unit length. The steady middle keeps the block's order, which is what bounds the memory; only the warm-up
(before the first rank's first micro-batch is through) and the cool-down (from its last forward on) are rearranged,
first with the W's as they lie, then with W's that give way, and never so that a rank would hold more than before.
"""

from __future__ import annotations

from bisect import insort
from dataclasses import dataclass

from autotune.planners.schedules.block import Block
from autotune.planners.schedules.schedule import Order, Step


@dataclass(frozen=True)
class _Grid:
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
            at for slots in self.block.ranks for slot in slots for at in range(slot.at, slot.at + period * self.items, period)
        ]

    def rank(self, values: list[int], rank: int) -> list[int]:
        """A rank's part of a list over all steps."""
        size = self.tracks * self.items
        return values[rank * size : (rank + 1) * size]

    def forward(self) -> list[list[bool]]:
        """[rank][track] -> whether it is an F."""
        return [[slot.op == "F" for slot in slots] for slots in self.block.ranks]


def _grid(block: Block, items: int) -> _Grid:
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
    return _Grid(block, items, need)


def order(block: Block, items: int) -> Order:
    """The order of `items` micro-batches that a block of F and B with one micro-batch a period gives."""
    span = max(slot.at for slots in block.ranks for slot in slots) - min(slots[0].at for slots in block.ranks)
    enough = 2 * (span // block.period) + 4  # both ends and some periods between them
    if items > enough:
        longer = [_longer(steps, items - enough, len(steps) // enough) for steps in _built(block, enough)]
        if all(longer):
            return longer
    return _built(block, items)


def _built(block: Block, items: int) -> Order:
    grid = _grid(block, items)
    times = grid.times()
    times, fills = _tighten(grid, times, _fill(grid, times))
    times = _squeeze(grid, times, fills)
    times = _drain(grid, times)
    times = _squeeze(grid, times, _fill(grid, times))
    return _steps(grid, times)


def _longer(steps: list[Step], more: int, period: int) -> list[Step]:
    """A rank's steps for `more` micro-batches more: a period of the middle repeated. Empty if no period repeats there.

    The ends depend on the block alone, so that the order of many micro-batches is that of fewer with a longer middle.
    """
    for cut in range((len(steps) - period) // 2, len(steps) - 2 * period):
        part = steps[cut : cut + period]
        if [Step(op, stage, item + 1) for op, stage, item in part] == steps[cut + period : cut + 2 * period]:
            middle = [Step(op, stage, item + turn) for turn in range(more) for op, stage, item in part]
            return steps[:cut] + middle + [Step(op, stage, item + more) for op, stage, item in steps[cut:]]
    return []


def _events(grid: _Grid, times: list[int], rank: int) -> list[tuple[int, bool]]:
    """(slot, whether F) of a rank's F and B in time order."""
    kinds = grid.forward()[rank]
    own, items = grid.rank(times, rank), grid.items
    marked = [at * 2 + kinds[track] for track in range(grid.tracks) for at in own[track * items : (track + 1) * items]]
    marked.sort()
    return [(mark >> 1, mark & 1 == 1) for mark in marked]


def _fill(grid: _Grid, times: list[int]) -> list[list[int]]:
    """[rank] -> the slots of its W's: each in the first free slot after its B."""
    fills = []
    for rank in range(grid.ranks):
        found: list[int] = []
        backlog, free = 0, 0  # B's whose W is to come; the next slot not looked at
        for at, forward in _events(grid, times, rank):
            if backlog and at > free:
                some = min(backlog, at - free)
                found += range(free, free + some)
                backlog -= some
            free = at + 1
            backlog += not forward
        fills.append(found + list(range(free, free + backlog)))
    return fills


def _squeeze(grid: _Grid, times: list[int], fills: list[list[int]]) -> list[int]:
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


def _steady(grid: _Grid, times: list[int]) -> tuple[int, int]:
    """[from, to): the slots of the middle that keeps the block's order. Empty where the ends meet."""
    begin = max(grid.rank(times, 0)[track * grid.items] for track in range(grid.tracks))
    last = min(grid.rank(times, 0)[(track + 1) * grid.items - 1] for track in range(grid.tracks))
    return (begin, last) if begin < last else (0, 0)


def _tighten(grid: _Grid, times: list[int], fills: list[list[int]]) -> tuple[list[int], list[list[int]]]:
    """Moves the steps of both ends, W's too, to the earliest free slots that raise no rank above today's peak."""
    items, tracks, ranks, need = grid.items, grid.tracks, grid.ranks, grid.need
    count, size, weights = len(times), tracks * items, tracks * items // 2
    begin, stop = _steady(grid, times)
    kinds = [kind for row in grid.forward() for kind in row]
    flat = times + [at for slots in fills for at in slots]
    total, bound = len(flat), max(flat) + 1
    limit = max(_most(grid, times, fills, rank) for rank in range(ranks))
    busy = [bytearray(bound) for _ in range(ranks)]
    level: list[list[int]] = [[0] for _ in range(ranks)]  # [rank][slot] -> activations held in it
    done: list[list[int]] = [[] for _ in range(ranks)]  # [rank] -> the slots of its B's so far, sorted
    keys = [at * total + number for number, at in enumerate(flat)]
    keys.sort()
    for key in keys:
        at, number = divmod(key, total)
        weight = number >= count
        if weight:
            rank, item = divmod(number - count, weights)
            change = -1
        else:
            rank, item = number // size, number % items
            change = 1 if kinds[number // items] else 0
        held = level[rank]
        if len(held) <= at:
            held += [held[-1]] * (at + 1 - len(held))
        to = at
        if not begin <= at < stop:
            ready = flat[number - 1] + 1 if item else 0
            before = done[rank][item] if weight else flat[need[number]] if need[number] >= 0 else -1
            ready = max(ready, before + 1)
            if change > 0:
                low = at
                while low > ready and held[low - 1] < limit:
                    low -= 1
                ready = low
            to = busy[rank].find(0, ready, at)
            to = at if to < 0 else to
            flat[number] = to
        busy[rank][to] = 1
        if change:
            for slot in range(to, at + 1):
                held[slot] += change
        elif not weight:
            insort(done[rank], to)
    return flat[:count], [flat[count + rank * weights : count + (rank + 1) * weights] for rank in range(ranks)]


def _most(grid: _Grid, times: list[int], fills: list[list[int]], rank: int) -> int:
    """The most activations that a rank holds, its W's in the given slots."""
    marks = [(at, 1) for at, forward in _events(grid, times, rank) if forward] + [(at, -1) for at in fills[rank]]
    now = most = 0
    for _, change in sorted(marks):
        now += change
        most = max(most, now)
    return most


IDLE, FORWARD, BACKWARD = range(3)


def _slot(kind: int, held: int, backlog: int) -> tuple[int, int]:
    """(activations held, W's to come) after a slot; an idle one runs a W if there is one."""
    if kind == FORWARD:
        return held + 1, backlog
    if kind == BACKWARD:
        return held, backlog + 1
    return (held - 1, backlog - 1) if backlog else (held, backlog)


def _drain(grid: _Grid, times: list[int]) -> list[int]:
    """Moves the F's and B's of the cool-down to earlier slots, W's giving way, at no rank above today's peak.

    A step that moves from slot b to slot a leaves a later slot to a W: after b no more is held than before, so only
    the slots from a to b have to be looked at.
    """
    items, tracks, ranks, need = grid.items, grid.tracks, grid.ranks, grid.need
    count, size = len(times), tracks * items
    _, stop = _steady(grid, times)
    kinds = [FORWARD if kind else BACKWARD for row in grid.forward() for kind in row]
    times = list(times)
    bound = max(times) + 1
    row: list[bytearray] = []  # [rank][slot] -> what runs in it
    state: list[list[tuple[int, int]]] = []  # [rank][slot + 1] -> after it
    limit = 0
    for rank in range(ranks):
        slots = bytearray(bound)
        for track in range(tracks):
            kind = kinds[rank * tracks + track]
            for at in times[(rank * tracks + track) * items : (rank * tracks + track + 1) * items]:
                slots[at] = kind
        now = (0, 0)
        states = [now]
        for kind in slots:
            now = _slot(kind, *now)
            states.append(now)
        limit = max(limit, max(states)[0])
        row.append(slots)
        state.append(states)
    moving = sorted((at, number) for number, at in enumerate(times) if at >= stop)
    for at, number in moving:
        rank, item = number // size, number % items
        ready = times[number - 1] + 1 if item else 0
        if need[number] >= 0:
            ready = max(ready, times[need[number]] + 1)
        slots, kind = row[rank], kinds[number // items]
        to = slots.find(IDLE, ready, at)
        while to >= 0 and not _fits(slots, state[rank][to], kind, to, at, limit):
            to = slots.find(IDLE, to + 1, at)
        if to >= 0:
            times[number] = to
            slots[at], slots[to] = IDLE, kind
            now = state[rank][to]
            for slot in range(to, bound):
                now = _slot(slots[slot], *now)
                state[rank][slot + 1] = now
    return times


def _fits(slots: bytearray, now: tuple[int, int], kind: int, to: int, at: int, limit: int) -> bool:
    """Whether a step in slot `to` instead of `at` keeps every slot between them at the limit or below."""
    for slot in range(to, at):
        now = _slot(kind if slot == to else slots[slot], *now)
        if now[0] > limit:
            return False
    return True


def _steps(grid: _Grid, times: list[int]) -> Order:
    """Each rank's steps, W's in the free slots: those of the track that comes first in the block first."""
    items, tracks = grid.items, grid.tracks
    lists: Order = []
    for rank, slots in enumerate(grid.block.ranks):
        own = grid.rank(times, rank)
        steps: list[Step] = []
        waiting: list[list[int]] = [[] for _ in range(tracks)]
        taken = [0] * tracks  # [track] -> W's already issued

        def weight(waiting: list[list[int]] = waiting, taken: list[int] = taken) -> Step | None:
            for track, done in enumerate(waiting):
                if taken[track] < len(done):
                    taken[track] += 1
                    return Step("W", slots[track].stage, done[taken[track] - 1])
            return None

        free = 0
        for key in sorted(at * tracks * items + number for number, at in enumerate(own)):
            at, number = divmod(key, tracks * items)
            track, item = divmod(number, items)
            while free < at and (step := weight()) is not None:
                steps.append(step)
                free += 1
            free = at + 1
            steps.append(Step(slots[track].op, slots[track].stage, item))
            if slots[track].op == "B":
                waiting[track].append(item)
        while (step := weight()) is not None:
            steps.append(step)
        lists.append(steps)
    return lists
