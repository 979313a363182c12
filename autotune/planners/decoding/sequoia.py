"""The best tree for given acceptances by rank: Sequoia's dynamic program (2402.12374, section 4.1.1).

p_i is the chance that, the parent being accepted, it is the i-th child that is: the earlier siblings were rejected and
this one was not. Of these events one at most happens, so the p_i add up to at most 1. F(T) is the sum over the nodes of
the products of p along their paths, the root's being 1: the tokens that a round commits. Every rank at every depth has
the same p_i, so the best subtrees of one size and depth are the same wherever they hang:

    best(n, d)    = 1 + kids(n, d - 1, 1)                                             n candidates below the root
    kids(n, d, i) = max over y of p_i best(y - 1, d) + kids(n - y, d, i + 1)          y of them in the i-th child's tree
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from autotune.planners.decoding.chances import at_least, chances, exclusive
from autotune.planners.decoding.growth import expected as expected_by_depth
from autotune.planners.decoding.trees import Scored, Tree

Floats = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Table:
    """The best trees of every size and depth up to the asked ones; beyond the last depth kept nothing changes."""

    values: tuple[Floats, ...]  # [depth][size] -> F; minus infinity: there is no such tree
    taken: tuple[tuple[NDArray[np.int64], ...], ...]  # [depth][rank][candidates left] -> nodes of this child's tree

    def value(self, size: int, depth: int) -> float:
        """F of the best tree of exactly `size` candidates, `depth` deep at most; minus infinity: there is none."""
        return float(self.values[min(depth, len(self.values) - 1)][size])

    def tree(self, size: int, depth: int) -> Tree:
        """That tree, level by level, siblings side by side. ValueError where there is none."""
        if self.value(size, depth) == -np.inf:
            raise ValueError(f"no tree of {size} candidates is {depth} deep and has that few children a node")
        parents: list[int] = []
        level = [(0, size, min(depth, len(self.values) - 1))]  # (node, candidates below it, depth below it)
        for node, below, deep in level:
            rank = 0
            while below:
                nodes = int(self.taken[deep][rank][below])
                parents.append(node)
                level.append((len(parents), nodes - 1, deep - 1))
                below, rank = below - nodes, rank + 1
        return Tree(tuple(parents))

    def best(self, size: int, depth: int) -> Scored:
        """The best tree of at most `size` candidates and at most `depth` deep; of equals the smallest."""
        found = int(np.argmax(self.values[min(depth, len(self.values) - 1)][: size + 1]))
        return Scored(self.tree(found, depth), self.value(found, depth))


def solve(acceptances: Sequence[float], size: int, depth: int | None = None) -> Table:
    """The table for trees of up to `size` candidates, `depth` deep at most (None: any).

    `acceptances[i - 1]` is p_i above; their number is the most children that a node has. `disjoint` makes them from
    rates of children that were tried. ValueError unless each is from 0 to 1 and their sum is at most 1, or where a size
    or a depth is negative.
    """
    p = exclusive("acceptances", acceptances)
    deepest = at_least("size", size, 0) if depth is None else min(at_least("depth", depth, 0), size)
    none = np.full(size + 1, -np.inf)
    none[0] = 0.0
    left = np.arange(size + 1)[:, None] - np.arange(1, size + 1)[None, :]  # [candidates][nodes taken - 1]
    values = [none + 1.0]  # the root alone
    taken: list[tuple[NDArray[np.int64], ...]] = [()]
    for _ in range(deepest):
        below = values[-1][:size]
        there = below > -np.inf
        kids, ranks = none, []
        for chance in reversed(p):
            own = np.where(there, chance * np.where(there, below, 0.0), -np.inf)
            both = np.where(left < 0, -np.inf, own[None, :] + kids[np.maximum(left, 0)])
            nodes = np.argmax(both, axis=1)
            kids = np.take_along_axis(both, nodes[:, None], axis=1)[:, 0]
            kids[0] = 0.0
            ranks.append(nodes + 1)
        if np.array_equal(kids + 1.0, values[-1]):
            break  # one more level changes nothing, so no further one does
        values.append(kids + 1.0)
        taken.append(tuple(reversed(ranks)))
    return Table(tuple(values), tuple(taken))


def best_tree(acceptances: Sequence[float], size: int, depth: int | None = None) -> Scored:
    """The tree with the largest F of at most `size` candidates, `depth` deep at most (None: any). Errors as `solve`."""
    return solve(acceptances, size, depth).best(size, size if depth is None else depth)


def candidates(acceptances: Sequence[float], size: int, depth: int | None = None) -> Iterator[Scored]:
    """For each depth and size the best tree, once: what `choose_tree` chooses among. Errors as `solve`."""
    table = solve(acceptances, size, depth)
    for deep in range(1, len(table.values)):
        for n in range(1, size + 1):
            if table.value(n, deep) > table.value(n, deep - 1):
                yield Scored(table.tree(n, deep), table.value(n, deep))


def expected(tree: Tree, acceptances: Sequence[float]) -> float:
    """F of any tree, in tokens a round. ValueError where a node has more children than there are acceptances."""
    return expected_by_depth(tree, [exclusive("acceptances", acceptances)] * tree.depth)


def disjoint(rates: Sequence[float]) -> tuple[float, ...]:
    """p_i from the rates at which the i-th child was accepted of the times that it was tried, all before it rejected.

    ValueError unless each is from 0 to 1.
    """
    found, tried = [], 1.0
    for rate in chances("rates", rates):
        found.append(tried * rate)
        tried *= 1.0 - rate
    return tuple(found)
