"""The communication pass: a buffer that one rank writes and another reads gets a send and a receive.

It looks at names alone. A send follows its writer; a receive is posted `ahead` compute instructions before its reader,
and on every channel in the sender's order, so that no message waits behind a later one. A channel is one direction
between two ranks for one family of buffers: forward and backward traffic never queue behind each other.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict

from autotune.spec.program import COMPUTE, Instruction, Program


def lane_of(source: int, target: int, name: str) -> str:
    """The lane of a channel, e.g. `pipe:0>1.x`."""
    return f"pipe:{source}>{target}.{name[0]}"


def communicate(program: Program, ahead: int = 1) -> Program:
    """Adds SEND and RECV for every buffer that crosses ranks; the sender frees what only the receiver reads."""
    made = [{name for i in listing for name in i.writes} for listing in program.ranks]  # what a rank has by itself
    writer = {
        name: rank
        for rank, listing in enumerate(program.ranks)
        for instruction in listing
        for name in instruction.writes
        if not program.buffers[rank][name].persistent
    }
    targets: dict[str, dict[int, int]] = defaultdict(dict)  # a crossing buffer -> its readers, and where they read it
    kept: set[str] = set()  # buffers that their own rank reads
    for rank, listing in enumerate(program.ranks):
        for position, instruction in enumerate(listing):
            for name in instruction.reads:
                if name in made[rank] or name not in writer:
                    kept.add(name)
                else:
                    targets[name].setdefault(rank, position)
    buffers = [dict(b) for b in program.buffers]
    sends: list[list[tuple[Instruction, list[Instruction]]]] = []  # each instruction and the sends that follow it
    channels: list[dict[str, list[str]]] = [defaultdict(list) for _ in buffers]  # (receiver) lane -> names as sent
    for rank, listing in enumerate(program.ranks):
        sends.append([])
        for instruction in listing:
            after: list[Instruction] = []
            for name in instruction.writes:
                crossing = targets.get(name, ()) if writer.get(name) == rank else ()
                for number, target in enumerate(crossing, 1):
                    frees = (name,) if name not in kept and number == len(crossing) else ()
                    after.append(_message("SEND", instruction, name, (rank, target), (name,), (), frees))
                    channels[target][after[-1].lane].append(name)
                    buffers[target][name] = program.buffers[rank][name]
            sends[-1].append((instruction, after))
    ranks = []
    for rank, listing in enumerate(program.ranks):
        before: dict[int, list[Instruction]] = defaultdict(list)
        computes = [position for position, i in enumerate(listing) if i.lane == COMPUTE]
        for names in channels[rank].values():
            reads = [targets[name][rank] for name in names]
            for name, read, post in zip(names, reads, posted(computes, reads, ahead), strict=True):
                ends = (writer[name], rank)
                before[post].append(_message("RECV", listing[read], name, ends, (), (name,), ()))
        out: list[Instruction] = []
        for position, (instruction, after) in enumerate(sends[rank]):
            if position in before:
                out += before[position]
            out.append(instruction)
            out += after
        ranks.append(tuple(out))
    return Program(tuple(ranks), tuple(buffers), program.live, program.facts)


def posted(computes: list[int], reads: list[int], ahead: int) -> list[int]:
    """Where the receives of one channel, read at `reads`, are posted: `ahead` compute instructions early, and never
    after a later message's."""
    found: list[int] = []
    latest = reads[-1]
    for position in reversed(reads):
        early = max(0, bisect_left(computes, position) - ahead)
        latest = min(latest, position, *computes[early : early + 1])
        found.append(latest)
    return found[::-1]


def _message(
    op: str,
    end: Instruction,
    name: str,
    ends: tuple[int, int],
    reads: tuple[str, ...],
    writes: tuple[str, ...],
    frees: tuple[str, ...],
) -> Instruction:
    """One end of a message: `end` is the instruction that wrote or will read it."""
    lane = lane_of(*ends, name)
    return Instruction(op, end.stage, end.item, 0, lane, reads, writes, frees, f"{name}@{ends[1]}", ends)
