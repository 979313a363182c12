"""Stages: which blocks each holds, and the bytes that its forwards and backwards keep, make and need."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

from autotune.planners.lower.body import Body, lower_block
from autotune.planners.lower.shape import Shape
from autotune.planners.lower.workspace import Site, workspace
from autotune.planners.simulate import memory
from autotune.spec.graph import Block, Node, Weight, blocks
from autotune.spec.model import ModelSpec
from autotune.spec.program import Program


@dataclass(frozen=True)
class Sizes:
    """Bytes of one micro-batch through one stage, on one tensor rank; `parameters` in elements."""

    parameters: int
    saved: int  # what a forward leaves for its backward, the stage's own input left out
    output: int  # the boundary activation handed on (0 after the loss)
    inputs: int  # the boundary activation received (0 at the first stage)
    forward: int  # transient bytes of a forward beyond what it leaves
    backward: int  # transient bytes of a backward beyond what it starts and ends with


@lru_cache(maxsize=1024)
def partition(layers: int, stages: int) -> tuple[int, ...]:
    """Layers of each stage, as even as can be. The inner stages take the remainder: the outer two also hold the
    embedding and the head."""
    share = [layers // stages] * stages
    for stage in sorted(range(stages), key=lambda s: (s in (0, stages - 1), s == stages - 1, s))[: layers % stages]:
        share[stage] += 1
    return tuple(share)


@lru_cache(maxsize=256)
def stage_blocks(model: ModelSpec, stages: int) -> tuple[tuple[Block, ...], ...]:
    """The blocks of every stage: the embedding joins the first, the head the last."""
    embed, *layers, head = blocks(model)
    cut: list[tuple[Block, ...]] = []
    at = 0
    for count in partition(model.layers, stages):
        cut.append(tuple(layers[at : at + count]))
        at += count
    cut[0] = (embed, *cut[0])
    cut[-1] = (*cut[-1], head)
    return tuple(cut)


_ONE: dict[Block, Block] = {}  # one object for all equal blocks: comparing them is then looking once


@lru_cache(maxsize=4096)
def canonical(block: Block) -> Block:
    """The block without the names of its tensors: blocks that cost the same become one."""

    def bare(weight: Weight) -> Weight:
        return replace(weight, parts=())

    def plain(node: Node) -> Node:
        return replace(node, weights=tuple(map(bare, node.weights)))

    made = replace(block, index=0, nodes=tuple(map(plain, block.nodes)))
    return _ONE.setdefault(made, made)


@lru_cache(maxsize=256)
def canonical_stages(model: ModelSpec, stages: int) -> tuple[tuple[Block, ...], ...]:
    return tuple(tuple(map(canonical, stage)) for stage in stage_blocks(model, stages))


def local_parameters(stage: tuple[Block, ...], tensor: int) -> int:
    """Elements of a stage's weights that one tensor rank holds; a tensor shared by two of its blocks counts once."""
    sizes = {}
    for number, block in enumerate(stage):
        for weight in block.weights():
            key = weight.parts or (number, weight.name)
            sizes[key] = weight.size // (tensor if weight.shard is not None else 1)
    return sum(sizes.values())


@lru_cache(maxsize=8192)
def body_peaks(block: Block, shape: Shape, policy: str, site: Site) -> tuple[int, int]:
    """The most bytes alive inside one block's forward and backward, its input left out."""
    body = lower_block(block, shape, policy)

    def peak(program: Program) -> int:
        held = memory(program, lambda rank, i: workspace(block, i, shape, body.sizes, site))
        return max(held[0].get("device", ()), default=0)

    return peak(body.forward), peak(body.backward)


@lru_cache(maxsize=8192)
def sizes(model: ModelSpec, stages: int, stage: int, shape: Shape, policy: str, site: Site) -> Sizes:
    """The bytes of one stage. Inside it, the output of one block is the kept input of the next."""
    held = canonical_stages(model, stages)[stage]
    bodies: list[Body] = [lower_block(block, shape, policy) for block in held]
    peaks = [body_peaks(block, shape, policy, site) for block in held]
    forward = backward = resident = 0
    for body, (forth, back) in zip(bodies, peaks, strict=True):
        forward = max(forward, resident + forth)
        backward = max(backward, resident + back)
        resident += body.saved_bytes + body.output_bytes
    last = bodies[-1].output != "loss"
    output = bodies[-1].output_bytes if last else 0
    saved = resident - bodies[-1].output_bytes
    inputs = bodies[0].sizes["x"] if stage else 0
    return Sizes(
        local_parameters(stage_blocks(model, stages)[stage], shape.tensor),
        saved,
        output,
        inputs,
        max(0, forward - saved - output),
        max(0, backward - saved - output - inputs),
    )
