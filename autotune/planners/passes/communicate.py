"""The communication pass: a buffer that one rank writes and another reads gets a send and a receive.

It looks at names alone. A send follows its writer; a receive is posted `ahead` compute instructions before its reader,
and on every channel in the sender's order, so that no message waits behind a later one. A channel is one direction
between two ranks for one family of buffers: forward and backward traffic never queue behind each other.
"""

from __future__ import annotations

from collections import defaultdict

from autotune.spec.program import COMPUTE, Instruction, Program


def lane_of(source: int, target: int, name: str) -> str:
    """The lane of a channel, e.g. `pipe:0>1.x`."""
    return f"pipe:{source}>{target}.{name[0]}"


def communicate(program: Program, ahead: int = 1) -> Program:
    """Adds SEND and RECV for every buffer that crosses ranks; the sender frees what only the receiver reads."""
    writer: dict[str, int] = {}
    for rank, _, instruction in program:
        for name in instruction.writes:
            if not program.buffers[rank][name].persistent:
                writer[name] = rank
    receives: dict[tuple[int, str], list[tuple[str, int]]] = defaultdict(list)  # (rank, lane) -> (name, reader)
    readers: dict[str, list[int]] = defaultdict(list)
    kept: set[str] = set()  # crossing buffers that their own rank reads too
    for rank, position, instruction in program:
        for name in instruction.reads:
            source = writer.get(name, rank)
            if source == rank:
                kept.add(name)
            elif rank not in readers[name]:
                readers[name].append(rank)
                receives[rank, lane_of(source, rank, name)].append((name, position))
    ranks, buffers = [], [dict(b) for b in program.buffers]
    sent_order: dict[str, int] = {}
    after: dict[tuple[int, int], list[Instruction]] = defaultdict(list)
    for rank, position, instruction in program:
        for name in instruction.writes:
            targets = readers.get(name, []) if writer.get(name) == rank else []
            for number, target in enumerate(targets):
                sent_order[name] = len(sent_order)
                frees = (name,) if name not in kept and number == len(targets) - 1 else ()
                after[rank, position].append(
                    _message("SEND", instruction, name, rank, target)._replace(reads=(name,), frees=frees)
                )
                buffers[target][name] = program.buffers[rank][name]
    for rank, listing in enumerate(program.ranks):
        before: dict[int, list[Instruction]] = defaultdict(list)
        for (receiver, _), messages in receives.items():
            if receiver == rank:
                place = dict(messages)
                for name, position in _posted(listing, messages, sent_order, ahead):
                    reader = listing[place[name]]
                    before[position].append(_message("RECV", reader, name, writer[name], rank)._replace(writes=(name,)))
        out: list[Instruction] = []
        for position, instruction in enumerate(listing):
            out += before.get(position, ())
            out.append(instruction)
            out += after.get((rank, position), ())
        ranks.append(tuple(out))
    return Program(tuple(ranks), tuple(buffers), program.live, program.facts)


def _posted(
    listing: tuple[Instruction, ...], messages: list[tuple[str, int]], sent: dict[str, int], ahead: int
) -> list[tuple[str, int]]:
    """Where each receive is posted: `ahead` compute instructions early, and never after a later message's."""
    computes = [i for i, instruction in enumerate(listing) if instruction.lane == COMPUTE]
    index = {position: k for k, position in enumerate(computes)}
    ordered = sorted(messages, key=lambda message: sent[message[0]])
    posted: list[tuple[str, int]] = []
    latest = len(listing)
    for name, position in reversed(ordered):
        latest = min(latest, computes[max(0, index[position] - ahead)])
        posted.append((name, latest))
    return posted[::-1]


def _message(op: str, end: Instruction, name: str, source: int, target: int) -> Instruction:
    return Instruction(
        op, end.stage, end.item, lane=lane_of(source, target, name), meet=f"{name}@{target}", peers=(source, target)
    )
