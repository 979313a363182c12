"""What ranks that share sequences do around attention: heads for tokens (Ulysses), keys in a ring, or both (USP).

Each rank has a part of every sequence's tokens with all heads of its tensor rank.

Ulysses (2309.14509, section 3.1): before attention an all-to-all gives a rank more tokens of its share of the heads,
after it every head of its own tokens again. What is sent to each rank lies together, so the values are laid out anew
on both sides; all of it is linear, and the gradient of each step is the other's (EXCHANGES).

Ring (2105.13120; with blocks merged as they come, 2310.01889): keys and values go from rank to rank, and the queries
attend to each block as it passes. Rank r of n has the r-th and the r-th last of 2 n equal pieces of each sequence
("zigzag"): each block is then the same work for every rank. Blocks are merged into o and lse in place, so each block's
gradient needs the final ones alone; keys go around again in the backward, the other way, and their gradients with them.

Both (USP, 2405.07719): ranks next to each other exchange heads for the tokens of one place in the ring.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

from autotune.planners.lower.shape import Shape
from autotune.spec.opset import NO_NODE
from autotune.spec.program import CONTEXT, RING, Instruction

# Of each step, the one that takes its gradient back. Ranks are numbered as their tokens follow one another.
EXCHANGES = {
    "heads_apart": "heads_together",  # local tokens of several values: by rank, whose heads they are
    "heads_together": "heads_apart",
    "tokens_together": "tokens_apart",  # by rank, whose tokens they are: whole sequences of several values
    "tokens_apart": "tokens_together",
    "all_to_all": "all_to_all",
    "shift": "shift_back",  # to the next rank of the ring, from the one before
    "shift_back": "shift",
}


def around_attention(attention: Instruction, shape: Shape, size: dict[str, int]) -> list[Instruction]:
    """Attention with what its operands and its output go through; adds the bytes of new values to `size`.

    Bytes are the same on both sides of an exchange: fewer heads of more tokens. `v.whole` is value v over all tokens of
    the ranks that exchange; `k.i` the keys that have come i ranks far.
    """
    if shape.context == shape.ring:
        return _ring(attention, shape, size)
    out: list[Instruction] = []

    def step(op: str, reads: tuple[str, ...], writes: tuple[str, ...]) -> None:
        out.append(Instruction(op, part=NO_NODE, reads=reads, writes=writes))

    def exchange(sent: str, received: str) -> None:
        out.append(Instruction("all_to_all", part=NO_NODE, lane=CONTEXT, reads=(sent,), writes=(received,)))

    output, *stats = attention.writes
    inputs, whole = tuple(f"{name}.whole" for name in attention.reads), f"{output}.whole"
    sent, received = f"{attention.op}.sent", f"{attention.op}.received"
    size |= {there: size[here] for there, here in zip(inputs, attention.reads, strict=True)}
    size |= dict.fromkeys((sent, received), sum(size[name] for name in attention.reads))
    size |= dict.fromkeys((whole, f"{whole}.sent", f"{whole}.received"), size[output])
    step("heads_apart", attention.reads, (sent,))
    exchange(sent, received)
    step("tokens_together", (received,), inputs)
    out += _ring(attention._replace(reads=inputs, writes=(whole, *stats)), shape, size)
    step("tokens_apart", (whole,), (f"{whole}.sent",))
    exchange(f"{whole}.sent", f"{whole}.received")
    step("heads_together", (f"{whole}.received",), (output,))
    return out


def _ring(attention: Instruction, shape: Shape, size: dict[str, int]) -> list[Instruction]:
    """Attention to the keys here, then to those of every other rank; each block is under way while the one before it
    is attended to."""
    queries, *held = attention.reads
    more = attention._replace(op=f"{attention.op}_more")
    out: list[Instruction] = []
    block = attention
    for hop in range(1, shape.ring):
        coming = [f"{name}.{hop}" for name in attention.reads[1:]]
        size |= {there: size[here] for there, here in zip(coming, held, strict=True)}
        out.append(Instruction("shift", part=NO_NODE, lane=RING, reads=tuple(held), writes=tuple(coming)))
        out.append(block)
        block, held = more._replace(item=hop, reads=(queries, *coming, *attention.writes)), coming
    return [*out, block]


def remade(forward: Sequence[Instruction]) -> tuple[Mapping[str, Instruction], Mapping[str, tuple[str, ...]]]:
    """How a backward has the keys again that went around: those that came furthest are one rank away the other way, and
    the others follow. And what is needed after a value: after each block the next, the first after attention's output,
    so that each is under way while something is computed."""
    shifts = [i for i in forward if i.op == "shift"]
    sources = [i.writes for i in shifts[1:]] + [i.reads for i in shifts[:1]]
    again = {
        name: i._replace(op=EXCHANGES[i.op], reads=source)
        for i, source in zip(shifts, sources, strict=True)
        for name in i.writes
    }
    after = {name: before.writes for before, i in pairwise(shifts) for name in i.writes}
    outputs = [i.writes[0] for i in forward if i.op == "attention_more"]
    return again, after | dict.fromkeys(outputs, shifts[-1].writes if shifts else ())
