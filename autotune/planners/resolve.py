"""Who waits for whom in a program: the graph that the simulator sweeps, or the table of a deadlock.

Lanes, buffers, meetings and lag are all that orders instructions, so the graph is a property of the lists alone:
programs that share their lists (`Shared`) share it, whatever their buffers weigh.
"""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

from autotune.spec.errors import UsageError
from autotune.spec.program import COMPUTE, Instruction, Program, reads_of, uses_of, writes_of


@dataclass(frozen=True)
class Resolved:
    """A program as a graph. An event is one instruction, or one meeting of several; `order` is topological.

    A wait that the lane's own order already implies is left out.
    """

    order: Sequence[int]
    waits: Sequence[Sequence[int]]  # [event] -> events it waits for
    event: tuple[tuple[int, ...], ...]  # [rank][position + step x length] -> event
    steps: int

    @property
    def events(self) -> int:
        return len(self.waits)


class Shared(tuple[tuple[Instruction, ...], ...]):
    """The lists of a program that others will share: what has been found out about them is kept with them."""

    memo: dict[Any, Any]

    def __init__(self, ranks: Sequence[tuple[Instruction, ...]]) -> None:
        self.memo = {}


@contextmanager
def uncollected() -> Iterator[None]:
    """Pauses the cyclic collector: tens of thousands of small tuples are made, none of them in a cycle."""
    on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if on:
            gc.enable()


def resolve(program: Program, inline: bool = False, steps: int = 1) -> Resolved:
    """Who waits for whom in `steps` steps. `inline`: the host that issues also computes, so issue waits for it (a CPU).

    Raises UsageError for a read of what was never written, a meeting that is incomplete, and a deadlock.
    """
    given = tuple(map(program.given, range(program.world)))
    memo = program.ranks.memo if isinstance(program.ranks, Shared) else {}
    key = (inline, steps, given)
    if key not in memo:
        with uncollected():
            memo[key] = _graph(program, given, inline, steps)
    found: Resolved = memo[key]
    return found


def own_waits(listing: Sequence[Instruction], given: frozenset[str], inline: bool = False) -> list[list[int]]:
    """Who waits for whom in one rank's list alone: [position] -> earlier positions. No meeting is waited for."""
    graph = _Graph(inline, 1)
    graph.add(0, [i if i.meet is None else i._replace(meet=None) for i in listing], given)
    return graph.waits


def _graph(program: Program, given: tuple[frozenset[str], ...], inline: bool, steps: int) -> Resolved:
    graph = _Graph(inline, steps)
    event = [graph.add(rank, listing, given[rank]) for rank, listing in enumerate(program.ranks)]
    if any(graph.absent.values()):
        name = next(meet for (meet, _), number in graph.meetings.items() if graph.absent[number])
        came = {rank: i.peers for rank, _, i in program if i.meet == name}
        raise UsageError(f"meeting {name}: only ranks {sorted(came)} came, naming peers {sorted(set(came.values()))}")
    return Resolved(_topological(program, event, graph.waits), graph.waits, tuple(map(tuple, event)), steps)


@dataclass
class _Graph:
    """The graph while ranks are added to it, one after another."""

    inline: bool
    steps: int
    waits: list[list[int]] = field(default_factory=list)
    lanes: list[str] = field(default_factory=list)  # of every event
    meetings: dict[tuple[str, int], int] = field(default_factory=dict)  # (meeting, step) -> event
    absent: dict[int, int] = field(default_factory=dict)  # a meeting's event -> how many have not come yet

    def add(self, rank: int, listing: Sequence[Instruction], given: frozenset[str]) -> list[int]:
        """Adds one rank's instructions and gives the event of each."""
        waits, lanes, inline, meetings, absent = self.waits, self.lanes, self.inline, self.meetings, self.absent
        shared, writes_a_step = _shared(rank, listing, given)
        changed = {n for n, count in writes_a_step.items() if count > 1 or self.steps > 1 or n in given}
        lagged = {name for i in listing if i[-1] for name in i.reads}
        newest: dict[str, int] = {}  # a live buffer's last writer
        versions: dict[str, list[int]] = {name: [] for name in lagged}  # all writers, oldest first
        readers: dict[str, dict[str, int]] = {}  # on each lane, who last read the newest version of what changes later
        tail: dict[str, int] = {}  # each lane's last event
        mine: list[int] = []
        for step in range(self.steps):
            for _, _, _, _, lane, reads, writes, frees, meet, peers, lag in listing:
                if meet is None:
                    number = len(waits)
                    wait: list[int] = []
                    waits.append(wait)
                    lanes.append(lane)
                else:
                    number = meetings.setdefault((meet, step), len(waits))
                    if number == len(waits):
                        waits.append([])
                        lanes.append(lane)
                        absent[number] = max(1, len(peers))
                    absent[number] -= 1
                    wait = waits[number]
                mine.append(number)
                if lane in tail:
                    wait.append(tail[lane])
                if inline and lane != COMPUTE and COMPUTE in tail:
                    wait.append(tail[COMPUTE])
                tail[lane] = number
                for name in () if shared.isdisjoint(reads) else reads:
                    if name not in shared:
                        continue
                    if lag:
                        back, old = lag * writes_a_step[name] + 1, versions[name]
                        made = old[-back] if len(old) >= back else None
                        known = bool(old) or step < lag
                    else:
                        made = newest.get(name)
                        known = made is not None
                    if made is not None:
                        if lanes[made] != lane:
                            wait.append(made)
                    elif not known and name not in given:
                        raise _unwritten(rank, listing[(len(mine) - 1) % len(listing)], name)
                    if name in changed:
                        readers.setdefault(name, {})[lane] = number
                for name in () if shared.isdisjoint(writes) else writes:
                    if name not in shared:
                        continue
                    if name in changed:  # what is changed in place must have been written and read
                        before = readers.pop(name, {})
                        if name in newest:
                            maker = lanes[newest[name]]
                            before[maker] = max(newest[name], before.get(maker, -1))
                        wait += [n for other, n in before.items() if other != lane]
                    newest[name] = number
                    if name in lagged:
                        versions[name].append(number)
                for name in () if shared.isdisjoint(frees) else frees:
                    newest.pop(name, None)
                    readers.pop(name, None)
        return mine


def _shared(rank: int, listing: Sequence[Instruction], given: frozenset[str]) -> tuple[set[str], Counter[str]]:
    """The buffers that other lanes than compute use, and how often each is written. The uses of the rest, which are
    most, follow one another as the lane's instructions do."""
    shared = set(chain.from_iterable(chain.from_iterable(map(uses_of, [i for i in listing if i[4] != COMPUTE]))))
    written = set(chain.from_iterable(map(writes_of, listing)))
    if unwritten := set(chain.from_iterable(map(reads_of, listing))) - written - given:
        reader, name = next((i, name) for i in listing for name in i.reads if name in unwritten)
        raise _unwritten(rank, reader, name)
    return shared, Counter(filter(shared.__contains__, chain.from_iterable(map(writes_of, listing))))


def _unwritten(rank: int, reader: Instruction, name: str) -> UsageError:
    return UsageError(f"rank {rank}: {reader.label} reads {name}, which nothing has written")


def _topological(program: Program, event: list[list[int]], waits: list[list[int]]) -> list[int]:
    """Kahn's order, or the deadlock that forbids one."""
    followers: list[list[int]] = [[] for _ in waits]
    missing = list(map(len, waits))
    for number, wait in enumerate(waits):
        for earlier in wait:
            followers[earlier].append(number)
    order = [number for number, count in enumerate(missing) if not count]
    for number in order:  # grows while it is read
        for follower in followers[number]:
            missing[follower] -= 1
            if not missing[follower]:
                order.append(follower)
    if len(order) < len(waits):
        raise UsageError(deadlock(program, event, set(order)))
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
