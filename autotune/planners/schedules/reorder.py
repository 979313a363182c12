"""From a building block to an order: repeat, squeeze, use idle slots of both ends, squeeze (2405.15362, section 3).

The block holds F and B alone, one micro-batch a period; W goes wherever a slot is free and a B is done. The steady
middle keeps the block's order, which is what bounds the memory; only the warm-up (before the first rank's first
micro-batch is through) and the cool-down (from its last forward on) are rearranged, first with the W's as they lie,
then with W's that give way, and never so that a rank would hold more than the fullest rank did before.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterable, Iterator
from itertools import chain

from autotune.planners.schedules.block import Block
from autotune.planners.schedules.grid import Grid, events, fill, lay, squeeze, steps_of
from autotune.planners.schedules.schedule import Order, Step


def order(block: Block, items: int) -> Order:
    """The order of `items` micro-batches that a block of F and B with one micro-batch a period gives."""
    span = max(slot.at for slots in block.ranks for slot in slots) - min(slots[0].at for slots in block.ranks)
    enough = 3 * (span // block.period) // 2 + 6  # both ends, which overlap, and some periods between them
    if items > enough:
        longer = [_longer(steps, items - enough, len(steps) // enough) for steps in _built(block, enough)]
        if all(longer):
            return longer
    return _built(block, items)


def _built(block: Block, items: int) -> Order:
    grid = lay(block, items)
    times = grid.times()
    times, fills = _tighten(grid, times, fill(grid, times))
    times = squeeze(grid, times, fills)
    times = _drain(grid, times)
    times = squeeze(grid, times, fill(grid, times))
    return steps_of(grid, times)


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


def _steady(grid: Grid, times: list[int]) -> tuple[int, int]:
    """[from, to): the slots of the middle that keeps the block's order. Empty where the ends meet."""
    begin = max(grid.rank(times, 0)[track * grid.items] for track in range(grid.tracks))
    last = min(grid.rank(times, 0)[(track + 1) * grid.items - 1] for track in range(grid.tracks))
    return (begin, last) if begin < last else (0, 0)


def _tighten(grid: Grid, times: list[int], fills: list[list[int]]) -> tuple[list[int], list[list[int]]]:
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


def _most(grid: Grid, times: list[int], fills: list[list[int]], rank: int) -> int:
    """The most activations that a rank holds, its W's in the given slots."""
    marks = [(at, 1) for at, forward in events(grid, times, rank) if forward] + [(at, -1) for at in fills[rank]]
    now = most = 0
    for _, change in sorted(marks):
        now += change
        most = max(most, now)
    return most


IDLE, FORWARD, BACKWARD = range(3)


def _after(slots: Iterable[int], held: int, backlog: int) -> Iterator[tuple[int, int]]:
    """(activations held, W's to come) after each slot; an idle one runs a W if there is one."""
    for kind in slots:
        if kind == FORWARD:
            held += 1
        elif kind == BACKWARD:
            backlog += 1
        elif backlog:
            held, backlog = held - 1, backlog - 1
        yield held, backlog


def _drain(grid: Grid, times: list[int]) -> list[int]:
    """Moves the F's and B's of the cool-down to earlier slots, W's giving way, at no rank above today's peak.

    A step that moves from slot b to slot a leaves a later slot to a W: after b no more is held than before, so only
    the slots from a to b have to be looked at.
    """
    items, tracks, ranks, need = grid.items, grid.tracks, grid.ranks, grid.need
    size = tracks * items
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
        states = [(0, 0), *_after(slots, 0, 0)]
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
            state[rank][to + 1 :] = _after(slots[to:], *state[rank][to])
    return times


def _fits(slots: bytearray, now: tuple[int, int], kind: int, to: int, at: int, limit: int) -> bool:
    """Whether a step in slot `to` instead of `at` keeps every slot between them at the limit or below."""
    return all(held <= limit for held, _ in _after(chain((kind,), slots[to + 1 : at]), *now))
