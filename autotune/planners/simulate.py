"""The simulator: a program and a cost table give a timeline. It knows lanes, buffers, meetings and lag, no technique.

A program fixes the order of every lane, so its time is a longest path: the dependencies are resolved once
(`resolve`) and a sweep in topological order gives every start and end. Memory needs no time at all: it is a walk in
issue order (`memory`). What cannot be ordered is refused with a table that shows where each rank waits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from autotune.spec.errors import UsageError
from autotune.spec.program import COMPUTE, Instruction, Program
from autotune.spec.timeline import Span, Timeline


class Costs(Protocol):
    """What an instruction costs on a rank. Rules of these tables must not depend on anything but the arguments."""

    def seconds(self, rank: int, instruction: Instruction) -> float:
        """Its duration once every rank that meets is ready."""

    def transient(self, rank: int, instruction: Instruction) -> int:
        """Device bytes it takes while it runs and gives back before it ends."""

    def sent(self, rank: int, instruction: Instruction) -> int:
        """Bytes this rank puts on a link in it."""


@dataclass(frozen=True)
class Resolved:
    """A program as a graph. Event e is one instruction, or one meeting of several; `order` is topological."""

    order: tuple[tuple[int, tuple[int, ...]], ...]  # (event, the events it waits for)
    event: tuple[tuple[int, ...], ...]  # [rank][position + step x length] -> event
    events: int
    steps: int


def resolve(program: Program, inline: bool = False, steps: int = 1) -> Resolved:
    """Who waits for whom. `inline`: the host that issues also computes, so issue waits for compute (a CPU).

    Raises UsageError for a read of what was never written, a meeting that is incomplete, and a deadlock.
    """
    meetings: dict[tuple[str, int], int] = {}
    event: list[list[int]] = []
    waits: list[set[int]] = []
    for rank, listing in enumerate(program.ranks):
        given = program.given(rank)
        versions: dict[str, list[int]] = {}  # a buffer's writers, oldest first
        readers: dict[str, list[int]] = {}  # who has read its newest version
        lane: dict[str, int] = {}
        mine: list[int] = []
        for step in range(steps):
            for instruction in listing:
                if instruction.meet is None:
                    number = len(waits)
                    waits.append(set())
                else:
                    key = (instruction.meet, step)
                    number = meetings.setdefault(key, len(waits))
                    if number == len(waits):
                        waits.append(set())
                mine.append(number)
                wait = waits[number]
                if instruction.lane in lane:
                    wait.add(lane[instruction.lane])
                if inline and COMPUTE in lane:
                    wait.add(lane[COMPUTE])
                lane[instruction.lane] = number
                for name in instruction.reads:
                    written = versions.get(name, ())
                    if len(written) > instruction.lag:
                        wait.add(written[-1 - instruction.lag])
                    elif not written and name not in given and step >= instruction.lag:
                        raise UsageError(f"rank {rank}: {instruction.label} reads {name}, which nothing has written")
                    readers.setdefault(name, []).append(number)
                for name in instruction.writes:
                    if name in given:  # a new version overwrites what others may still be reading
                        wait.update(readers.pop(name, ()))
                    versions.setdefault(name, []).append(number)
                wait.discard(number)
        event.append(mine)
    order = _topological(program, event, waits)
    return Resolved(tuple(order), tuple(map(tuple, event)), len(waits), steps)


def _topological(program: Program, event: list[list[int]], waits: list[set[int]]) -> list[tuple[int, tuple[int, ...]]]:
    """Kahn's order, or the deadlock that forbids one."""
    followers: list[list[int]] = [[] for _ in waits]
    missing = [len(w) for w in waits]
    for number, wait in enumerate(waits):
        for earlier in wait:
            followers[earlier].append(number)
    ready = [n for n, count in enumerate(missing) if not count]
    order: list[tuple[int, tuple[int, ...]]] = []
    for number in ready:  # grows while it is read
        order.append((number, tuple(waits[number])))
        for follower in followers[number]:
            missing[follower] -= 1
            if not missing[follower]:
                ready.append(follower)
    if len(order) < len(waits):
        raise UsageError(deadlock(program, event, {n for n, _ in order}))
    return order


def deadlock(program: Program, event: list[list[int]], done: set[int]) -> str:
    """The rank-by-step table of a program that cannot go on: how far each rank came, and what it is stuck in."""
    rows = ["the program deadlocks; each rank with the steps it can finish and the first it cannot:"]
    for rank, listing in enumerate(program.ranks):
        stuck = [i for i, number in enumerate(event[rank]) if number not in done]
        finished = [listing[i % len(listing)].label for i, n in enumerate(event[rank]) if n in done]
        shown = " ".join(["..."] * (len(finished) > 6) + finished[-6:])
        if stuck:
            at = listing[stuck[0] % len(listing)]
            want = f" (meets ranks {', '.join(map(str, at.peers))} at {at.meet})" if at.meet else ""
            rows.append(f"  rank {rank} step {stuck[0]}: {shown} | waits in {at.label} on lane {at.lane}{want}")
        else:
            rows.append(f"  rank {rank}: {shown} | done")
    return "\n".join(rows)


def sweep(resolved: Resolved, duration: list[float]) -> tuple[list[float], list[float]]:
    """Start and end of every event: the longest path, in one pass."""
    start, end = [0.0] * resolved.events, [0.0] * resolved.events
    for number, wait in resolved.order:
        at = 0.0
        for earlier in wait:
            done = end[earlier]
            if done > at:
                at = done
        start[number] = at
        end[number] = at + duration[number]
    return start, end


def memory(program: Program, transient: Callable[[int, Instruction], int]) -> list[dict[str, list[int]]]:
    """Bytes in each tier while each instruction runs, in issue order. Lagged versions are held all along."""
    walked: list[dict[str, list[int]]] = []
    for rank, listing in enumerate(program.ranks):
        buffers = program.buffers[rank]
        lagged = {n: i.lag for i in listing if i.lag for n in i.reads}
        given = program.given(rank)
        now: dict[str, int] = {}
        for name, buffer in buffers.items():
            held = (name in given) + lagged.get(name, 0)
            now[buffer.tier] = now.get(buffer.tier, 0) + buffer.size * held
        live = set(given)
        tiers: dict[str, list[int]] = {tier: [] for tier in now} or {"device": []}
        for instruction in listing:
            for name in instruction.writes:
                if name not in live:
                    live.add(name)
                    now[buffers[name].tier] += buffers[name].size
            for tier, series in tiers.items():
                series.append(now[tier])
            if extra := transient(rank, instruction):
                tiers["device"][-1] += extra
            for name in instruction.frees:
                live.discard(name)
                now[buffers[name].tier] -= buffers[name].size
        walked.append(tiers)
    return walked


def simulate(
    program: Program, costs: Costs, *, inline: bool = False, resolved: Resolved | None = None, steps: int = 1
) -> Timeline:
    """The predicted timeline of `steps` steps in a row (memory and bytes sent are those of one)."""
    resolved = resolved or resolve(program, inline, steps)
    duration = [0.0] * resolved.events
    sent = []
    for rank, listing in enumerate(program.ranks):
        events, total, length = resolved.event[rank], 0, len(listing)
        for position, instruction in enumerate(listing):
            seconds = costs.seconds(rank, instruction)
            for number in events[position::length]:
                if seconds > duration[number]:
                    duration[number] = seconds
            if instruction.peers:
                total += costs.sent(rank, instruction)
        sent.append(total)
    start, end = sweep(resolved, duration)
    spans = tuple(
        Span(rank, position % len(program.ranks[rank]), start[number], end[number])
        for rank, events in enumerate(resolved.event)
        for position, number in enumerate(events)
    )
    return Timeline("predicted", program, spans, memory(program, costs.transient), tuple(sent))
