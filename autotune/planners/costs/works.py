"""The work inside each body instruction: one line of the table an operation, in the primitives of `spec.work`.

FLOPs, bytes and durations all follow from this table and the block graph. A memory-bound operation moves the bytes of
the buffers it reads and writes, so it needs no line of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import NamedTuple

from autotune.planners.costs.fused import fused_work
from autotune.planners.lower.body import Body, lower_block
from autotune.planners.lower.expert import OPERANDS
from autotune.planners.lower.fuse import JOIN
from autotune.planners.lower.pages import gathered_bytes
from autotune.planners.lower.shape import Shape
from autotune.spec.graph import Block, Node, blocks
from autotune.spec.heads_graph import frozen_blocks
from autotune.spec.model import ModelSpec
from autotune.spec.opset import NO_NODE
from autotune.spec.program import CONTEXT, EXPERT, RING, TENSOR, Instruction, Program
from autotune.spec.work import BYTES, MASKED, PAGES, Attention, Collective, Launch, Matmul, Memory, Work

Rule = Callable[[Node, Shape], tuple[Work, ...]]


def _sides(node: Node, shape: Shape) -> tuple[int, int]:
    """(inputs, outputs) of a linear layer on one tensor rank."""
    inputs, outputs = node.attr("inputs"), node.attr("outputs")
    return (
        inputs // (shape.tensor if node.split == "row" else 1),
        outputs // (shape.tensor if node.split == "column" else 1),
    )


def _linear(node: Node, shape: Shape) -> tuple[Work, ...]:
    inputs, outputs = _sides(node, shape)
    return (Matmul(shape.tokens, inputs, outputs, shape.dtype, "fwd"),)


def _linear_int8(node: Node, shape: Shape) -> tuple[Work, ...]:
    inputs, outputs = _sides(node, shape)
    return (Matmul(shape.tokens, inputs, outputs, shape.dtype, "int8"),)


def _linear_dgrad(node: Node, shape: Shape) -> tuple[Work, ...]:
    inputs, outputs = _sides(node, shape)
    return (Matmul(shape.tokens, outputs, inputs, shape.dtype, "dgrad"),)


def _linear_wgrad(node: Node, shape: Shape) -> tuple[Work, ...]:
    """The product, its sum into the fp32 gradients of bf16 weights, and the sum over tokens that a bias's gradient is.

    Accumulating reads 2 + 4 bytes an element and writes 4.
    """
    inputs, outputs = _sides(node, shape)
    made: list[Work] = [Matmul(outputs, shape.tokens, inputs, shape.dtype, "wgrad")]
    if BYTES[shape.dtype] < 4:
        made.append(Memory("accumulate", inputs * outputs * (BYTES[shape.dtype] + 8), shape.dtype))
    if len(node.weights) > 1:
        made.append(Memory("column_sum", shape.tokens * outputs * BYTES[shape.dtype], shape.dtype))
    return tuple(made)


def _attention(form: str) -> Rule:
    def rule(node: Node, shape: Shape) -> tuple[Work, ...]:
        shape = shape.core
        heads, kv = node.attr("heads") // shape.tensor, node.attr("kv_heads") // shape.tensor
        window = node.attr("window")
        keys = min(shape.keys, window) if window and shape.queries == 1 else shape.keys
        width, narrow = node.attr("head_dim"), node.attr("v_dim")
        backend = shape.attention
        if shape.masked:  # over a cache there is one way, whatever the plan says
            backend = f"{MASKED}.{backend}" if shape.queries == shape.keys else MASKED
        core = Attention(shape.batch, shape.queries, keys, heads, kv, width, shape.dtype, backend, form)
        if form == "fwd" and shape.page and shape.keys > shape.queries:
            # Read and written once more, side by side, by those that take no table.
            moved = 2 * gathered_bytes(shape.batch, shape.keys, shape.page, kv, width, shape.dtype)
            return core, Memory(PAGES, moved, shape.dtype)
        if narrow == width:
            return (core,)
        # Values are padded to the keys' width and the result cut; backward, also its gradient and itself.
        copies = (kv + heads) if form == "fwd" else 2 * (kv + heads)
        return core, Memory("copy", shape.tokens * copies * (width + narrow) * BYTES[shape.dtype], shape.dtype)

    return rule


def _attention_more(form: str) -> Rule:
    """A block that others passed on: half the queries over all its keys, or all over half, which are as many pairs as
    the causal half. Then the merging into o, or gradients put into their places among zeros."""
    pairs = _attention(form)

    def rule(node: Node, shape: Shape) -> tuple[Work, ...]:
        core = shape.core
        heads, kv = node.attr("heads") // core.tensor, node.attr("kv_heads") // core.tensor
        width, narrow = node.attr("head_dim"), node.attr("v_dim")
        moved = 3 * heads * narrow if form == "fwd" else 3 * heads * width + 2 * kv * (width + narrow)
        return *pairs(node, shape), Memory("add", core.tokens * moved * core.width, core.dtype)

    return rule


def _groups(node: Node, shape: Shape) -> list[tuple[int, int]]:
    """(experts, rows of each) where the router is in balance: as even as whole rows can be, those without rows left
    out."""
    rows, more = divmod(shape.tokens * node.attr("top_k"), node.attr("experts"))
    sizes = ((more, rows + 1), (node.attr("experts") - more, rows))
    return [(count, size) for count, size in sizes if count and size]


def _grouped_sides(node: Node, shape: Shape) -> tuple[int, int]:
    """(inputs, outputs) of an expert's product on one tensor rank."""
    return (
        node.attr("inputs") // (shape.tensor if node.split == "inner" else 1),
        node.attr("outputs") // (shape.tensor if node.split == "heads" else 1),
    )


def _grouped(form: str) -> Rule:
    """A product an expert, all of them at once."""

    def rule(node: Node, shape: Shape) -> tuple[Work, ...]:
        inputs, outputs = _grouped_sides(node, shape)
        k, n = (inputs, outputs) if form == "fwd" else (outputs, inputs)
        return tuple(Matmul(m, k, n, shape.dtype, form, count) for count, m in _groups(node, shape))

    return rule


def _grouped_wgrad(node: Node, shape: Shape) -> tuple[Work, ...]:
    """The products, and their sum into the fp32 gradients of bf16 weights: of all experts, whatever rows they have."""
    inputs, outputs = _grouped_sides(node, shape)
    made: list[Work] = [Matmul(outputs, k, inputs, shape.dtype, "wgrad", count) for count, k in _groups(node, shape)]
    if BYTES[shape.dtype] < 4:
        elements = node.attr("experts") * inputs * outputs
        made.append(Memory("accumulate", elements * (BYTES[shape.dtype] + 8), shape.dtype))
    return tuple(made)


def _frozen(node: Node, shape: Shape) -> tuple[Work, ...]:
    """All that another model's blocks do in a forward that keeps nothing."""
    found: list[Work] = []
    for block in node.inner:
        body = lower_block(block, shape, loss=False, train=False)
        for instruction in body.forward.ranks[0]:
            found += works(block, body, instruction, shape)
    return tuple(found)


def issued(block: Block, instruction: Instruction, shape: Shape) -> int:
    """Instructions that the host hands over for one of a body: of a frozen model all those of its blocks."""
    if instruction.op != "frozen":
        return 1
    inner = block.nodes[instruction.part].inner
    return sum(len(lower_block(each, shape, loss=False, train=False).forward.ranks[0]) for each in inner)


WORKS: dict[str, Rule] = {
    "frozen": _frozen,
    "grouped": _grouped("fwd"),
    "grouped.dgrad": _grouped("dgrad"),
    "grouped.wgrad": _grouped_wgrad,
    "linear": _linear,
    "linear_int8": _linear_int8,
    "linear.dgrad": _linear_dgrad,
    "linear.wgrad": _linear_wgrad,
    "attention": _attention("fwd"),
    "attention.dgrad": _attention("bwd"),
    "attention_more": _attention_more("fwd"),
    "attention_more.dgrad": _attention_more("bwd"),
}


def _loss_exchange(shape: Shape) -> tuple[tuple[str, int], ...]:
    """Of each token the log-sum-exp (its maximum over ranks), then that rescaled and the target's logit (sums)."""
    values = shape.tokens * max(BYTES[shape.dtype], BYTES["fp32"])
    return ("all_reduce", values), ("all_reduce", 2 * values)


# What an operation sends over the tensor group while it computes: (collective, bytes) in order.
EXCHANGES: dict[str, Callable[[Shape], tuple[tuple[str, int], ...]]] = {"cross_entropy": _loss_exchange}

# What stops the host until the device has come there, which then waits for the next instruction.
WAITS = ("splits",)

# What probes call a memory-bound operation, where it is not its own name.
PROBE_NAMES = {
    "rotary.dgrad": "rotary",
    "ahead_entropy": "cross_entropy",
    "ahead_entropy.dgrad": "cross_entropy_bwd",
}


class Around(NamedTuple):
    """How the ranks that share sequences lie on the links: of those that exchange heads as of a `Collective`'s group,
    and the link level that the ring crosses; and of those that divide the experts, as of a group."""

    level: int = 0
    inner: int = 1
    ring: int = 0
    expert_level: int = 0
    expert_inner: int = 1


TOGETHER = Around()  # on the innermost level


def works(
    block: Block,
    body: Body,
    instruction: Instruction,
    shape: Shape,
    level: int = 0,
    inner: int = 1,
    around: Around = TOGETHER,
) -> tuple[Work, ...]:
    """The primitives of one instruction of `body`. `level` and `inner` say how the tensor group lies on the links (see
    `Collective`), `around` the same of those that share sequences."""
    if instruction.lane == CONTEXT:
        size, ranks = body.sizes[instruction.reads[0]], shape.context // shape.ring
        return (Collective(instruction.op, size, ranks, around.level, around.inner),)
    if instruction.lane == RING:
        return (Collective("send_recv", sum(body.sizes[n] for n in instruction.reads), 2, around.ring),)
    if instruction.lane == EXPERT:
        told = instruction.reads[: len(instruction.reads) - OPERANDS.get(instruction.op, 0)]
        sent = sum(body.sizes[n] for n in told)
        return (Collective("all_to_all", sent, shape.expert, around.expert_level, around.expert_inner),)
    if instruction.op in WAITS:
        return (Launch(1, "train"),)
    if instruction.lane == TENSOR:
        whole = max(body.sizes[n] for n in instruction.reads + instruction.writes)
        return (Collective(instruction.op, whole, shape.tensor, level, inner),)
    if JOIN in instruction.op:
        return (fused_work(block, body, instruction, shape),)
    if instruction.op in WORKS:
        return WORKS[instruction.op](block.nodes[instruction.part], shape)
    if instruction.part == NO_NODE:
        moved = sum(body.sizes[n] for n in instruction.reads + instruction.writes)
        return (Memory("add", moved, shape.dtype),)
    moved = sum(body.sizes[n] for n in instruction.reads + instruction.writes)
    sends = EXCHANGES[instruction.op](shape) if shape.tensor > 1 and instruction.op in EXCHANGES else ()
    name = PROBE_NAMES.get(instruction.op, instruction.op.replace(".dgrad", "_bwd").replace(".wgrad", "_wgrad"))
    exchanged = (Collective(op, size, shape.tensor, level, inner) for op, size in sends)
    return Memory(name, moved, shape.dtype), *exchanged


def as_captured(found: Iterable[Work]) -> tuple[Work, ...]:
    """The same where a CUDA graph replays it."""
    return tuple(replace(work, captured=True) if isinstance(work, Collective) else work for work in found)


# What a collective is handed over as, where that is not its own name.
HANDED = {"shift_back": "shift", **dict.fromkeys(("counts_to_all", "to_experts", "from_experts"), "all_to_all")}


def handed(instruction: Instruction) -> Launch:
    """A collective as the host hands it over, whatever its size: both ways around a ring are one."""
    return Launch(1, HANDED.get(instruction.op, instruction.op))


def flops(block: Block, program: Program, body: Body, shape: Shape) -> float:
    """Floating-point operations of a body's matrix products and attention."""
    return sum(work.flops for i in program.ranks[0] for work in works(block, body, i, shape))


def model_flops(model: ModelSpec, batch: int, sequence: int, seen: float = 0.0) -> float:
    """Forward and backward FLOPs of a training step on `batch` sequences, nothing recomputed: what MFU divides by.

    Of experts those that a token visits; of latent attention no padding of its values. `seen`: pairs of a sequence's
    tokens of which one sees the other; 0: those of causal attention.
    """
    shape = Shape(batch, sequence, sequence)
    of_causal = seen / (sequence * (sequence + 1) / 2) if seen else 1.0
    every, total = blocks(model), 0.0
    for block in every:
        body = lower_block(block, shape)
        both = (*body.forward.ranks[0], *body.backward.ranks[0])
        total += sum(_counted(block, body, i, shape, of_causal) for i in both if i.op != "frozen")
    for block in frozen_blocks(every):
        body = lower_block(block, shape, loss=False, train=False)
        total += sum(_counted(block, body, instruction, shape, of_causal) for instruction in body.forward.ranks[0])
    return total


def _counted(block: Block, body: Body, instruction: Instruction, shape: Shape, of_causal: float) -> float:
    """An instruction's FLOPs as models are counted. `of_causal`: pairs of tokens that see one another, as a share of
    causal attention's."""
    total = 0.0
    for work in works(block, body, instruction, shape):
        if isinstance(work, Attention):
            # FlashAttention's backward makes the scores again; model FLOPs count two products there for each forward
            # one. A half of the products are as wide as values.
            products, counted = (2, 2) if work.form == "fwd" else (5, 4)
            one, narrow = work.flops / products, block.nodes[instruction.part].attr("v_dim")
            total += of_causal * counted / 2 * (one + one / work.head_dim * narrow)
        else:
            total += work.flops
    return total
