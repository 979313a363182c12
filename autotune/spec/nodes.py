"""The pieces that a block graph is made of: weights, nodes, blocks, and the two nodes that every family uses."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod


@dataclass(frozen=True)
class Weight:
    """A parameter of one block. `parts` are the Hugging Face tensors it is made of, stacked along dimension 0.

    `shard` is the dimension split over tensor ranks (each part by itself, so that a fused q, k, v stays aligned);
    None: every tensor rank holds it whole. `experts`: how many experts' weights are stacked in it, each as many of the
    parts as the others, for ranks to divide among themselves; 0: it is none of theirs.
    """

    name: str
    shape: tuple[int, ...]
    parts: tuple[tuple[str, int], ...]  # (full checkpoint name, rows)
    shard: int | None = None
    init: str = "normal"  # normal | ones | zeros | target (of heads: as the target's output projection)
    wide: bool = False  # kept in fp32 at least, whatever the precision
    form: str = ""  # how it is kept: "" as the precision says | int8 | scale (of an int8 one's rows): spec.int8_graph
    fresh: bool = False  # a training may begin without it, whatever else its checkpoint has: then it is random
    frozen: bool = False  # a weight like others for what reads it, but it has no gradient and never changes
    experts: int = 0

    @property
    def size(self) -> int:
        return prod(self.shape)


@dataclass(frozen=True)
class Node:
    """One operation of a block: `op` is a key of the cost table and of the operation table.

    `split` is how tensor parallelism divides it: "column" (needs whole operands of all tokens, and each rank's gradient
    of them is a partial sum: of a linear layer, whose output features are sharded), "row" (the output is a partial sum,
    added up here: of a linear layer, whose input features are sharded), "vocab" (rows of the embedding), "heads" (works
    on what a column split gave), "inner" (as row, but a later node adds up the partial sums), or "" (token-wise,
    indifferent to other tokens: replicated, or sharded by sequence). `constants` are tensors of the checkpoint that no
    gradient reaches and no optimizer changes. `inner`: blocks of another model that the operation runs as they are.
    """

    op: str
    name: str
    reads: tuple[str, ...]
    writes: tuple[str, ...]
    weights: tuple[Weight, ...] = ()
    split: str = ""
    attrs: tuple[tuple[str, int | float | str], ...] = ()
    constants: tuple[Weight, ...] = ()
    inner: tuple[Block, ...] = ()

    @property
    def learns(self) -> bool:
        """Whether it has a weight with a gradient."""
        return any(not weight.frozen for weight in self.weights)

    def attr(self, key: str) -> int:
        return int(dict(self.attrs)[key])

    def number(self, key: str) -> float:
        return float(dict(self.attrs)[key])

    def word(self, key: str) -> str:
        return str(dict(self.attrs)[key])


@dataclass(frozen=True)
class Block:
    """A straight piece of the model: reads `x` (or tokens), writes `x` (or logits, loss)."""

    # embed | layer | head | norm (the head's, by itself) | ahead (a decoding head); blocks of one kind and equal nodes
    # cost the same
    kind: str
    index: int
    nodes: tuple[Node, ...]

    def __hash__(self) -> int:
        """Computed once: blocks are keys of every table of costs, and hold hundreds of values."""
        known: int | None = self.__dict__.get("_hash")
        if known is None:
            known = hash((self.kind, self.index, self.nodes))
            object.__setattr__(self, "_hash", known)
        return known

    def __getstate__(self) -> dict[str, object]:
        return {
            name: value for name, value in self.__dict__.items() if name != "_hash"
        }  # another process, other hashes

    def weights(self) -> Iterator[Weight]:
        for node in self.nodes:
            yield from node.weights

    def trained(self) -> Iterator[Weight]:
        """Those that are not frozen."""
        return (weight for weight in self.weights() if not weight.frozen)

    def constants(self) -> Iterator[Weight]:
        for node in self.nodes:
            yield from node.constants

    def tensors(self) -> Iterator[Weight]:
        """All that a checkpoint has of the block: its weights, then its constants."""
        yield from self.weights()
        yield from self.constants()


def norm(name: str, read: str, write: str, tensor: str, width: int, eps: float) -> Node:
    """RMSNorm of `width` features with the gain vector `tensor`."""
    weight = Weight(f"{name}.weight", (width,), ((tensor, width),), init="ones")
    return Node("rmsnorm", name, (read,), (write,), (weight,), attrs=(("width", width), ("eps", eps)))


def linear(
    name: str, read: str, write: str, inner: int, parts: tuple[tuple[str, int], ...], split: str, bias: bool = False
) -> Node:
    """y = x W^T (+ b) from `inner` features to the sum of the rows of `parts` (checkpoint module name, rows).

    `split` is "column", "row" or "". A row-parallel bias is whole on every tensor rank, added after the sum.
    """
    rows = sum(count for _, count in parts)
    shard = {"column": 0, "row": 1, "": None}[split]
    weights = [Weight(f"{name}.weight", (rows, inner), tuple((f"{t}.weight", n) for t, n in parts), shard)]
    if bias:
        inputs = 0 if split == "column" else None
        weights.append(Weight(f"{name}.bias", (rows,), tuple((f"{t}.bias", n) for t, n in parts), inputs, "zeros"))
    return Node("linear", name, (read,), (write,), tuple(weights), split, (("inputs", inner), ("outputs", rows)))
