"""A tree of candidate tokens: what one verifying pass scores at once (SpecInfer 2305.09781, section 4; Medusa
2401.10774, section 2.1.2).

Node 0 is the root, the newest committed token; the others are candidates. A node sees itself and its ancestors, its
position is its depth after the root's, and what is accepted is a path from the root. A chain is the tree in which each
node follows the one before it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from autotune.planners.decoding.chances import at_least
from autotune.spec.errors import Problem, UsageError


@dataclass(frozen=True)
class Tree:
    """`parents[i - 1]`: the parent of node i, an earlier one. `ranks[i - 1]`: how many of its siblings are likelier.

    Siblings are numbered in the order of their likelihood, so the ranks follow from the parents and may be left out.
    ValueError where a parent is not an earlier node or given ranks are not that order.
    """

    parents: tuple[int, ...]
    ranks: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for node, parent in enumerate(self.parents, start=1):
            if not 0 <= parent < node:
                raise ValueError(f"node {node}: a parent from 0 to {node - 1} (found {parent})")
        order = _order(self.parents)
        if self.ranks not in ((), order):
            raise ValueError(f"ranks in the order of the siblings, {order} (found {self.ranks})")
        object.__setattr__(self, "ranks", order)

    @classmethod
    def chain_of(cls, length: int) -> Tree:
        """A chain of `length` candidates; 0: the root alone, no speculation."""
        return cls(tuple(range(at_least("length", length, 0))))

    @classmethod
    def parse(cls, text: str) -> Tree:
        """The tree of a text, its parents: "0,0,1,1,2"; "" is the root alone. UsageError says what is wrong."""
        parents: list[int] = []
        for node, word in enumerate(text.split(",") if text.strip() else (), start=1):
            digits = word.strip()
            number = int(digits) if digits.isascii() and digits.isdigit() and len(digits) < 10 else -1
            if not 0 <= number < node:
                expected = f"the number of an earlier node, 0 to {node - 1}" if node > 1 else "0, the root"
                problem = Problem(f'tree "{text}"', f"parent of node {node}", f'"{digits}"', expected)
                raise UsageError("the tree is not valid", problems=[problem])
            parents.append(number)
        return cls(tuple(parents))

    @property
    def text(self) -> str:
        """What `parse` reads back."""
        return ",".join(map(str, self.parents))

    def __str__(self) -> str:
        return self.text

    @property
    def size(self) -> int:
        """Candidates, without the root; a verifying pass has one token more."""
        return len(self.parents)

    @cached_property
    def depths(self) -> tuple[int, ...]:
        """Of each node, the root's 0 first: the steps of drafting that it takes and its place after the root's."""
        found = [0]
        for parent in self.parents:
            found.append(found[parent] + 1)
        return tuple(found)

    @property
    def depth(self) -> int:
        """Of the deepest node: the most candidates that a round can accept."""
        return max(self.depths)

    @property
    def chain(self) -> bool:
        """Whether each node's parent is the one before it."""
        return self.parents == tuple(range(self.size))

    def visible(self) -> tuple[tuple[bool, ...], ...]:
        """[node][other] -> whether the node sees the other: itself and its ancestors, the root's row first."""
        rows = [[True] + [False] * self.size]
        for node, parent in enumerate(self.parents, start=1):
            row = list(rows[parent])
            row[node] = True
            rows.append(row)
        return tuple(map(tuple, rows))

    @cached_property
    def paths(self) -> tuple[tuple[int, ...], ...]:
        """The nodes from the root, which is one of them, to each leaf, in the order of the leaves."""
        inner = set(self.parents)
        return tuple(self.path(node) for node in range(self.size + 1) if node not in inner)

    def path(self, node: int) -> tuple[int, ...]:
        """The nodes from the root to this one, both of them."""
        found = [node]
        while found[-1]:
            found.append(self.parents[found[-1] - 1])
        return tuple(reversed(found))


@dataclass(frozen=True)
class Scored:
    """A tree and the tokens that a round with it is expected to commit, the verifying model's own included."""

    tree: Tree
    expected: float


def _order(parents: tuple[int, ...]) -> tuple[int, ...]:
    """[node - 1] -> how many of its siblings come before it."""
    seen = [0] * (len(parents) + 1)
    ranks = []
    for parent in parents:
        ranks.append(seen[parent])
        seen[parent] += 1
    return tuple(ranks)
