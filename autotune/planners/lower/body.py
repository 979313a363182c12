"""Bodies: the program inside one F, B, W or BW of one block, on one rank.

The forward follows the block's nodes and inserts the collectives that their splits ask for, and what ranks exchange
around attention that share sequences (lower.context), and around experts that they divide (lower.expert); the backward
is derived from the forward, `spec.opset` and the table GRADIENTS. Both are ordinary programs: an instruction's `part`
is the index of its node.
Names: `v` is a value of the block, `d.v` its gradient, `v.full` a value gathered along the sequence.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

from autotune.planners.lower import expert
from autotune.planners.lower.context import EXCHANGES, around_attention, remade
from autotune.planners.lower.fuse import fuse
from autotune.planners.lower.recompute import RECOMPUTE
from autotune.planners.lower.shape import Shape
from autotune.planners.lower.split import halve
from autotune.planners.lower.widths import columns
from autotune.spec.graph import Block, Node
from autotune.spec.opset import ACTIVATION, COUNT, INDEX, LOSSES, NO_NODE, OPS, WIDE
from autotune.spec.program import COMPUTE, TENSOR, Buffer, Instruction, Program


@dataclass(frozen=True)
class Body:
    """A block's forward and backward for one shape. `saved` is what the forward leaves for the backward.

    The backward comes whole and in two halves (see lower.split): the input gradient leaves `kept` (of `saved`) and
    `made` for the weight gradient, which also reads the gradient of the block's output where `late_gradient` says so.
    """

    forward: Program
    backward: Program
    input_gradient: Program
    weight_gradient: Program
    saved: tuple[str, ...]  # buffer names, the block's own input left out
    saved_bytes: int
    output: str
    output_bytes: int
    sizes: Mapping[str, int]  # bytes of every value, those that live outside included
    gradient: str  # the buffer in which the backward leaves the gradient of the block's input ("": it has none)
    kept: tuple[str, ...] = ()
    made: tuple[str, ...] = ()
    late_gradient: bool = False

    def program(self, op: str) -> Program:
        """The program that an outer instruction runs."""
        program: Program = getattr(self, PROGRAMS[op])
        return program

    def bytes_of(self, names: tuple[str, ...]) -> int:
        return sum(self.sizes[name] for name in names)


# Of what is linear in what it moves: the operation that takes the gradient back.
GRADIENTS = {"all_gather": "reduce_scatter", "reduce_scatter": "all_gather", **EXCHANGES, **expert.EXCHANGES}
# What ranks do around a node, if they share what it works on.
AROUND = {"attention": around_attention, "dispatch": expert.to_experts, "combine": expert.from_experts}

# Which program of a block each outer instruction runs.
PROGRAMS = {"F": "forward", "BW": "backward", "B": "input_gradient", "W": "weight_gradient"}


@dataclass
class _Values:
    """Where each value is while a body is being written: its bytes here, and whether the sequence is split."""

    shape: Shape
    size: dict[str, int]
    split: dict[str, bool]

    def put(self, name: str, columns: int, split: bool, width: int | None = None) -> str:
        self.size[name] = self.shape.rows(split) * columns * (self.shape.width if width is None else width)
        self.split[name] = split
        return name

    def write(self, name: str, kind: str, columns: int, split: bool) -> str:
        """A node's write of a kind that opset names."""
        if kind == COUNT:
            self.size[name], self.split[name] = 4 * columns, False
            return name
        return self.put(name, columns, split, {ACTIVATION: None, WIDE: max(4, self.shape.width), INDEX: 8}[kind])


def _stat_columns(node: Node, times: str, shape: Shape) -> int:
    return node.attr(times) // shape.tensor if times else 1


def _sum(name: str) -> Instruction:
    """Adds the partial sums of the tensor ranks, in place."""
    return Instruction("all_reduce", part=NO_NODE, lane=TENSOR, reads=(name,), writes=(name,))


def _operands(instruction: Instruction) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Of what an exchange reads that which it moves, and that which tells it how."""
    at = len(instruction.reads) - expert.OPERANDS.get(instruction.op, 0)
    return instruction.reads[:at], instruction.reads[at:]


def _producers(listing: list[Instruction]) -> dict[str, Instruction]:
    """Which instruction first wrote each value."""
    producer: dict[str, Instruction] = {}
    for instruction in listing:
        for name in instruction.writes:
            producer.setdefault(name, instruction)
    return producer


def _changes(listing: list[Instruction]) -> dict[str, list[Instruction]]:
    """What later changes each value in place: sums over ranks, and further parts of it."""
    changes: dict[str, list[Instruction]] = {}
    for instruction in listing:
        if set(instruction.writes) <= set(instruction.reads):
            changes.setdefault(instruction.writes[0], []).append(instruction)
    return changes


def _forward(block: Block, shape: Shape, values: _Values, train: bool) -> list[Instruction]:
    """The nodes in order, with the collectives of Megatron's tensor and sequence parallelism between them.

    Attention over a cache (more keys than queries, no backward to come) leaves its statistics empty.
    """
    cached = not train and shape.keys > shape.queries
    sharded = shape.sequence_parallel and shape.tensor > 1
    out: list[Instruction] = []
    first = block.nodes[0].reads[0]
    if first == "tokens":
        values.put("tokens", 1, False, 8)
    else:
        how = dict(block.nodes[0].attrs)
        values.put(first, int(how.get("width", how.get("inputs", 0))), sharded)
    values.put("targets", 1, False, 8)
    for index, node in enumerate(block.nodes):
        reads = list(node.reads)
        for position, name in enumerate(node.reads if node.split == "column" else ()):
            if not values.split[name]:
                continue
            full = reads[position] = f"{name}.full"
            if full not in values.size:
                values.size[full], values.split[full] = values.size[name] * shape.tensor, False
                out.append(Instruction("all_gather", part=NO_NODE, lane=TENSOR, reads=(name,), writes=(full,)))
        partial = node.split in ("row", "vocab") and shape.tensor > 1
        split = values.split[reads[0]]
        writes = []
        kinds = OPS[node.op].kinds or (ACTIVATION,) * len(node.writes)
        for name, kind, count in zip(node.writes, kinds, columns(node, shape.tensor), strict=True):
            writes.append(values.write(f"{name}.part" if partial and sharded else name, kind, count, split))
        if node.op in LOSSES:
            values.size[node.writes[0]] = max(4, shape.width)
        for stat in OPS[node.op].stats:
            name = f"{node.name}.{stat.name}"
            count = 0 if cached and node.op == "attention" else _stat_columns(node, stat.times, shape)
            writes.append(values.put(name, count, split, max(4, shape.width)))
        made = Instruction(node.op, part=index, reads=tuple(reads), writes=tuple(writes))
        out += AROUND[node.op](made, shape, values.size) if node.op in AROUND else [made]
        if partial and sharded:
            whole, part = node.writes[0], writes[0]
            values.size[whole], values.split[whole] = values.size[part] // shape.tensor, True
            out.append(Instruction("reduce_scatter", part=NO_NODE, lane=TENSOR, reads=(part,), writes=(whole,)))
        elif partial:
            out.append(_sum(writes[0]))
    return out


class _Backward:
    """Writes the backward of a forward listing: input gradients, weight gradients and what must be made again."""

    def __init__(self, block: Block, forward: list[Instruction], values: _Values, kept: set[str]) -> None:
        self.block, self.values, self.shape = block, values, values.shape
        self.available = set(kept)
        again, self.next = remade(forward)
        self.producer = {**_producers(forward), **again}
        self.changes = _changes(forward)
        self.out: list[Instruction] = []
        self.gradients: dict[str, list[str]] = {}

    def need(self, name: str) -> str:
        """Makes sure a forward value is there, running its producer again where it was not kept."""
        if name in self.available:
            return name
        again = self.producer[name]
        for read in again.reads:
            self.need(read)
        self.out.append(again)
        self.available.update(again.writes)
        for change in self.changes.get(again.writes[0], ()):
            for read in change.reads:
                self.need(read)
            self.out.append(change)
        return name

    def prepare(self, values: tuple[str, ...]) -> None:
        """Starts what will be needed once the gradients of these values are there."""
        for name in (following for value in values for following in self.next.get(value, ())):
            self.need(name)

    def add(self, value: str, gradient: str) -> None:
        self.gradients.setdefault(value, []).append(gradient)

    def gradient(self, value: str) -> str | None:
        """One buffer with the whole gradient of `value`, summing contributions in place into the newest."""
        parts = self.gradients.get(value, [])
        while len(parts) > 1:
            older, newest = parts[0], parts[-1]
            if older == newest:  # the same buffer reached the value twice
                parts.pop()
                continue
            self.out.append(Instruction("accumulate", part=NO_NODE, reads=(older, newest), writes=(newest,)))
            parts.pop(0)
        return parts[0] if parts else None

    def put(self, value: str, serial: int) -> str:
        name = f"d.{value}.{serial}"
        self.values.size[name] = self.values.size[value]
        return name

    def collective(self, instruction: Instruction, serial: int) -> None:
        """Of what is linear the way back (see GRADIENTS); of a sum, whose gradient every rank has, nothing."""
        reverse = GRADIENTS.get(instruction.op)
        if reverse is None:
            return
        gradients = tuple(g for g in map(self.gradient, instruction.writes) if g is not None)
        if gradients:
            moved, told = _operands(instruction)
            for name in told:
                self.need(name)
            self.prepare(moved)
            made = tuple(self.put(read, serial) for read in moved)
            back = Instruction(reverse, part=NO_NODE, lane=instruction.lane, reads=gradients + told, writes=made)
            self.out.append(back)
            for read, gradient in zip(moved, made, strict=True):
                self.add(read, gradient)

    def node(self, instruction: Instruction, serial: int) -> None:
        node, rule = self.block.nodes[instruction.part], OPS[instruction.op]
        written = instruction.writes[: len(node.writes)]
        stats = instruction.writes[len(node.writes) :]
        groups = {"read": instruction.reads, "write": written, "stat": stats}
        gradients = tuple(g for g in map(self.gradient, written) if g is not None)
        if rule.through:
            for read in instruction.reads[: rule.inputs]:
                self.add(read, gradients[0])
            return
        if rule.inputs:
            saved = tuple(self.need(groups[where][i]) for where, i in rule.dgrad)
            inputs = instruction.reads[: rule.inputs]
            made = inputs if rule.inplace else tuple(self.put(r, serial) for r in inputs)
            self.prepare(inputs)
            op, part, hop = f"{instruction.op}.dgrad", instruction.part, instruction.item
            self.out.append(Instruction(op, item=hop, part=part, reads=gradients + saved, writes=made))
            for read, gradient in zip(inputs, made, strict=True):
                self.add(read, gradient)
                if rule.repeats:
                    self.gradient(read)
            if node.split == "column" and self.shape.tensor > 1 and not instruction.reads[0].endswith(".full"):
                self.out.extend(map(_sum, made))
        if node.learns:
            saved = tuple(self.need(groups[where][i]) for where, i in rule.wgrad)
            op = f"{instruction.op}.wgrad"
            self.out.append(Instruction(op, part=instruction.part, reads=gradients + saved))


def with_frees(listing: list[Instruction], keep: frozenset[str] | set[str]) -> tuple[Instruction, ...]:
    """Frees every buffer at its last use, or at once where nobody reads it, but for those in `keep`.

    What a collective reads is needed until it has ended: it is freed by whoever first touches what it wrote.
    """
    seen = set(keep)
    freed: list[Instruction] = []
    held: dict[str, int] = {}  # what a collective reads last -> the position that may free it
    later: dict[str, int] = {}  # a buffer -> the nearest later position that touches it
    for position in range(len(listing) - 1, -1, -1):
        i = listing[position]
        if i.lane != COMPUTE and i.writes[0] in later:
            held |= {n: later[i.writes[0]] for n in i.reads if n not in later and n not in i.writes}
        later |= dict.fromkeys(i.reads + i.writes, position)
    late: dict[int, list[str]] = {}
    for name, position in held.items():
        if name not in seen:
            late.setdefault(position, []).append(name)
            seen.add(name)
    for position in range(len(listing) - 1, -1, -1):
        instruction = listing[position]
        names = (*late.get(position, ()), *(n for n in instruction.reads + instruction.writes if n not in seen))
        frees = tuple(dict.fromkeys(names))
        seen.update(frees)
        freed.append(instruction._replace(frees=frees) if frees else instruction)
    return tuple(reversed(freed))


def saved_values(block: Block, forward: list[Instruction], policy: str) -> set[str]:
    """What the backward needs and the policy does not make again. A block's input is always kept.

    A gathered copy is never kept: gathering again costs the link what keeping it costs in memory (2205.05198, 4.2.2).
    Nor is what others passed on.
    """
    again = RECOMPUTE[policy if block.kind == "layer" else "none"]
    needed: list[str] = []
    for instruction in forward:
        if instruction.op not in OPS:
            needed += _operands(instruction)[1]
            continue
        rule, node = OPS[instruction.op], block.nodes[instruction.part]
        written, stats = instruction.writes[: len(node.writes)], instruction.writes[len(node.writes) :]
        groups = {"read": instruction.reads, "write": written, "stat": stats}
        needed += [groups[where][i] for where, i in rule.dgrad]
        needed += [groups[where][i] for where, i in rule.wgrad if node.learns]
    producer = _producers(forward)
    saved: set[str] = set()
    seen: set[str] = set()
    while needed:
        name = needed.pop()
        if name in seen:
            continue
        seen.add(name)
        made = producer.get(name)
        if made is None:
            saved.add(name)
            continue
        source = producer[made.reads[0]] if made.op == "reduce_scatter" else made
        if source.op in ("all_gather", "shift") or again(source.op):
            needed += made.reads
        else:
            saved.add(name)
    return saved


def as_program(listing: tuple[Instruction, ...], size: Mapping[str, int], given: set[str], live: set[str]) -> Program:
    """A one-rank program. What it is `given` lives outside and is counted there; `live` values it takes over."""
    names = dict.fromkeys(n for i in listing for n in i.reads + i.writes)
    buffers = {n: Buffer(0 if n in given else size[n], persistent=n in given) for n in (*names, *(live - given))}
    return Program((listing,), (buffers,), live=(frozenset(live - given),))


@lru_cache(maxsize=4096)
def _lower(block: Block, shape: Shape, policy: str, loss: bool, train: bool) -> Body:
    values = _Values(shape, {}, {})
    listing = _forward(block, shape, values, train)
    if not loss:
        listing = [i for i in listing if i.op not in LOSSES]
    source, output = block.nodes[0].reads[0], block.nodes[-1 if loss else -2 if block.kind == "head" else -1].writes[0]
    given = {source, "targets", "tokens"}
    if not train:
        listing = fuse(listing, block, output) if shape.fused else listing
        forward = as_program(with_frees(listing, given | {output}), values.size, given, set())
        nothing = Program(((),), ({},))
        return Body(
            forward, nothing, nothing, nothing, (), 0, output, values.size[output], dict(values.size), gradient=""
        )
    saved = saved_values(block, listing, policy)
    writer = _Backward(block, listing, values, saved | given)
    if output != "loss":
        writer.add(output, f"d.{output}")
        values.size[f"d.{output}"] = values.size[output]
    for serial, instruction in enumerate(reversed(listing)):
        (writer.node if instruction.op in OPS else writer.collective)(instruction, serial)
    last = writer.gradient(source) if source != "tokens" else None
    kept = tuple(sorted(saved - given))
    forward = as_program(with_frees(listing, saved | given | {output}), values.size, given, set())
    result = {last} if last else set()
    coming = {f"d.{output}"} if output != "loss" else set()
    backward = as_program(with_frees(writer.out, given | result), values.size, given, saved | coming)
    halves = halve(writer.out, last, f"d.{output}", saved - given)
    between = halves.kept | halves.made | (coming if halves.gradient else set())
    first = with_frees(list(halves.inputs), given | result | between)
    second = with_frees(list(halves.weights), given)
    return Body(
        forward,
        backward,
        as_program(first, values.size, given, saved | coming),
        as_program(second, values.size, given, set(between)),
        kept,
        sum(values.size[n] for n in kept),
        output,
        values.size[output],
        dict(values.size),
        last or "",
        tuple(sorted(halves.kept)),
        tuple(sorted(halves.made)),
        halves.gradient,
    )


def lower_block(block: Block, shape: Shape, policy: str = "none", loss: bool = True, train: bool = True) -> Body:
    """The body of `block` for `shape` under a recompute policy; remembered. `loss` False: logits are the output.

    `train` False: a forward that keeps nothing, and an empty backward.
    """
    return _lower(block, shape, policy, loss or block.kind != "head", train)
