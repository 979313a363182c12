"""Checks a program before anything runs or prices it: buffers, meetings, lanes. Each fault names its place."""

from __future__ import annotations

from collections import Counter, defaultdict

from autotune.planners.simulate import resolve
from autotune.spec.errors import UsageError
from autotune.spec.program import Program


def faults(program: Program) -> list[str]:
    """Everything wrong with the buffers and meetings of a program, or an empty list."""
    found: list[str] = []
    meetings: dict[str, list[tuple[int, tuple[int, ...], str]]] = defaultdict(list)  # (rank, peers, lane)
    for rank, listing in enumerate(program.ranks):
        buffers, given = program.buffers[rank], program.given(rank)
        live, freed = set(given), set[str]()
        lagged = {n for i in listing if i.lag for n in i.reads}
        written = {n for i in listing for n in i.writes}
        for position, instruction in enumerate(listing):
            where = f"rank {rank} step {position} ({instruction.label})"
            for name in instruction.reads:
                if name not in buffers:
                    found.append(f"{where}: reads {name}, which is no buffer of this rank")
                elif instruction.lag and name not in given and name not in written:
                    found.append(f"{where}: reads {name} of {instruction.lag} steps ago, which no step ever writes")
                elif name not in live and not instruction.lag:
                    why = "after it was freed" if name in freed else "before anything wrote it"
                    found.append(f"{where}: reads {name} {why}")
            for name in instruction.writes:
                if name not in buffers:
                    found.append(f"{where}: writes {name}, which is no buffer of this rank")
                elif name in live and name not in given and name not in instruction.reads:
                    found.append(f"{where}: writes {name}, which is live and not read here")
                live.add(name)
            for name in instruction.frees:
                if name in buffers and buffers[name].persistent:
                    found.append(f"{where}: frees {name}, which outlives the step")
                elif name not in live:
                    found.append(f"{where}: frees {name} {'twice' if name in freed else 'before it was written'}")
                live.discard(name)
                freed.add(name)
            if instruction.meet is not None:
                meetings[instruction.meet].append((rank, instruction.peers, instruction.lane))
            elif len(instruction.peers) > 1:
                found.append(f"{where}: has peers but no meeting")
        left = {n for n in live if n in buffers and not buffers[n].persistent and buffers[n].size and n not in lagged}
        if left and not program.facts.get("leaves"):
            found.append(f"rank {rank}: never frees {', '.join(sorted(left))}")
    for meet, members in meetings.items():
        ranks = Counter(rank for rank, _, _ in members)
        peers = {p for _, p, _ in members}
        if len(peers) > 1 or set(ranks) != set(next(iter(peers))) or max(ranks.values()) > 1:
            found.append(f"meeting {meet}: ranks {sorted(ranks.elements())} came, each naming peers {sorted(peers)}")
        elif len(lanes := {lane for _, _, lane in members}) > 1:
            found.append(f"meeting {meet}: its ranks come on different lanes, {', '.join(sorted(lanes))}")
    return found


def validate(program: Program, inline: bool = False) -> None:
    """Raises UsageError with every fault, or with the table of the deadlock."""
    found = faults(program)
    if found:
        raise UsageError("\n".join(["the program is not sound:", *(f"  {line}" for line in found[:20])]))
    resolve(program, inline)
