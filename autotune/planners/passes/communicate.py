"""The communication pass: a buffer that one rank writes and another reads gets a send and a receive.

It looks at names alone. A send follows its writer; a receive is posted `ahead` compute instructions before its reader,
and on every channel in the sender's order, so that no message waits behind a later one. A channel is one direction
between two ranks for one family of buffers: forward and backward traffic never queue behind each other.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from copy import copy
from dataclasses import dataclass, field
from itertools import chain, repeat
from operator import itemgetter

from autotune.planners.passes.columns import instructions
from autotune.planners.passes.woven import woven
from autotune.spec.program import COMPUTE, Buffer, Instruction, Program, reads_of, writes_of

Listing = tuple[Instruction, ...]
_stage, _item = itemgetter(1), itemgetter(2)


def lane_of(source: int, target: int, name: str) -> str:
    """The lane of a channel, e.g. `pipe:0>1.x`."""
    return f"pipe:{source}>{target}.{name[0]}"


@dataclass
class _Channel:
    """The messages of one direction between two ranks for one family of buffers, in the sender's order."""

    ends: tuple[int, int]
    lane: str
    names: list[str] = field(default_factory=list)
    frees: list[tuple[str, ...]] = field(default_factory=list)  # of each send
    written: list[int] = field(default_factory=list)  # the sender's positions
    read: list[int] = field(default_factory=list)  # the receiver's positions

    def messages(self, op: str, listing: Listing, positions: list[int]) -> list[Instruction]:
        """One end of every message, named after the instructions at `positions`, which write or read it."""
        at, names, nothing = [listing[position] for position in positions], list(zip(self.names)), repeat(())
        sends = op == "SEND"
        buffers = (names, nothing, self.frees) if sends else (nothing, names, nothing)
        meets = [f"{name}@{self.ends[1]}" for name in self.names]
        return instructions(
            *(repeat(op), map(_stage, at), map(_item, at), repeat(0), repeat(self.lane)),
            *(*buffers, meets, repeat(self.ends), repeat(0)),
        )


def communicate(program: Program, ahead: int = 1) -> Program:
    """Adds SEND and RECV for every buffer that crosses ranks; the sender frees what only the receiver reads."""
    channels, order = _channels(program)
    buffers: list[dict[str, Buffer]] = [copy(b) if isinstance(b, dict) else dict(b) for b in program.buffers]
    before: list[dict[int, list[Instruction]]] = [defaultdict(list) for _ in buffers]
    after: list[dict[int, list[Instruction]]] = [defaultdict(list) for _ in buffers]
    computes = [[position for position, i in enumerate(listing) if i[4] == COMPUTE] for listing in program.ranks]
    for channel in channels:
        source, target = channel.ends
        buffers[target] |= {name: program.buffers[source][name] for name in channel.names}
        places = posted(computes[target], channel.read, ahead)
        for place, receive in zip(places, channel.messages("RECV", program.ranks[target], channel.read), strict=True):
            before[target][place].append(receive)
    sends = [iter(channel.messages("SEND", program.ranks[channel.ends[0]], channel.written)) for channel in channels]
    for rank, written in enumerate(order):
        for position, number in written:
            after[rank][position].append(next(sends[number]))
    ranks = tuple(map(tuple, map(woven, program.ranks, before, after)))
    return Program(ranks, tuple(buffers), program.live, program.facts)


def _channels(program: Program) -> tuple[list[_Channel], list[list[tuple[int, int]]]]:
    """Every channel; and of each rank where it sends, in its order: (position, which channel)."""
    readers, writer, kept = _crossing(program)
    found: dict[tuple[int, int, str], int] = {}
    channels: list[_Channel] = []
    order: list[list[tuple[int, int]]] = []
    for rank, listing in enumerate(program.ranks):
        own, sent = {name for name, source in writer.items() if source == rank}, list[tuple[int, int]]()
        for position, writes in enumerate(map(writes_of, listing)):
            for name in () if own.isdisjoint(writes) else writes:
                targets = readers[name] if name in own else {}
                for number, (target, read) in enumerate(targets.items(), 1):
                    which = found.setdefault((rank, target, name[0]), len(channels))
                    if which == len(channels):
                        channels.append(_Channel((rank, target), lane_of(rank, target, name)))
                    channel = channels[which]
                    channel.names.append(name)
                    channel.frees.append((name,) if number == len(targets) and name not in kept else ())
                    channel.written.append(position)
                    channel.read.append(read)
                    sent.append((position, which))
        order.append(sent)
    return channels, order


def _crossing(program: Program) -> tuple[dict[str, dict[int, int]], dict[str, int], set[str]]:
    """The buffers that cross ranks: which others read each, and where first; who writes it; and which of them their own
    rank reads as well."""
    made = [set(chain.from_iterable(map(writes_of, listing))) for listing in program.ranks]
    read = [set(chain.from_iterable(map(reads_of, listing))) for listing in program.ranks]
    wanted = set().union(*(names - own for names, own in zip(read, made, strict=True)))
    writer = {
        name: rank
        for rank, own in enumerate(made)
        for name in own & wanted
        if not program.buffers[rank][name].persistent
    }
    readers: dict[str, dict[int, int]] = defaultdict(dict)
    for rank, listing in enumerate(program.ranks):
        foreign = (read[rank] - made[rank]) & writer.keys()
        for position, reads in enumerate(map(reads_of, listing)):
            for name in () if foreign.isdisjoint(reads) else reads:
                if name in foreign:
                    readers[name].setdefault(rank, position)
    return readers, writer, {name for name, rank in writer.items() if name in read[rank]}


def posted(computes: list[int], reads: list[int], ahead: int) -> list[int]:
    """Where the receives of one channel, read at `reads`, are posted: `ahead` compute instructions early, and never
    after a later message's."""
    found: list[int] = []
    latest = reads[-1]
    for position in reversed(reads):
        early = max(0, bisect_left(computes, position) - ahead)
        latest = min(latest, position, computes[early] if early < len(computes) else position)
        found.append(latest)
    return found[::-1]
