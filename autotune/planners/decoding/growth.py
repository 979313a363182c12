"""Trees from the accuracies of heads, grown node by node (Medusa 2401.10774, section 2.3.3).

The head of depth k guesses the k-th token from now; a_k(i) is how often its guess of rank i is right, the difference
of its measured accuracies within the first i + 1 and the first i guesses. Heads are taken as independent: a node is
accepted with the product of its path's accuracies. Products fall along a path and from a sibling to the next, so
taking the likeliest node that is left gives the best tree of every size, and each tree holds the ones before it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from heapq import heappop, heappush
from itertools import pairwise

from autotune.planners.decoding.chances import at_least, exclusive
from autotune.planners.decoding.trees import Scored, Tree


def grow(accuracies: Sequence[Sequence[float]], size: int) -> tuple[Scored, ...]:
    """The best trees of 1, 2, ... `size` candidates, each with the next node at its end; fewer where the guesses end.

    `accuracies[k][i]`: that of rank i at depth k + 1; no depth's may rise with the rank (`falling` mends measured ones)
    or add up to more than 1. ValueError where they do, or `size` is negative.
    """
    at_least("size", size, 0)
    table = [exclusive(f"accuracies at depth {k}", row) for k, row in enumerate(accuracies, start=1)]
    for k, row in enumerate(table, start=1):
        if any(a < b for a, b in pairwise(row)):
            raise ValueError(f"accuracies that do not rise with the rank (found {row} at depth {k}); see `falling`")
    # (minus the chance of acceptance, depth, parent, rank): of equal chances the shallower, then the older parent's
    left: list[tuple[float, int, int, int]] = []
    reached, depths = [1.0], [0]

    def offer(parent: int, rank: int) -> None:
        depth = depths[parent] + 1
        if depth <= len(table) and rank < len(table[depth - 1]):
            heappush(left, (-reached[parent] * table[depth - 1][rank], depth, parent, rank))

    offer(0, 0)
    parents: list[int] = []
    found: list[Scored] = []
    tokens = 1.0
    while left and len(parents) < size:
        chance, depth, parent, rank = heappop(left)
        parents.append(parent)
        reached.append(-chance)
        depths.append(depth)
        tokens -= chance
        found.append(Scored(Tree(tuple(parents)), tokens))
        offer(len(parents), 0)
        offer(parent, rank + 1)
    return tuple(found)


def candidates(accuracies: Sequence[Sequence[float]], size: int) -> Iterator[Scored]:
    """For each depth the best trees of up to `size` candidates that are that deep: what `choose_tree` chooses among.

    A tree that a smaller limit gave already is left out. ValueError as in `grow`.
    """
    for depth in range(1, len(accuracies) + 1):
        yield from (scored for scored in grow(accuracies[:depth], size) if scored.tree.depth == depth)


def reach(tree: Tree, accuracies: Sequence[Sequence[float]]) -> tuple[float, ...]:
    """[node] -> the chance that it is accepted, the root's 1 first.

    `accuracies` as in `grow`, but they may rise. ValueError where those of a depth add up to more than 1, or the tree
    is deeper or has more siblings than there are accuracies.
    """
    table = [exclusive(f"accuracies at depth {k}", row) for k, row in enumerate(accuracies, start=1)]
    found = [1.0]
    for parent, rank, depth in zip(tree.parents, tree.ranks, tree.depths[1:], strict=True):
        if depth > len(table) or rank >= len(table[depth - 1]):
            raise ValueError(f"accuracies for each node of the tree (found none for rank {rank} at depth {depth})")
        found.append(found[parent] * table[depth - 1][rank])
    return tuple(found)


def expected(tree: Tree, accuracies: Sequence[Sequence[float]]) -> float:
    """Tokens a round: the sum of its nodes' chances, the root standing for the verifying model's own token.

    ValueError as in `reach`.
    """
    return sum(reach(tree, accuracies))


def distribution(tree: Tree, accuracies: Sequence[Sequence[float]]) -> tuple[float, ...]:
    """[k - 1] -> the probability that a round commits k tokens: at most one node of a depth is accepted.

    ValueError as in `reach`.
    """
    deep = [0.0] * (tree.depth + 2)
    for depth, chance in zip(tree.depths, reach(tree, accuracies), strict=True):
        deep[depth] += chance
    return tuple(max(0.0, deep[k] - deep[k + 1]) for k in range(tree.depth + 1))


def falling(accuracies: Sequence[float]) -> tuple[float, ...]:
    """The nearest accuracies, by least squares, that do not rise with the rank; their sum stays.

    Counts of few rounds rise here and there by chance. Neighbours that rise are pooled until none does (pool adjacent
    violators; Ayer et al. 1955). ValueError unless each is from 0 to 1 and their sum is at most 1.
    """
    pools: list[tuple[float, int]] = []  # (sum, count)
    for value in exclusive("accuracies", accuracies):
        total, count = value, 1
        while pools and pools[-1][0] / pools[-1][1] < total / count:
            before, more = pools.pop()
            total, count = total + before, count + more
        pools.append((total, count))
    return tuple(total / count for total, count in pools for _ in range(count))
