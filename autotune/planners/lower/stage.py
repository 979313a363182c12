"""Stages: which blocks each holds, and the bytes that its forwards and backwards keep, make and need."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from itertools import groupby

from autotune.planners.decoding.strategies import reads_rows
from autotune.planners.lower.body import PROGRAMS, Body, lower_block
from autotune.planners.lower.join import joined_body, together
from autotune.planners.lower.shape import Shape
from autotune.planners.lower.workspace import Site, workspace
from autotune.planners.simulate import memory
from autotune.spec.experts_graph import divided
from autotune.spec.graph import Block, Node, Weight, blocks
from autotune.spec.heads_graph import normed
from autotune.spec.int8_graph import rounded, weight_bytes
from autotune.spec.model import ModelSpec
from autotune.spec.plan import EXACT, INT8, Plan
from autotune.spec.program import Program

# How a plan's `weights` change the blocks of a model.
FORMS: Mapping[str, Callable[[Block], Block]] = {EXACT: lambda block: block, INT8: rounded}


@dataclass(frozen=True)
class Cut:
    """Where the list of layers is cut: how many each stage has. `ends`: the outer stages hold embedding and head;
    else every rank holds rows of both (see lower.vocabulary), and the last stage ends with the final norm. `apart`:
    the final norm is a block by itself, because others than the output projection read what it gives. `weights`: how
    layers keep their linear weights, a key of FORMS. `expert`: the ranks that divide the routed experts of each
    layer."""

    layers: tuple[int, ...]
    ends: bool = True
    apart: bool = False
    weights: str = EXACT
    expert: int = 1

    @property
    def stages(self) -> int:
        return len(self.layers)


@dataclass(frozen=True)
class Sizes:
    """Bytes of one micro-batch through one stage, on one tensor rank; `parameters` in elements.

    The last six are of a backward in two halves: see lower.split.
    """

    parameters: int
    saved: int  # what a forward leaves for its backward, the stage's own input left out
    output: int  # the boundary activation handed on (0 after the loss)
    inputs: int  # the boundary activation received (0 where the stage starts with tokens)
    forward: int  # transient bytes of a forward beyond what it leaves
    backward: int  # transient bytes of a backward beyond what it starts and ends with
    kept: int = 0  # the part of `saved` that the weight gradient needs
    made: int = 0  # what the input gradient leaves for the weight gradient
    input_gradient: int = 0  # transient bytes; below 0 where what it needs is gone before all that it leaves is there
    weight_gradient: int = 0  # transient bytes
    routed: int = 0  # of the parameters those of routed experts
    late_gradient: bool = False  # whether the weight gradient reads the gradient of the stage's output
    frozen: int = 0  # elements of weights beside the parameters


@lru_cache(maxsize=1024)
def partition(layers: int, stages: int) -> tuple[int, ...]:
    """Layers of each stage, as even as can be. The inner stages take the remainder: the outer two also hold the
    embedding and the head."""
    share = [layers // stages] * stages
    for stage in sorted(range(stages), key=lambda s: (s in (0, stages - 1), s == stages - 1, s))[: layers % stages]:
        share[stage] += 1
    return tuple(share)


@lru_cache(maxsize=1024)
def _cut(layers: int, stages: int, given: str, ends: bool, apart: bool, weights: str, expert: int) -> Cut:
    each = tuple(map(int, given.split(","))) if given else partition(layers, stages)
    return Cut(each, ends, apart, weights, expert)


def cut_of(plan: Plan, model: ModelSpec) -> Cut:
    """The cut of a plan: its own `layers`, or the even one."""
    ends = plan.vocabulary == "ends"
    return _cut(model.layers, plan.stages, plan.layers, ends, reads_rows(plan), plan.weights, plan.expert)


@lru_cache(maxsize=256)
def stage_blocks(model: ModelSpec, cut: Cut, expert: int = 0) -> tuple[tuple[Block, ...], ...]:
    """The blocks of every stage: the embedding joins the first, the head (or its norm alone) the last. Of experts that
    ranks divide, as that rank has them whose number `expert` is."""
    embed, *layers, head = (divided(FORMS[cut.weights](block), cut.expert, expert) for block in blocks(model))
    held: list[tuple[Block, ...]] = []
    at = 0
    for count in cut.layers:
        held.append(tuple(layers[at : at + count]))
        at += count
    if cut.ends:
        held[0] = (embed, *held[0])
        last = (normed(head), replace(head, nodes=head.nodes[1:])) if cut.apart else (head,)
        held[-1] = (*held[-1], *last)
    else:
        held[-1] = (*held[-1], normed(head))
    return tuple(held)


Runs = tuple[tuple[Block, int], ...]  # a stage's blocks in order: one of each run of equal ones, and the run's length
_ONE: dict[Block, Block] = {}  # one object for all equal blocks: comparing them is then looking once


@lru_cache(maxsize=4096)
def canonical(block: Block) -> Block:
    """The block without the names of its tensors: blocks that cost the same become one."""

    def bare(weight: Weight) -> Weight:
        return replace(weight, parts=())

    def plain(node: Node) -> Node:
        weights, constants = tuple(map(bare, node.weights)), tuple(map(bare, node.constants))
        return replace(node, weights=weights, constants=constants, inner=tuple(map(canonical, node.inner)))

    made = replace(block, index=0, nodes=tuple(map(plain, block.nodes)))
    return _ONE.setdefault(made, made)


@lru_cache(maxsize=1024)
def canonical_stages(model: ModelSpec, cut: Cut) -> tuple[tuple[Block, ...], ...]:
    return tuple(tuple(map(canonical, stage)) for stage in stage_blocks(model, cut))


@lru_cache(maxsize=1024)
def stage_runs(model: ModelSpec, cut: Cut) -> tuple[Runs, ...]:
    """The runs of canonical blocks that every stage is made of."""

    def runs(stage: tuple[Block, ...]) -> Runs:
        return tuple((block, len(list(equal))) for block, equal in groupby(stage))

    return tuple(map(runs, canonical_stages(model, cut)))


def whole_runs(model: ModelSpec, ends: bool, expert: int = 1) -> Runs:
    """The runs of the whole list of blocks, wherever it is cut. `ends`, `expert`: see `Cut`."""
    return stage_runs(model, Cut((model.layers,), ends, expert=expert))[0]


@lru_cache(maxsize=1024)
def first_alike(model: ModelSpec, cut: Cut) -> tuple[int, ...]:
    """For every stage the first one that is made of the same runs."""
    first: dict[Runs, int] = {}
    return tuple([first.setdefault(runs, stage) for stage, runs in enumerate(stage_runs(model, cut))])


def local_size(weight: Weight, tensor: int) -> int:
    """Elements of a weight on one of so many tensor ranks."""
    return weight.size // (tensor if weight.shard is not None else 1)


def local_parameters(stage: tuple[Block, ...], tensor: int, frozen: bool = False) -> int:
    """Elements of a stage's weights that one tensor rank holds, of those that train or of those that are frozen; a
    tensor shared by two of its blocks counts once."""
    return _added(stage, tensor, partial(_elements, frozen))


def local_bytes(stage: tuple[Block, ...], tensor: int, width: int) -> int:
    """Bytes of all of them, where what is kept as the precision says takes `width` an element."""
    return _added(stage, tensor, partial(_bytes, width))


def _added(stage: tuple[Block, ...], tensor: int, of: Callable[[Block, int], Mapping[str, int]]) -> int:
    layers = sum(sum(of(canonical(block), tensor).values()) for block in stage if block.kind == "layer")  # by itself
    sizes: dict[object, int] = {}
    for number, block in enumerate(stage):
        found = of(block, tensor) if block.kind != "layer" else {}
        sizes |= {w.parts or (number, w.name): found[w.name] for w in block.weights() if w.name in found}
    return layers + sum(sizes.values())


def routed_parameters(stage: tuple[Block, ...], tensor: int) -> int:
    """Of a stage's weights on one tensor rank the elements of those that are stacked by expert."""
    return sum(_routed(canonical(block), tensor) for block in stage if block.kind == "layer")


@lru_cache(maxsize=1024)
def _routed(block: Block, tensor: int) -> int:
    return sum(local_size(weight, tensor) for weight in block.weights() if weight.experts)


@lru_cache(maxsize=1024)
def _elements(frozen: bool, block: Block, tensor: int) -> Mapping[str, int]:
    return {weight.name: local_size(weight, tensor) for weight in block.weights() if weight.frozen == frozen}


@lru_cache(maxsize=1024)
def _bytes(width: int, block: Block, tensor: int) -> Mapping[str, int]:
    return {weight.name: local_size(weight, tensor) * weight_bytes(weight, width) for weight in block.weights()}


@lru_cache(maxsize=8192)
def body_peaks(block: Block, shape: Shape, policy: str, site: Site) -> Mapping[str, int]:
    """The most bytes alive inside each of a block's programs (by outer operation) but W, its input left out."""
    body = lower_block(block, shape, policy)
    return {op: _peak(block, body, body.program(op), shape, site) for op in PROGRAMS if op != "W"}


def _peak(block: Block, body: Body, program: Program, shape: Shape, site: Site) -> int:
    held = memory(program, lambda rank, i: workspace(block, i, shape, body.sizes, site))
    return max(held[0].get("device", ()), default=0)


@lru_cache(maxsize=8192)
def _weight_peak(block: Block, shape: Shape, policy: str, site: Site, count: int, lent: bool) -> int:
    """As `body_peaks`, of the W of `count` micro-batches (see lower.join)."""
    body = joined_body(block, shape, policy, count, lent)
    return _peak(block, body, body.weight_gradient, together(shape, count), site)


def sizes(model: ModelSpec, cut: Cut, shape: Shape, policy: str, site: Site) -> tuple[Sizes, ...]:
    """The bytes of every stage; stages of equal blocks are worked out once."""
    runs, held, first = stage_runs(model, cut), stage_blocks(model, cut), first_alike(model, cut)
    found = {
        stage: replace(
            _sizes(runs[stage], shape, policy, site),
            parameters=local_parameters(held[stage], shape.tensor),
            frozen=local_parameters(held[stage], shape.tensor, frozen=True),
            routed=routed_parameters(held[stage], shape.tensor),
        )
        for stage in set(first)
    }
    return tuple([found[stage] for stage in first])


@lru_cache(maxsize=8192)
def _sizes(runs: Runs, shape: Shape, policy: str, site: Site) -> Sizes:
    """All but the parameters. Inside a stage, the output of one block is the kept input of the next."""
    lowered = [(lower_block(block, shape, policy), n) for block, n in runs]
    bodies: list[Body] = [body for body, n in lowered for body in [body] * n]
    peaks = [peak for block, n in runs for peak in [body_peaks(block, shape, policy, site)] * n]
    inner = [body.output_bytes for body in bodies[:-1]]  # activations between blocks; their gradients are as large
    resident = sum(body.saved_bytes for body in bodies) + sum(inner)
    output = bodies[-1].output_bytes if bodies[-1].output != "loss" else 0
    inputs = bodies[0].sizes.get("x", 0)  # the embedding's input, tokens, is nobody's activation
    kept = [size for body, n in lowered for size in [body.bytes_of(body.kept)] * n]
    left = [size for body, n in lowered for size in [body.bytes_of(body.made)] * n]
    late = [body.late_gradient for body in bodies]
    # What a block leaves for W: what B made, and the gradient of its output where that lies inside the stage.
    made = [new + (size if waits else 0) for new, size, waits in zip(left, [*inner, 0], late, strict=True)]
    forward = backward = first = 0
    earlier = 0  # whole blocks before this one
    later = sum(kept) + sum(inner) + sum(made)  # what W needs of the blocks after this one
    for peak, whole, needed, new, between in zip(
        peaks, (body.saved_bytes for body in bodies), kept, made, [*inner, 0], strict=True
    ):
        later -= needed + new
        forward = max(forward, earlier + peak["F"])
        backward = max(backward, earlier + peak["BW"])
        # B: blocks after this one have left what W needs, with the inputs between them; those before wait whole.
        first = max(first, earlier + later + peak["B"])
        earlier, later = earlier + whole + between, later - between
    started = resident + output + inputs
    return Sizes(
        0,
        resident,
        output,
        inputs,
        max(0, forward - resident - output),
        max(0, backward - started),
        sum(kept) + sum(inner),
        sum(made),
        first - started - sum(made),
        weight_transient(runs, shape, policy, site, 1),
        late_gradient=late[-1],
    )


@lru_cache(maxsize=8192)
def weight_transient(runs: Runs, shape: Shape, policy: str, site: Site, count: int) -> int:
    """Transient bytes of a stage's W of `count` micro-batches together, beyond what they have left for it.

    W goes from the last block to the first as B does, and gives back what it has used; but for the gradient of the
    stage's output, which is there until the end.
    """
    blocks = [block for block, n in runs for _ in range(n)]
    bodies = [lower_block(block, shape, policy) for block in blocks]
    inner = [*(body.output_bytes for body in bodies[:-1]), 0]
    before = most = 0
    for number, (block, body, between) in enumerate(zip(blocks, bodies, inner, strict=True)):
        lent = body.late_gradient and number == len(blocks) - 1
        most = max(most, count * before + _weight_peak(block, shape, policy, site, count, lent))
        before += body.bytes_of(body.kept) + between
        before += body.bytes_of(body.made) + (between if body.late_gradient else 0)
    return max(0, most - count * before)
