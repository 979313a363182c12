"""The vocabulary pass: the passes of a sharded vocabulary as instructions, and the meetings between them.

Buffers, with S the number of stages: w.S and g.S are this rank's rows. x.0.m embeddings, on every rank its part, whole
on the first stage's; x.S.m the last stage's output, on every rank. y.S.m the shard's logits or softmax; z.S.m its
statistics; u.S.m those of all shards; b.S.m rows of the targets. d.S-1.m and d.-1.m are gradients of x.S.m and x.0.m.

A part that every rank writes is summed for the one that goes on with it, what one rank writes is broadcast, each family
on a lane of its own, so that they hide behind compute and none waits for another. Tensor ranks have shards too: sums
and statistics meet on all ranks of a replica, and all tensor ranks of the one that goes on have the sum. A broadcast is
each tensor rank's own, since they all have what the last stage made.

Where tensor ranks share the tokens between stages, a shard needs all of them: its passes then work on x.-1.m, x.S+1.m
and their gradients d.-2.m and d.S.m, as if of a stage more at either end, and the meetings cut or join the shares.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from functools import lru_cache

from autotune.planners.lower.traits import Traits
from autotune.planners.passes.columns import Column, column, named, same
from autotune.planners.passes.communicate import posted
from autotune.planners.passes.seat import Listing, Seat, Ways
from autotune.planners.schedules.vocabulary import EMBED, EMBED_W, VOCABULARIES
from autotune.spec.program import ALL_TENSOR, BESIDE, Instruction


def _embed(op: str, s: int, rank: int, traits: Traits) -> Column:
    items = traits.pipe.items
    reads = same("tokens", items), same(f"w.{s}", items)
    return column(op, s, items, reads, (named("x", -traits.shares, items),))


def _embed_gradient(op: str, s: int, rank: int, traits: Traits) -> Column:
    items = traits.pipe.items
    d = named("d", -1 - traits.shares, items)
    return column(op, s, items, (same("tokens", items), d), (same(f"g.{s}", items),), (d,))


def _local(*writes: str) -> Callable[[str, int, int, Traits], Column]:
    """The first pass: from the last stage's output."""

    def make(op: str, s: int, rank: int, traits: Traits) -> Column:
        items, beyond = traits.pipe.items, s + traits.shares
        reads = same(f"w.{s}", items), named("x", beyond, items), same("targets", items)
        made = [named("d", beyond - 1, items) if name == "d" else named(name, s, items) for name in writes]
        return column(op, s, items, reads, made)

    return make


def _exponentials(op: str, s: int, rank: int, traits: Traits) -> Column:
    items = traits.pipe.items
    y, z, u = (named(n, s, items) for n in "yzu")
    return column(op, s, items, (y, z, same("targets", items)), (y, u), (z,))


def _gradients(op: str, s: int, rank: int, traits: Traits) -> Column:
    """The last pass; one rank with the last stage adds to the loss, whichever way a micro-batch went."""
    items, beyond = traits.pipe.items, s + traits.shares
    held = (named("x", beyond, items), named("y", s, items), named("u", s, items))
    weight = () if op == "T_W" else (same(f"w.{s}", items),)
    made = () if op == "T_W" else (named("d", beyond - 1, items),)
    loss = (same("loss", items),) if rank == traits.place[-1][0] else ()
    writes = (same(f"g.{s}", items), *made, *loss)
    return column(op, s, items, (*weight, *held, same("targets", items)), writes, held)


STEPS: dict[str, Callable[[str, int, int, Traits], Column]] = {
    EMBED: _embed,
    EMBED_W: _embed_gradient,
    "S": _local("y", "z"),
    "S_BOTH": _local("y", "z", "d", "b"),
    "S_MAX": _local("y", "z"),
    "S_SUM": _exponentials,
    "T": _gradients,
    "T_W": _gradients,
    "T_SUMMED": _gradients,
}


def _reduce(part: str, name: str, item: int, root: int, rank: int, ways: Ways) -> Instruction:
    """The ranks' parts, summed as `name` on `root`; `part` is `name` itself unless tensor ranks share its tokens."""
    lane, op = _lane(name) + ALL_TENSOR, "REDUCE_SHARES" if ways.shares else "REDUCE"
    writes = (name,) if rank == root else ()
    frees = () if writes == (part,) else (part,)
    meet, peers = f"{name}@sum", _from(root, ways.ranks)
    return Instruction(op, ways.stages, item, 0, lane, (part,), writes, frees, meet, peers)


def _broadcast(name: str, whole: str, item: int, root: int, rank: int, ways: Ways) -> Instruction:
    """`name`, written on `root`, as `whole` on every rank: the same unless tensor ranks share its tokens. Each root has
    a lane of its own: none waits for what another has yet to make."""
    lane, meet, peers = f"{_lane(name)}:{root}", f"{name}@all", _from(root, ways.ranks)
    reads, writes = ((name,), ()) if rank == root else ((), (whole,))
    if not ways.shares:
        return Instruction("BROADCAST", ways.stages, item, 0, lane, reads, writes, (), meet, peers)
    lane += ALL_TENSOR
    return Instruction("BROADCAST_SHARES", ways.stages, item, 0, lane, reads, (whole,), reads, meet, peers)


def _lane(name: str) -> str:
    """The lane of a family of buffers, e.g. `beside.x.0`."""
    return f"{BESIDE}{name.rpartition('.')[0]}"


@lru_cache(maxsize=256)
def _from(root: int, ranks: int) -> tuple[int, ...]:
    """All pipeline ranks, the root first."""
    return (root, *(rank for rank in range(ranks) if rank != root))


def _statistics(op: str, reads: str, writes: str) -> Callable[[int, int, Ways], Instruction]:
    """All ranks' statistics on every rank: `reads` become `writes` (in place where they are one)."""

    def make(item: int, rank: int, ways: Ways) -> Instruction:
        s, frees = ways.stages, () if reads == writes else (f"{reads}.{ways.stages}.{item}",)
        read, write = (f"{n}.{s}.{item}" for n in (reads, writes))
        meet, peers = f"{op}.{write}", tuple(range(ways.ranks))
        return Instruction(op, s, item, 0, f"{BESIDE}{reads}{ALL_TENSOR}", (read,), (write,), frees, meet, peers)

    return make


def _rescaled(item: int, rank: int, ways: Ways) -> Instruction:
    """All ranks' statistics, and with them the sum of the parts of the input's gradient, rescaled first."""
    s, root = ways.stages, ways.final[item]
    z, u, b, d = f"z.{s}.{item}", f"u.{s}.{item}", f"b.{s}.{item}", f"d.{s - 1}.{item}"
    part = f"d.{s - 1 + ways.shares}.{item}"
    writes = (u, d) if rank == root else (u,)
    frees = (z, b) if part in writes else (z, b, part)
    op = "GATHER_REDUCE_SHARES" if ways.shares else "GATHER_REDUCE"
    meet, peers = f"GATHER_REDUCE.{d}", _from(root, ways.ranks)
    return Instruction(op, s, item, 0, f"{BESIDE}z{ALL_TENSOR}", (z, part, b), writes, frees, meet, peers)


def _embedded(item: int, rank: int, ways: Ways) -> Instruction:
    """The first stage's input."""
    return _reduce(f"x.{-ways.shares:d}.{item}", f"x.0.{item}", item, ways.first[item], rank, ways)


def _summed_gradient(item: int, rank: int, ways: Ways) -> Instruction:
    """The gradient of the last stage's output."""
    part, name = (f"d.{ways.stages - 1 + more}.{item}" for more in (ways.shares, 0))
    return _reduce(part, name, item, ways.final[item], rank, ways)


def _output(item: int, root: int, rank: int, ways: Ways) -> Instruction:
    """The last stage's output to all."""
    name, whole = (f"x.{ways.stages + more}.{item}" for more in (0, ways.shares))
    return _broadcast(name, whole, item, root, rank, ways)


def _input_gradient(item: int, root: int, rank: int, ways: Ways) -> Instruction:
    """The gradient of the first stage's input to all."""
    name, whole = (f"d.{-1 - more}.{item}" for more in (0, ways.shares))
    return _broadcast(name, whole, item, root, rank, ways)


# What meets after each pass.
_AFTER: dict[str, Callable[[int, int, Ways], Instruction]] = {
    EMBED: _embedded,
    "S": _statistics("GATHER", "z", "u"),
    "S_BOTH": _rescaled,
    "S_MAX": _statistics("MAX", "z", "z"),
    "S_SUM": _statistics("SUM", "u", "u"),
    "T": _summed_gradient,
    "T_SUMMED": _summed_gradient,
}


def meet(listing: Listing, seat: Seat, traits: Traits) -> Listing:
    """Adds the sums, broadcasts and exchanged statistics of a sharded vocabulary."""
    if traits.ends:
        return listing
    rank, ways = seat
    reader = VOCABULARIES[traits.vocabulary].passes[0]  # the pass that the last stage's output is for
    before: dict[int, list[Instruction]] = defaultdict(list)
    for make, op, roots in ((_output, reader, ways.final), (_input_gradient, EMBED_W, ways.first)):
        for root in dict.fromkeys(roots.values()):
            reads = [at for at, i in enumerate(listing) if i.op == op and roots[i.item] == root != rank]
            places = posted(list(range(len(listing))), reads, 1) if reads else []
            for read, place in zip(reads, places, strict=True):
                before[place].append(make(listing[read].item, root, rank, ways))
    out: list[Instruction] = []
    for position, instruction in enumerate(listing):
        if position in before:
            out += before[position]
        out.append(instruction)
        op, stage, item = instruction[:3]
        if op in _AFTER:
            out.append(_AFTER[op](item, rank, ways))
        elif op == "F" and stage == ways.stages - 1:
            out.append(_output(item, rank, rank, ways))
        elif op in ("B", "BW") and stage == 0:
            out.append(_input_gradient(item, rank, rank, ways))
    return out
