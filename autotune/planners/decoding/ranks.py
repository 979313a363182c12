"""Ranks: how likely decoding heads held what really came, place by place of texts; and what any tree makes of that.

A text's answer is the same whatever is proposed, so from the ranks of one generation the rounds of every tree are
replayed, with all that heads share (easy places are easy for each of them) and without taking them as independent. A
text's ranks are one word: of each place a character for each head, the first head's first.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

from autotune.planners.decoding.growth import falling, grow
from autotune.planners.decoding.trees import Tree

DIGITS = "0123456789abcdef"  # ranks that are told apart
BEYOND = "."
SIZES = (2, 4, 8, 16, 32, 63)  # nodes of the trees that a search tries; 63 are the largest of Medusa's (2401.10774)


def word(ranks: Sequence[int]) -> str:
    """The ranks of one place."""
    return "".join(DIGITS[rank] if rank < len(DIGITS) else BEYOND for rank in ranks)


def places(text: str, heads: int) -> Iterator[str]:
    """The ranks of each place of a text."""
    return (text[at : at + heads] for at in range(0, len(text), heads))


def table(texts: Sequence[str], heads: int) -> tuple[tuple[float, ...], ...]:
    """[head][rank] -> the share of all places whose token that head held so likely (Medusa 2401.10774, 2.3.3)."""
    every = [place for text in texts for place in places(text, heads)]
    found = []
    for head in range(heads):
        counts = Counter(place[head] for place in every)
        found.append(tuple(counts[digit] / max(1, len(every)) for digit in DIGITS))
    return tuple(found)


def replayed(text: str, heads: int, tree: Tree) -> tuple[int, ...]:
    """Tokens that each round of a tree commits over a text: as deep as the tree follows what came, and one."""
    children = {
        (parent, DIGITS[rank]): node
        for node, (parent, rank) in enumerate(zip(tree.parents, tree.ranks, strict=True), 1)
        if rank < len(DIGITS)
    }
    every, found, at = list(places(text, heads)), list[int](), 0
    while at < len(every):
        node, count = 0, 1
        for rank in every[at]:
            after = children.get((node, rank))
            if after is None:
                break
            node, count = after, count + 1
        found.append(count)
        at += count
    return tuple(found)


def trees(texts: Sequence[str], heads: int, depths: Sequence[int]) -> Iterator[Tree]:
    """The trees worth trying: of every depth and size the one that is expected to commit most, if it branches."""
    rows, known = [falling(row) for row in table(texts, heads)], set[tuple[int, ...]]()
    for depth in depths:
        grown = grow(rows[:depth], SIZES[-1])
        for scored in (grown[size - 1] for size in SIZES if size <= len(grown)):
            tree = scored.tree
            if not tree.chain and tree.depth == depth and tree.parents not in known:
                known.add(tree.parents)
                yield tree
