"""Checks a program before anything runs or prices it: buffers, meetings, lanes. Each fault names its place."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator

from autotune.planners.simulate import resolve
from autotune.spec.errors import UsageError
from autotune.spec.program import Program

Meetings = dict[str, list[tuple[int, tuple[int, ...], str]]]  # name -> (rank, peers, lane) of those that come


def faults(program: Program) -> list[str]:
    """Everything wrong with the buffers and meetings of a program, or an empty list."""
    found: list[str] = []
    meetings: Meetings = defaultdict(list)
    for rank, listing in enumerate(program.ranks):
        for position, text in _of_rank(program, rank, meetings):
            found.append(f"rank {rank} step {position} ({listing[position].label}): {text}")
        if left := _left(program, rank):
            found.append(f"rank {rank}: never frees {', '.join(sorted(left))}")
    for meet, members in meetings.items():
        ranks = Counter(rank for rank, _, _ in members)
        peers = {p for _, p, _ in members}
        if len(peers) > 1 or set(ranks) != set(next(iter(peers))) or max(ranks.values()) > 1:
            found.append(f"meeting {meet}: ranks {sorted(ranks.elements())} came, each naming peers {sorted(peers)}")
        elif len(lanes := {lane for _, _, lane in members}) > 1:
            found.append(f"meeting {meet}: its ranks come on different lanes, {', '.join(sorted(lanes))}")
    return found


def _of_rank(program: Program, rank: int, meetings: Meetings) -> Iterator[tuple[int, str]]:
    """(position, what is wrong there) of one rank; its meetings are added to `meetings`."""
    listing, buffers, given = program.ranks[rank], program.buffers[rank], program.given(rank)
    live, freed = set(given), set[str]()
    written = {n for i in listing for n in i.writes}
    for position, (_, _, _, _, lane, reads, writes, frees, meet, peers, lag) in enumerate(listing):
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
        for name in writes:
            if name not in buffers:
                yield position, f"writes {name}, which is no buffer of this rank"
            elif name in live and name not in given and name not in reads:
                yield position, f"writes {name}, which is live and not read here"
            live.add(name)
        for name in frees:
            if name in buffers and buffers[name].persistent:
                yield position, f"frees {name}, which outlives the step"
            elif name not in live:
                yield position, f"frees {name} {'twice' if name in freed else 'before it was written'}"
            live.discard(name)
            freed.add(name)
        if meet is not None:
            meetings[meet].append((rank, peers, lane))
        elif len(peers) > 1:
            yield position, "has peers but no meeting"


def _left(program: Program, rank: int) -> set[str]:
    """Buffers with bytes that are live when the rank's list ends and are not meant to be."""
    if program.facts.get("leaves"):
        return set()
    live, listing, buffers = set(program.given(rank)), program.ranks[rank], program.buffers[rank]
    lagged = set[str]()
    for instruction in listing:
        live.update(instruction.writes)
        live.difference_update(instruction.frees)
        if instruction.lag:
            lagged.update(instruction.reads)
    return {n for n in live if n in buffers and not buffers[n].persistent and buffers[n].size and n not in lagged}


def validate(program: Program, inline: bool = False) -> None:
    """Raises UsageError with every fault, or with the table of the deadlock."""
    found = faults(program)
    if found:
        raise UsageError("\n".join(["the program is not sound:", *(f"  {line}" for line in found[:20])]))
    resolve(program, inline)
