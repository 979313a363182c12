"""The communication pass: a buffer that one rank writes and another reads gets a send and a receive.

It looks at names alone. A send follows its writer; a receive is posted `ahead` compute instructions before its reader,
and on every channel in the sender's order, so that no message waits behind a later one. A channel is one direction
between two ranks for one family of buffers: forward and backward traffic never queue behind each other.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from copy import copy
from itertools import chain
from operator import itemgetter

from autotune.spec.program import COMPUTE, Buffer, Instruction, Program

Message = tuple[Instruction, Instruction]  # SEND and RECV
_reads, _writes = itemgetter(Instruction._fields.index("reads")), itemgetter(Instruction._fields.index("writes"))


def lane_of(source: int, target: int, name: str) -> str:
    """The lane of a channel, e.g. `pipe:0>1.x`."""
    return f"pipe:{source}>{target}.{name[0]}"


def communicate(program: Program, ahead: int = 1) -> Program:
    """Adds SEND and RECV for every buffer that crosses ranks; the sender frees what only the receiver reads."""
    writer, foreign, kept = _crossing(program)
    targets: dict[str, dict[int, int]] = defaultdict(dict)  # a crossing buffer -> its readers, and where they read it
    for rank, (listing, names) in enumerate(zip(program.ranks, foreign, strict=True)):
        for position, reads in enumerate(map(_reads, listing)):
            if not names.isdisjoint(reads):
                for name in reads:
                    if name in names:
                        targets[name].setdefault(rank, position)
    buffers: list[dict[str, Buffer]] = [copy(b) if isinstance(b, dict) else dict(b) for b in program.buffers]
    sends: list[dict[int, list[Instruction]]] = [defaultdict(list) for _ in buffers]  # what follows the step there
    channels: list[dict[str, list[tuple[Instruction, int]]]] = [defaultdict(list) for _ in buffers]  # in, as sent
    for rank, listing in enumerate(program.ranks):
        for position, instruction in enumerate(listing):
            for name in instruction[6]:
                if writer.get(name) != rank:
                    continue
                for number, (target, read) in enumerate(targets[name].items(), 1):
                    frees = (name,) if number == len(targets[name]) and name not in kept else ()
                    send, receive = _message(instruction, program.ranks[target][read], name, (rank, target), frees)
                    sends[rank][position].append(send)
                    channels[target][receive.lane].append((receive, read))
                    buffers[target][name] = program.buffers[rank][name]
    ranks = []
    for listing, after, incoming in zip(program.ranks, sends, channels, strict=True):
        before: dict[int, list[Instruction]] = defaultdict(list)
        computes = [position for position, i in enumerate(listing) if i[4] == COMPUTE]
        for messages in incoming.values():
            places = posted(computes, [read for _, read in messages], ahead)
            for (receive, _), place in zip(messages, places, strict=True):
                before[place].append(receive)
        out: list[Instruction] = []
        for position, instruction in enumerate(listing):
            if position in before:
                out += before[position]
            out.append(instruction)
            if position in after:
                out += after[position]
        ranks.append(tuple(out))
    return Program(tuple(ranks), tuple(buffers), program.live, program.facts)


def _crossing(program: Program) -> tuple[dict[str, int], list[set[str]], set[str]]:
    """The buffers that cross ranks: who writes each, which of them each rank reads of others, and which their own rank
    reads as well."""
    made = [set(chain.from_iterable(map(_writes, listing))) for listing in program.ranks]
    read = [set(chain.from_iterable(map(_reads, listing))) for listing in program.ranks]
    wanted = set().union(*(names - own for names, own in zip(read, made, strict=True)))
    writer = {
        name: rank
        for rank, own in enumerate(made)
        for name in own & wanted
        if not program.buffers[rank][name].persistent
    }
    foreign = [{name for name in names - own if name in writer} for names, own in zip(read, made, strict=True)]
    return writer, foreign, {name for name, rank in writer.items() if name in read[rank]}


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
    writer: Instruction, reader: Instruction, name: str, ends: tuple[int, int], frees: tuple[str, ...]
) -> Message:
    """Both ends of a message, named after the instructions that write and read it."""
    lane, meet, names = lane_of(*ends, name), f"{name}@{ends[1]}", (name,)
    send = Instruction("SEND", writer.stage, writer.item, 0, lane, names, (), frees, meet, ends)
    return send, Instruction("RECV", reader.stage, reader.item, 0, lane, (), names, (), meet, ends)
