"""A call of an operation, as rules of workspace look at it: node, shape, place, and bytes of operands and results."""

from __future__ import annotations

from dataclasses import dataclass

from autotune.planners.lower.shape import Shape
from autotune.spec.graph import Node

CHUNK_BYTES = 64 * 2**20  # of the wide temporaries of losses and weight gradients (runners/ops)
TILE_ROWS = 64  # products begin where they read fastest
INT, BOOL = 8, 1  # bytes of an index and of a mask's element


def tile_rows(inputs: int, width: int) -> int:
    """Rows of a weight [outputs, inputs] that are widened to `width` bytes an element at a time."""
    return max(1, CHUNK_BYTES // (inputs * width * TILE_ROWS)) * TILE_ROWS


@dataclass(frozen=True)
class Site:
    """Where a body runs: the kind of device, and on a CPU the threads of one worker."""

    kind: str = "cuda"
    threads: int = 1


@dataclass(frozen=True)
class Call:
    """What a rule looks at: an instruction's node, its shape, and bytes of what it reads and makes."""

    node: Node
    shape: Shape
    site: Site
    reads: tuple[int, ...]
    made: tuple[int, ...]

    @property
    def wide(self) -> int:
        """Bytes of an element of a statistic or sum."""
        return max(4, self.shape.width)

    @property
    def narrow(self) -> bool:
        return self.shape.width < 4

    def widened(self, size: int) -> int:
        """The bytes of a tensor of `size` bytes as statistics are kept."""
        return size // self.shape.width * self.wide

    def heads(self, attribute: str) -> int:
        return self.node.attr(attribute) // self.shape.tensor

    def per_head(self, attribute: str) -> int:
        """One wide number a token and head."""
        return self.shape.tokens * self.heads(attribute) * self.wide

    def values(self, attribute: str) -> int:
        """A wide tensor of all heads' values."""
        return self.per_head(attribute) * self.node.attr("head_dim")

    @property
    def slots(self) -> int:
        """Rows of experts."""
        return self.shape.tokens * self.node.attr("top_k")
