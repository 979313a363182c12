"""The vocabulary pass: the passes of a sharded vocabulary as instructions, and the meetings between them.

Buffers, with S the number of stages: w.S and g.S are this rank's rows. x.0.m embeddings, on every rank its part, whole
on the first stage's; x.S.m the last stage's output, on every rank. y.S.m the shard's logits or softmax; z.S.m its
statistics; u.S.m those of all shards; b.S.m rows of the targets. d.S-1.m and d.-1.m are gradients of x.S.m and x.0.m.

A part that every rank writes is summed for the one that goes on with it, what one rank writes is broadcast, each family
on a lane of its own, so that they hide behind compute and none waits for another. Tensor ranks have shards too: sums
and statistics meet on all ranks of a replica, and all tensor ranks of the one that goes on have the sum. A broadcast is
each tensor rank's own, since they all have what the last stage made.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import NamedTuple

from autotune.planners.lower.traits import Traits
from autotune.planners.passes.communicate import posted
from autotune.planners.schedules.schedule import Step
from autotune.planners.schedules.vocabulary import EMBED, EMBED_W, VOCABULARIES
from autotune.spec.program import ALL_TENSOR, Instruction, Program


def _embed(step: Step, traits: Traits, rank: int) -> Instruction:
    op, s, m = step
    return Instruction(op, s, m, reads=("tokens", f"w.{s}"), writes=(f"x.0.{m}",))


def _embed_gradient(step: Step, traits: Traits, rank: int) -> Instruction:
    op, s, m = step
    return Instruction(op, s, m, reads=("tokens", f"d.-1.{m}"), writes=(f"g.{s}",), frees=(f"d.-1.{m}",))


def _local(*writes: str) -> Callable[[Step, Traits, int], Instruction]:
    """The first pass: from the last stage's output."""

    def make(step: Step, traits: Traits, rank: int) -> Instruction:
        op, s, m = step
        names = tuple(f"d.{s - 1}.{m}" if name == "d" else f"{name}.{s}.{m}" for name in writes)
        return Instruction(op, s, m, reads=(f"w.{s}", f"x.{s}.{m}", "targets"), writes=names)

    return make


def _exponentials(step: Step, traits: Traits, rank: int) -> Instruction:
    op, s, m = step
    y, z, u = (f"{n}.{s}.{m}" for n in "yzu")
    return Instruction(op, s, m, reads=(y, z, "targets"), writes=(y, u), frees=(z,))


def _gradients(step: Step, traits: Traits, rank: int) -> Instruction:
    """The last pass; one rank with the last stage adds to the loss, whichever way a micro-batch went."""
    op, s, m = step
    held = tuple(f"{n}.{s}.{m}" for n in "xyu")
    weight, made = ((), ()) if op == "T_W" else ((f"w.{s}",), (f"d.{s - 1}.{m}",))
    loss = ("loss",) if rank == traits.place[-1][0] else ()
    return Instruction(op, s, m, reads=(*weight, *held, "targets"), writes=(f"g.{s}", *made, *loss), frees=held)


STEPS: dict[str, Callable[[Step, Traits, int], Instruction]] = {
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


class Ways(NamedTuple):
    """The way of every micro-batch: the ranks that run its first and its last stage (of two copies of a stage, one)."""

    stages: int
    ranks: int
    first: Mapping[int, int]
    final: Mapping[int, int]


def _ways(program: Program, traits: Traits) -> Ways:
    at: dict[int, dict[int, int]] = {0: {}, traits.pipe.stages - 1: {}}
    for rank, _, instruction in program:
        if instruction.op == "F" and instruction.stage in at:
            at[instruction.stage][instruction.item] = rank
    return Ways(traits.pipe.stages, traits.pipe.ranks, at[0], at[traits.pipe.stages - 1])


def _reduce(name: str, item: int, root: int, rank: int, ways: Ways) -> Instruction:
    """The ranks' parts of `name`, summed on `root`; the others' are done with."""
    lane = _lane(name) + ALL_TENSOR
    made = Instruction("REDUCE", ways.stages, item, lane=lane, reads=(name,), meet=f"{name}@sum")
    ends = {"writes": (name,)} if rank == root else {"frees": (name,)}
    return made._replace(peers=_from(root, ways), **ends)  # type: ignore[arg-type]


def _broadcast(name: str, item: int, root: int, rank: int, ways: Ways) -> Instruction:
    """`name`, written on `root`, on every rank. Each root has a lane of its own: none waits for what another has yet
    to make."""
    made = Instruction("BROADCAST", ways.stages, item, lane=f"{_lane(name)}:{root}", meet=f"{name}@all")
    ends = {"reads": (name,)} if rank == root else {"writes": (name,)}
    return made._replace(peers=_from(root, ways), **ends)  # type: ignore[arg-type]


def _lane(name: str) -> str:
    """The lane of a family of buffers, e.g. `vocabulary.x.0`."""
    return f"vocabulary.{name.rpartition('.')[0]}"


def _from(root: int, ways: Ways) -> tuple[int, ...]:
    """All pipeline ranks, the root first."""
    return (root, *(rank for rank in range(ways.ranks) if rank != root))


def _statistics(op: str, reads: str, writes: str) -> Callable[[int, int, Ways], Instruction]:
    """All ranks' statistics on every rank: `reads` become `writes` (in place where they are one)."""

    def make(item: int, rank: int, ways: Ways) -> Instruction:
        s, frees = ways.stages, () if reads == writes else (f"{reads}.{ways.stages}.{item}",)
        read, write = (f"{n}.{s}.{item}" for n in (reads, writes))
        meet, peers = f"{op}.{write}", tuple(range(ways.ranks))
        return Instruction(op, s, item, 0, f"vocabulary.{reads}{ALL_TENSOR}", (read,), (write,), frees, meet, peers)

    return make


def _rescaled(item: int, rank: int, ways: Ways) -> Instruction:
    """All ranks' statistics, and with them the sum of the parts of the input's gradient, rescaled first."""
    s, root = ways.stages, ways.final[item]
    z, u, b, d = f"z.{s}.{item}", f"u.{s}.{item}", f"b.{s}.{item}", f"d.{s - 1}.{item}"
    writes, frees = ((u, d), (z, b)) if rank == root else ((u,), (z, b, d))
    meet, peers = f"GATHER_REDUCE.{d}", _from(root, ways)
    return Instruction("GATHER_REDUCE", s, item, 0, f"vocabulary.z{ALL_TENSOR}", (z, d, b), writes, frees, meet, peers)


def _summed_gradient(item: int, rank: int, ways: Ways) -> Instruction:
    return _reduce(f"d.{ways.stages - 1}.{item}", item, ways.final[item], rank, ways)


# What meets after each pass.
_AFTER: dict[str, Callable[[int, int, Ways], Instruction]] = {
    EMBED: lambda item, rank, ways: _reduce(f"x.0.{item}", item, ways.first[item], rank, ways),
    "S": _statistics("GATHER", "z", "u"),
    "S_BOTH": _rescaled,
    "S_MAX": _statistics("MAX", "z", "z"),
    "S_SUM": _statistics("SUM", "u", "u"),
    "T": _summed_gradient,
    "T_SUMMED": _summed_gradient,
}


def meet(program: Program, traits: Traits) -> Program:
    """Adds the sums, broadcasts and exchanged statistics of a sharded vocabulary."""
    if traits.ends:
        return program
    ways, reader = _ways(program, traits), VOCABULARIES[traits.vocabulary].passes[0]
    return Program(
        tuple(_with_meetings(listing, rank, ways, reader) for rank, listing in enumerate(program.ranks)),
        program.buffers,
        program.live,
        program.facts,
    )


def _with_meetings(listing: tuple[Instruction, ...], rank: int, ways: Ways, reader: str) -> tuple[Instruction, ...]:
    """`reader`: the pass that the last stage's output is for."""
    before: dict[int, list[Instruction]] = defaultdict(list)
    for family, op, roots in ((f"x.{ways.stages}", reader, ways.final), ("d.-1", EMBED_W, ways.first)):
        for root in dict.fromkeys(roots.values()):
            reads = [at for at, i in enumerate(listing) if i.op == op and roots[i.item] == root != rank]
            places = posted(list(range(len(listing))), reads, 1) if reads else []
            for read, place in zip(reads, places, strict=True):
                item = listing[read].item
                before[place].append(_broadcast(f"{family}.{item}", item, root, rank, ways))
    out: list[Instruction] = []
    for position, instruction in enumerate(listing):
        out += before[position]
        out.append(instruction)
        op, stage, item = instruction.op, instruction.stage, instruction.item
        if op in _AFTER:
            out.append(_AFTER[op](item, rank, ways))
        elif op == "F" and stage == ways.stages - 1:
            out.append(_broadcast(f"x.{ways.stages}.{item}", item, rank, rank, ways))
        elif op in ("B", "BW") and stage == 0:
            out.append(_broadcast(f"d.-1.{item}", item, rank, rank, ways))
    return tuple(out)
