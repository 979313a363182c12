"""The block graph of decoding heads: in training all of them on a frozen target's hidden rows, with their loss; when
they propose, a block a head."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

from autotune.spec.heads import HeadsSpec
from autotune.spec.nodes import Block, Node, Weight, linear

TARGET = "target"  # what a weight begins as: the target's own output projection


def _residual(model: HeadsSpec, head: int, place: int, mark: str, read: str, write: str) -> Iterator[Node]:
    """One residual block of a head: x + f(W x), or with a feed-forward x + W2 f(W1 x)."""
    prefix, name, width = f"heads.{head}.blocks.{place}", f"{mark}{place}", model.ffn or model.hidden
    up, shaped = f"{name}.u", f"{name}.s"
    yield linear(f"{name}.up", read, up, model.hidden, ((f"{prefix}.up", width),), "", bias=True)
    how = (("width", width), ("function", model.activation))
    yield Node("activate", f"{name}.activate", (up,), (shaped,), (), "", how)
    if model.ffn:
        down = f"{name}.d"
        yield linear(f"{name}.down", shaped, down, width, ((f"{prefix}.down", model.hidden),), "", bias=True)
        shaped = down
    yield Node("add", f"{name}.add", (read, shaped), (write,), attrs=(("width", model.hidden),))


def _started(node: Node, init: str) -> Node:
    """A linear node whose weight (not its bias) begins otherwise."""
    weight, *rest = node.weights
    changed = Weight(weight.name, weight.shape, weight.parts, weight.shard, init)
    return Node(node.op, node.name, node.reads, node.writes, (changed, *rest), node.split, node.attrs)


def _head(model: HeadsSpec, head: int, mark: str, logits: str) -> Iterator[Node]:
    """Head `head`, from 0: x -> its logits. A block begins as nothing (its last product is zero), so that a head begins
    as what the target says of the next token (Medusa 2401.10774, 2.1)."""
    read = "x"
    for place in range(model.depth):
        write = f"{mark}{place}.y"
        nodes = list(_residual(model, head, place, mark, read, write))
        nodes[-2 if model.ffn else 0] = _started(nodes[-2 if model.ffn else 0], "zeros")
        yield from nodes
        read = write
    product = linear(f"{mark}lm_head", read, logits, model.hidden, ((f"heads.{head}.lm_head", model.vocab),), "")
    yield _started(product, TARGET)


def _losses(model: HeadsSpec, head: int, logits: str) -> Node:
    """Adds what head `head` loses to what those before it did."""
    before, after = (f"loss.{head - 1}",) if head else (), "loss" if head == model.count - 1 else f"loss.{head}"
    how = (("vocab", model.vocab), ("ahead", head + 1), ("share", model.decay ** (head + 1) / model.count))
    return Node("ahead_entropy", f"loss.{head}", (logits, "targets", *before), (after,), (), "", how)


def normed(head: Block) -> Block:
    """The final norm of a model's head, by itself."""
    return Block("norm", head.index, head.nodes[:1])


def features(blocks: tuple[Block, ...]) -> tuple[Block, ...]:
    """The blocks of a target up to its hidden rows: all of them, and of the head the final norm alone, as Medusa's
    heads read the rows that the output projection reads."""
    return (*blocks[:-1], normed(blocks[-1]))


def training_blocks(model: HeadsSpec, target: tuple[Block, ...]) -> tuple[Block, ...]:
    """The frozen target's rows, then all heads and their loss. `target`: see `features`."""
    width = (("width", model.hidden),)
    frozen = Node("frozen", "target", ("tokens",), ("y",), (), "", width, inner=target)
    nodes: list[Node] = []
    for head in range(model.count):
        nodes += _head(model, head, f"{head}.", f"logits.{head}")
        nodes.append(_losses(model, head, f"logits.{head}"))
    return Block("embed", 0, (frozen,)), Block("head", 1, tuple(nodes))


def frozen_blocks(blocks: tuple[Block, ...]) -> tuple[Block, ...]:
    """Those of another model that these blocks run as they are; none of most models."""
    return tuple(inner for block in blocks for node in block.nodes for inner in node.inner)


@lru_cache(maxsize=64)
def head_blocks(model: HeadsSpec) -> tuple[Block, ...]:
    """A block a head, from a hidden row to its logits; equal but for their tensors."""
    return tuple(Block("ahead", head, tuple(_head(model, head, "", "logits"))) for head in range(model.count))
