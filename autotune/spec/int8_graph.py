"""A block whose linear layers' weights are rounded to 8 bits, a scale for each row of outputs (plan axis `weights`).

y = s * (x Q^T) + b with Q = round(W / s) and s the largest magnitude of W's row over 127: symmetric, rounded once when
weights are loaded, activations untouched (Dettmers et al., 2208.07339, section 2, of weights alone). Embedding, norms
and head stay as they are: a tied head is the embedding, whose rows are looked up, and the head's errors go straight
into the choice of a token, for a fourteenth of what Llama-3.1-8B reads.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from autotune.spec.nodes import Block, Node, Weight

OP = "linear_int8"
ROUNDED, SCALE = "int8", "scale"  # forms of a weight
LARGEST = 127  # of a rounded weight
ROUNDED_BYTES = 1
SCALE_BYTES = 4  # at least: of an fp64 model 8


def _rounded(node: Node) -> Node:
    if node.op != "linear":
        return node
    weight, *bias = node.weights
    rows = 0 if weight.shard == 0 else None  # a row's scale is the whole row's, also where ranks share its inputs
    scale = Weight(weight.name.replace(".weight", ".scale"), weight.shape[:1], (), rows, form=SCALE)
    return replace(node, op=OP, weights=(replace(weight, form=ROUNDED), scale, *bias))


def rounded(block: Block) -> Block:
    """A layer with rounded linear weights; other blocks as they are."""
    return replace(block, nodes=tuple(map(_rounded, block.nodes))) if block.kind == "layer" else block


def pairs(block: Block) -> Iterator[tuple[Weight, Weight]]:
    """The rounded weights of a block, each with its scale."""
    for node in block.nodes:
        if node.op == OP:
            yield node.weights[0], node.weights[1]


def weight_bytes(weight: Weight, width: int) -> int:
    """Bytes of one element of a weight, where those that are kept as the precision says take `width`."""
    return {ROUNDED: ROUNDED_BYTES, SCALE: max(SCALE_BYTES, width)}.get(weight.form, width)
