"""The simulator: a program and a cost table give a timeline. It knows lanes, buffers, meetings and lag, no technique.

A program fixes the order of every lane, so its time is a longest path: the dependencies are resolved once
(`planners.resolve`) and a sweep in topological order gives every start and end. Memory needs no time at all: it is a
walk in issue order (`memory`). What cannot be ordered is refused with a table that shows where each rank waits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import accumulate, chain, repeat
from operator import add, sub
from typing import NamedTuple, Protocol, TypeVar, cast

from autotune.planners.resolve import Resolved, Shared, resolve, uncollected
from autotune.planners.sharing import Capacity, shared_sweep, sharers
from autotune.spec.program import COMPUTE, DEVICE, Instruction, Program, changes_of, likeness_of
from autotune.spec.timeline import Span, Timeline

T = TypeVar("T")

__all__ = ["Costs", "Price", "Resolved", "Shared", "memory", "resolve", "simulate", "sweep"]


class Costs(Protocol):
    """What an instruction costs on a rank. Rules of these tables must not depend on anything but the arguments.

    A table with an attribute `by_stage` that is true looks at the rank, op, stage and part alone: what differs in
    item or buffers costs the same and is asked for once.
    """

    def seconds(self, rank: int, instruction: Instruction) -> float:
        """Its duration once every rank that meets is ready."""

    def transient(self, rank: int, instruction: Instruction) -> int:
        """Device bytes it takes while it runs and gives back before it ends."""

    def sent(self, rank: int, instruction: Instruction) -> int:
        """Bytes this rank puts on a link in it."""


def sweep(resolved: Resolved, duration: Sequence[float]) -> tuple[list[float], list[float]]:
    """Start and end of every event: the longest path, in one pass."""
    waits = resolved.waits
    start, end = [0.0] * resolved.events, [0.0] * resolved.events
    for number in resolved.order:
        at = 0.0
        for earlier in waits[number]:
            done = end[earlier]
            if done > at:
                at = done
        start[number] = at
        end[number] = at + duration[number]
    return start, end


class Walk(NamedTuple):
    """What one rank's memory goes through, whatever the sizes: indices into `names`."""

    names: tuple[str, ...]
    start: list[int]  # one entry for each version that is there before the first instruction
    gained: list[int]  # in the order in which they are allocated
    lost: list[int]  # in the order in which they are released
    gains: list[int]  # [position] how many are allocated when this instruction has been issued
    losses: list[int]  # [position] how many are released before it is


def _walk(program: Program, rank: int) -> Walk:
    listing, live = program.ranks[rank], set(program.given(rank))
    lagged: dict[str, int] = {}
    for instruction in listing:
        if instruction[-1]:
            lagged |= {name: max(lagged.get(name, 0), instruction.lag) for name in instruction.reads}
    start = [*live, *(name for name, lag in lagged.items() for _ in range(lag))]
    gained, lost, gains, losses = list[str](), list[str](), list[int](), list[int]()
    for writes, frees in map(changes_of, listing):
        gained += writes if live.isdisjoint(writes) else [name for name in writes if name not in live]
        gains.append(len(gained))
        losses.append(len(lost))
        live.update(writes)
        if frees:
            lost += frees
            live.difference_update(frees)
    number = {name: number for number, name in enumerate(program.buffers[rank])}.__getitem__
    first, came, went = (list(map(number, names)) for names in (start, gained, lost))
    return Walk(tuple(program.buffers[rank]), first, came, went, gains, losses)


def _remembered(program: Program, key: object, make: Callable[[], T]) -> T:
    """`make()`, or what it gave before for a program with the same lists."""
    if not isinstance(program.ranks, Shared):
        return make()
    memo = program.ranks.memo
    if key not in memo:
        memo[key] = make()
    return cast(T, memo[key])


def _held(program: Program, rank: int, transient: Iterable[int]) -> dict[str, list[int]]:
    """Bytes of each tier of one rank at each of its instructions, given their transient device bytes."""
    buffers = program.buffers[rank]
    key = ("walk", rank, program.given(rank), tuple(buffers))
    walk = _remembered(program, key, lambda: _walk(program, rank))
    held: dict[str, list[int]] = {}
    for tier in dict.fromkeys((DEVICE, *(buffer.tier for buffer in buffers.values()))):
        size = [buffer.size if buffer.tier == tier else 0 for buffer in buffers.values()]
        began = sum(map(size.__getitem__, walk.start))
        there = list(accumulate(map(size.__getitem__, walk.gained), initial=began))
        gone = list(accumulate(map(size.__getitem__, walk.lost), initial=0))
        held[tier] = list(map(sub, map(there.__getitem__, walk.gains), map(gone.__getitem__, walk.losses)))
    held[DEVICE] = list(map(add, held[DEVICE], transient))
    return held


def memory(program: Program, transient: Callable[[int, Instruction], int]) -> list[dict[str, list[int]]]:
    """Bytes in each tier while each instruction runs, in issue order. Lagged versions are held all along."""
    return [_held(program, rank, map(transient, repeat(rank), listing)) for rank, listing in enumerate(program.ranks)]


Price = tuple[float, int, int]  # seconds, transient bytes, bytes sent


def prices(program: Program, costs: Costs) -> list[list[Price]]:
    """What each instruction of each rank costs."""
    return [_prices(program, costs, rank) for rank in range(program.world)]


def _prices(program: Program, costs: Costs, rank: int) -> list[Price]:
    """What each instruction of one rank costs."""
    listing = program.ranks[rank]

    def ask(instruction: Instruction) -> Price:
        sent = costs.sent(rank, instruction) if instruction.meets else 0
        return costs.seconds(rank, instruction), costs.transient(rank, instruction), sent

    if not getattr(costs, "by_stage", False):
        return list(map(ask, listing))
    first, like = _remembered(program, ("alike", rank), lambda: alike(listing))
    prices = [ask(listing[position]) for position in first]
    return [prices[number] for number in like]


def alike(listing: Sequence[Instruction]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(the first position of each op, stage and part; which of them each instruction is like)."""
    keys = list(map(likeness_of, listing))
    first = dict(zip(reversed(keys), reversed(range(len(keys))), strict=True))
    number = {key: n for n, key in enumerate(dict.fromkeys(keys))}
    return tuple(map(first.__getitem__, number)), tuple(map(number.__getitem__, keys))


def simulate(
    program: Program,
    costs: Costs,
    *,
    inline: bool = False,
    resolved: Resolved | None = None,
    steps: int = 1,
    capacities: Sequence[Capacity] = (),
) -> Timeline:
    """The predicted timeline of `steps` steps in a row (memory and bytes sent are those of one).

    `capacities`: what ranks share; without any each has a device and all its ways of its own.
    """
    resolved = resolved or resolve(program, inline, steps)
    with uncollected():
        priced = prices(program, costs)
        start, end = timed(program, priced, resolved, capacities)
        spans = [span for rank in range(program.world) for span in spans_of(program, resolved, rank, start, end)]
        held = [held_by(program, rank, priced[rank]) for rank in range(program.world)]
    sent = tuple(sum(price[2] for price in mine) for mine in priced)
    return Timeline("predicted", program, tuple(spans), held, sent)


def held_by(program: Program, rank: int, mine: Sequence[Price]) -> dict[str, list[int]]:
    """Bytes of each tier of one rank at each of its instructions, given what they cost."""
    return _held(program, rank, [price[1] for price in mine])


def timed(
    program: Program, priced: Sequence[Sequence[Price]], resolved: Resolved, capacities: Sequence[Capacity]
) -> tuple[list[float], list[float]]:
    """Start and end of every event: it takes as long as its slowest member."""
    duration = [0.0] * resolved.events
    for mine, events in zip(priced, resolved.event, strict=True):
        seconds = [price[0] for price in mine] * resolved.steps
        for number, each in zip(events, seconds, strict=True):
            if each > duration[number]:
                duration[number] = each
    listings = [[instruction.lane for instruction in listing] for listing in program.ranks] if capacities else []
    used = set(chain.from_iterable(listings))
    taken = [capacity for capacity in capacities if capacity.lanes is None or not used.isdisjoint(capacity.lanes)]
    if not taken:
        return sweep(resolved, duration)
    return shared_sweep(resolved, duration, *sharers(listings, resolved.event, resolved.events, taken))


def spans_of(
    program: Program, resolved: Resolved, rank: int, start: Sequence[float], end: Sequence[float]
) -> Iterable[Span]:
    """The spans of one rank, in list order."""
    events = resolved.event[rank]
    positions = list(range(len(program.ranks[rank]))) * resolved.steps
    starts, ends = map(start.__getitem__, events), map(end.__getitem__, events)
    # A named tuple's own constructor is Python; its base's is not.
    return map(tuple.__new__, repeat(Span), zip(repeat(rank), positions, starts, ends, strict=False))


def busy_by(program: Program, resolved: Resolved, rank: int, start: Sequence[float], end: Sequence[float]) -> float:
    """Seconds that one rank computes: what the whole timeline says of it, without making the timeline."""
    events, listing = resolved.event[rank], program.ranks[rank] * resolved.steps
    return sum(end[n] - start[n] for n, i in zip(events, listing, strict=True) if i.lane == COMPUTE)
