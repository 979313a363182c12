"""Layers to stages where each rank holds several and the largest rank is what counts.

Where the stages go down the ranks and up again, each rank holds the next stages from both ends, so what is left is one
interval of layers and dynamic programming over intervals is exact and fast. For other placements all vectors of rank
loads that are not above a known cut's are kept, stage by stage: exact too, but exponential in the ranks, so bounded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

LABELS = 200_000  # steps from one vector of rank loads to the next before the search gives up

Fits = list[list[list[int]]]  # [stage][first layer] -> where it may end


@dataclass(frozen=True)
class Loads:
    """Exact costs: cumulated over the layers, and what the first and the last stage have to do beside them."""

    total: tuple[int, ...]
    first: int
    last: int
    stages: int

    def of(self, stage: int, i: int, j: int) -> int:
        """The time of a stage that holds the layers from i up to j."""
        extra = (self.first if stage == 0 else 0) + (self.last if stage == self.stages - 1 else 0)
        return self.total[j] - self.total[i] + extra


def by_rank(loads: Loads, fits: Fits, layers: int, ranks: tuple[int, ...], start: tuple[int, ...]) -> tuple[int, ...]:
    """The cut with the least largest rank, then the least sum of squares of the ranks, then of the stages.

    `start` is a cut that fits. ValueError where there is too much to look at.
    """
    most = max(_rank_loads(loads, start, ranks))
    half = len(ranks) // 2
    if ranks == (*ranks[:half], *reversed(ranks[:half])) and len(set(ranks)) == half:
        return _folded(loads, fits, layers, _folded_most(loads, fits, layers, most))
    return _vectors(loads, fits, layers, ranks, most)


def _pairs(loads: Loads, fits: Fits, s: int, i: int, j: int, most: int) -> list[tuple[int, int, int, int]]:
    """(i', j', load of the stage from i to i', load of its fellow from j' to j) that a rank with stages s and -1-s of
    the layers from i up to j may hold; the innermost leaves nothing."""
    fellow, found = loads.stages - 1 - s, []
    for end in fits[s][i]:
        left = loads.of(s, i, end)
        if left > most or end >= j:
            break
        for begin in (end,) if fellow == s + 1 else range(j - 1, end, -1):
            right = loads.of(fellow, begin, j)
            if left + right > most:
                break
            if j in fits[fellow][begin]:
                found.append((end, begin, left, right))
    return found


def _folded_most(loads: Loads, fits: Fits, layers: int, most: int) -> int:
    """The least largest rank, known not to be above `most`."""
    front = {(0, layers): 0}
    for s in range(loads.stages // 2):
        new: dict[tuple[int, int], int] = {}
        for (i, j), worst in front.items():
            for end, begin, left, right in _pairs(loads, fits, s, i, j, most):
                value = max(worst, left + right)
                if value < new.get((end, begin), value + 1):
                    new[end, begin] = value
        front = new
    return min(front.values())


def _folded(loads: Loads, fits: Fits, layers: int, most: int) -> tuple[int, ...]:
    """The most even cut with no rank above `most`."""
    Key = tuple[int, int, tuple[int, ...], tuple[int, ...]]  # squares of ranks, of stages, layers from both ends
    front: dict[tuple[int, int], Key] = {(0, layers): (0, 0, (), ())}
    for s in range(loads.stages // 2):
        new: dict[tuple[int, int], Key] = {}
        for (i, j), (ranks, stages, down, up) in front.items():
            for end, begin, left, right in _pairs(loads, fits, s, i, j, most):
                squares = stages + left * left + right * right
                key = (ranks + (left + right) ** 2, squares, (*down, i - end), (begin - j, *up))
                if (end, begin) not in new or key < new[end, begin]:  # negative: more layers first
                    new[end, begin] = key
        front = new
    _, _, down, up = min(front.values())
    return tuple(-n for n in (*down, *up))


def _vectors(loads: Loads, fits: Fits, layers: int, ranks: tuple[int, ...], most: int) -> tuple[int, ...]:
    """The best cut by rank among those with no rank above `most`; of equal vectors only the most even cut is kept."""
    count, looked = max(ranks) + 1, 0
    Key = tuple[int, tuple[int, ...]]
    front: dict[tuple[int, tuple[int, ...]], Key] = {(0, (0,) * count): (0, ())}
    for s, rank in enumerate(ranks):
        new: dict[tuple[int, tuple[int, ...]], Key] = {}
        for (i, vector), (squares, cut) in front.items():
            for j in fits[s][i] if i < layers else ():
                load = loads.of(s, i, j)
                if vector[rank] + load > most:
                    break
                looked += 1
                if looked > LABELS:
                    raise ValueError(
                        f"at most {LABELS} cuts to look at (found more: {count} ranks, {layers} layers, {len(ranks)} "
                        "stages); leave `ranks` out to balance the stages, or place them down the ranks and up again"
                    )
                at = (j, (*vector[:rank], vector[rank] + load, *vector[rank + 1 :]))
                key = (squares + load * load, (*cut, i - j))  # negative: more layers first
                if at not in new or key < new[at]:
                    new[at] = key
        front = new
    final = [(max(v), sum(x * x for x in v), *key) for (j, v), key in front.items() if j == layers]
    return tuple(-n for n in min(final)[3])


def _rank_loads(loads: Loads, cut: Sequence[int], ranks: Sequence[int]) -> list[int]:
    ends = list(accumulate(cut, initial=0))
    found = [0] * (max(ranks) + 1)
    for s, rank in enumerate(ranks):
        found[rank] += loads.of(s, ends[s], ends[s + 1])
    return found
