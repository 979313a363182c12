"""Local search on words: what lies on the critical path changes places with its neighbours.

A move takes a letter of a block (successive steps of one rank on the critical path) to either end of the block; only
such moves can shorten it (Nowicki and Smutnicki 1996, Balas and Vazacopoulos 1998, on job shops). First improvement,
in a fixed order, until a budget of sweeps is spent or nothing helps.
"""

from __future__ import annotations

from collections.abc import Iterator

from autotune.planners.solvers.shop import Shop, Word, Words
from autotune.planners.solvers.sweep import Sweep, critical, fits, sweep


def improve(shop: Shop, start: Sweep, sweeps: int, target: float) -> tuple[Sweep, int]:
    """The best words found and the sweeps spent; stops at `target` (the bound)."""
    best, near = start, 1e-9 * shop.scale
    spent, tried = 0, set[tuple[int, Word]]()
    moved = True
    while moved and best.value > target + near:
        moved = False
        for words in _moves(best, tried):
            if spent >= sweeps:
                return best, spent
            spent += 1
            found = sweep(shop, words)
            if found is not None and found.value < best.value - near:
                best, moved = found, True
                tried = set()
                break
    return best, spent


def _moves(found: Sweep, tried: set[tuple[int, Word]]) -> Iterator[Words]:
    """Words with one letter moved to an end of its critical block, legal under the limit."""
    for rank, first, last in _blocks(critical(found)):
        word = found.words[rank]
        targets = [(first + 1, first), (last, last - 1)]
        targets += [(at, last) for at in range(last - 1, first - 1, -1)] + [
            (at, first) for at in range(first + 2, last + 1)
        ]
        for at, to in targets:
            if word[at] == word[to]:
                continue
            changed = list(word)
            changed.insert(to, changed.pop(at))
            new = tuple(changed)
            if new == word or (rank, new) in tried:
                continue
            tried.add((rank, new))
            words = (*found.words[:rank], new, *found.words[rank + 1 :])
            if fits(found.shop, (new,)):
                yield words


def _blocks(path: list[tuple[int, int]]) -> list[tuple[int, int, int]]:
    """(rank, first and last position) of each run of two and more successive steps of one rank."""
    blocks: list[tuple[int, int, int]] = []
    at = 0
    for i in range(1, len(path) + 1):
        if i < len(path) and path[i][0] == path[i - 1][0] and path[i][1] == path[i - 1][1] + 1:
            continue
        if i - at > 1:
            blocks.append((path[at][0], path[at][1], path[i - 1][1]))
        at = i
    return blocks
