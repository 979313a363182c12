"""Checks a program before anything runs or prices it: buffers, meetings, lanes. Each fault names its place."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator
from itertools import chain

from autotune.planners.resolve import resolve, uncollected
from autotune.spec.errors import UsageError
from autotune.spec.program import Program, writes_of

Meetings = dict[tuple[str, tuple[int, ...], str], list[int]]  # (name, peers, lane) -> the ranks that come so


def faults(program: Program) -> list[str]:
    """Everything wrong with the buffers and meetings of a program, or an empty list."""
    found: list[str] = []
    meetings: Meetings = defaultdict(list)
    for rank, listing in enumerate(program.ranks):
        for position, text in _of_rank(program, rank, meetings):
            place = f" step {position} ({listing[position].label})" if position < len(listing) else ""
            found.append(f"rank {rank}{place}: {text}")
    return found + _unmet(meetings)


def _unmet(meetings: Meetings) -> list[str]:
    """Meetings that not all of their peers come to, once each, or that they do not agree about."""
    by_name: dict[str, list[tuple[int, tuple[int, ...], str]]] = defaultdict(list)
    names = Counter(name for name, _, _ in meetings)
    whole = {peers: sorted(peers) for _, peers, _ in meetings}
    for (name, peers, lane), ranks in meetings.items():
        if names[name] > 1 or ranks != whole[peers]:
            by_name[name] += [(rank, peers, lane) for rank in ranks]
    found = []
    for name, members in by_name.items():
        times, peers_of = Counter(rank for rank, _, _ in members), {peers for _, peers, _ in members}
        if len(peers_of) > 1 or set(times) != set(next(iter(peers_of))) or max(times.values()) > 1:
            came = f"ranks {sorted(times.elements())} came, each naming peers {sorted(peers_of)}"
            found.append(f"meeting {name}: {came}")
        elif len(lanes := {lane for _, _, lane in members}) > 1:
            found.append(f"meeting {name}: its ranks come on different lanes, {', '.join(sorted(lanes))}")
    return found


def _of_rank(program: Program, rank: int, meetings: Meetings) -> Iterator[tuple[int, str]]:
    """(position, what is wrong there) of one rank; its meetings are added to `meetings`.

    What is right shows in a few set operations an instruction; names are looked at where something is not.
    """
    listing, buffers, given = program.ranks[rank], program.buffers[rank], program.given(rank)
    live, freed, lagged = set(given), set[str](), set[str]()
    written = set(chain.from_iterable(map(writes_of, listing)))
    declared = buffers.keys() >= written
    for position, (_, _, _, _, lane, reads, writes, frees, meet, peers, lag) in enumerate(listing):
        if not declared or not live.issuperset(reads):
            for name in reads:
                if name in live and name in buffers:
                    continue
                if name not in buffers:
                    yield position, f"reads {name}, which is no buffer of this rank"
                elif lag and name not in given and name not in written:
                    yield position, f"reads {name} of {lag} steps ago, which no step ever writes"
                elif not lag:
                    why = "after it was freed" if name in freed else "before anything wrote it"
                    yield position, f"reads {name} {why}"
        if not declared or not live.isdisjoint(writes):
            for name in writes:
                if name not in buffers:
                    yield position, f"writes {name}, which is no buffer of this rank"
                elif name in live and name not in given and name not in reads:
                    yield position, f"writes {name}, which is live and not read here"
        live.update(writes)
        if frees:
            if len(live.intersection(frees)) < len(frees) or not given.isdisjoint(frees):
                gone = set(freed)
                for name in frees:
                    if name in buffers and buffers[name].persistent:
                        yield position, f"frees {name}, which outlives the step"
                    elif name not in live or name in gone - freed:
                        yield position, f"frees {name} {'twice' if name in gone else 'before it was written'}"
                    gone.add(name)
            live.difference_update(frees)
            freed.update(frees)
        if lag:
            lagged.update(reads)
        if meet is not None:
            meetings[meet, peers, lane].append(rank)
        elif len(peers) > 1:
            yield position, "has peers but no meeting"
    left = {name for name in live - lagged if name in buffers and not buffers[name].persistent and buffers[name].size}
    if left and not program.facts.get("leaves"):
        yield len(listing), f"never frees {', '.join(sorted(left))}"


def validate(program: Program, inline: bool = False) -> None:
    """Raises UsageError with every fault, or with the table of the deadlock."""
    with uncollected():
        found = faults(program)
    if found:
        raise UsageError("\n".join(["the program is not sound:", *(f"  {line}" for line in found[:20])]))
    resolve(program, inline)
