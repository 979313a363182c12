"""The simulator: a program and a cost table give a timeline. It knows lanes, buffers, meetings and lag, no technique.

A program fixes the order of every lane, so its time is a longest path: the dependencies are resolved once
(`planners.resolve`) and a sweep in topological order gives every start and end. Memory needs no time at all: it is a
walk in issue order (`memory`). What cannot be ordered is refused with a table that shows where each rank waits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import repeat
from typing import Protocol

from autotune.planners.resolve import Resolved, Shared, resolve
from autotune.spec.program import DEVICE, Instruction, Program
from autotune.spec.timeline import Span, Timeline

__all__ = ["Costs", "Resolved", "Shared", "memory", "resolve", "simulate", "sweep"]


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


def memory(program: Program, transient: Callable[[int, Instruction], int]) -> list[dict[str, list[int]]]:
    """Bytes in each tier while each instruction runs, in issue order. Lagged versions are held all along."""
    return [_held(program, rank, map(transient, repeat(rank), listing)) for rank, listing in enumerate(program.ranks)]


def _held(program: Program, rank: int, transient: Iterable[int]) -> dict[str, list[int]]:
    """One rank's walk; `transient` is for each of its instructions."""
    buffers, live, listing = program.buffers[rank], set(program.given(rank)), program.ranks[rank]
    lagged: dict[str, int] = {}
    for instruction in listing:
        for name in instruction.reads if instruction.lag else ():
            lagged[name] = max(lagged.get(name, 0), instruction.lag)
    now = dict.fromkeys((DEVICE, *(b.tier for b in buffers.values())), 0)
    for name in live:
        now[buffers[name].tier] += buffers[name].size
    for name, lag in lagged.items():
        now[buffers[name].tier] += buffers[name].size * lag
    tiers: dict[str, list[int]] = {tier: [] for tier in now}
    device, others = tiers[DEVICE], [tier for tier in now if tier != DEVICE]
    for (_, _, _, _, _, _, writes, frees, _, _, _), extra in zip(listing, transient, strict=True):
        for name in writes:
            if name not in live:
                live.add(name)
                size, tier, _ = buffers[name]
                now[tier] += size
        device.append(now[DEVICE] + extra)
        for tier in others:
            tiers[tier].append(now[tier])
        for name in frees:
            live.discard(name)
            size, tier, _ = buffers[name]
            now[tier] -= size
    return tiers


Price = tuple[float, int, int]  # seconds, transient bytes, bytes sent


def _prices(costs: Costs, rank: int, listing: tuple[Instruction, ...]) -> list[Price]:
    """What each instruction of one rank costs."""

    def ask(instruction: Instruction) -> Price:
        sent = costs.sent(rank, instruction) if instruction.peers else 0
        return costs.seconds(rank, instruction), costs.transient(rank, instruction), sent

    if not getattr(costs, "by_stage", False):
        return list(map(ask, listing))
    known: dict[tuple[str, int, int], Price] = {}
    prices: list[Price] = []
    for instruction in listing:
        key = (instruction.op, instruction.stage, instruction.part)
        if key not in known:
            known[key] = ask(instruction)
        prices.append(known[key])
    return prices


def simulate(
    program: Program, costs: Costs, *, inline: bool = False, resolved: Resolved | None = None, steps: int = 1
) -> Timeline:
    """The predicted timeline of `steps` steps in a row (memory and bytes sent are those of one)."""
    resolved = resolved or resolve(program, inline, steps)
    duration = [0.0] * resolved.events
    sent: list[int] = []
    held: list[dict[str, list[int]]] = []
    for rank, listing in enumerate(program.ranks):
        prices = _prices(costs, rank, listing)
        for number, (seconds, _, _) in zip(resolved.event[rank], prices * resolved.steps, strict=True):
            if seconds > duration[number]:
                duration[number] = seconds
        sent.append(sum(price[2] for price in prices))
        held.append(_held(program, rank, [price[1] for price in prices]))
    start, end = sweep(resolved, duration)
    spans: list[Span] = []
    for rank, events in enumerate(resolved.event):
        positions = list(range(len(program.ranks[rank]))) * resolved.steps
        starts, ends = map(start.__getitem__, events), map(end.__getitem__, events)
        spans += map(Span, repeat(rank), positions, starts, ends)
    return Timeline("predicted", program, tuple(spans), held, tuple(sent))
