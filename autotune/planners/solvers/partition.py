"""Layers to stages: the contiguous cut with the least largest stage, by dynamic programming.

The recurrence is PipeDream's (1806.03377, its partitioning algorithm) without replication: the best cut of the layers
from i on into s stages takes some n layers and then the best cut of the rest into s - 1. GPipe's partitioner by cost
(1811.06965, section 2.2) minimises the variance of the stages; that decides here between cuts whose largest stages are
equal. Where the ranks count, `by_rank` does the same for them.

Seconds are turned into integers (a float's denominator is a power of two): equal costs tie, nothing is rounded.
"""

from __future__ import annotations

from collections.abc import Sequence
from heapq import heapify, heapreplace
from itertools import accumulate, pairwise

from autotune.planners.solvers.by_rank import Loads, by_rank


def partition(
    costs: Sequence[float],
    stages: int,
    first: float = 0.0,
    last: float = 0.0,
    ranks: Sequence[int] = (),
    memory: Sequence[int] = (),
    limits: Sequence[int] = (),
) -> tuple[int, ...]:
    """Layers of each stage, at least one: the largest stage takes the least time, and then the cut is the most even.

    `costs`: seconds of forward and backward of each layer; `first` and `last`: seconds of the embedding and the head.
    `ranks`: the rank of each stage; then the largest rank is what counts, its stages added up. `memory`: bytes of each
    layer, `limits`: bytes of each stage. Among cuts with equal sums of squares the outer stages get fewer layers, then
    the earlier stages more. ValueError where no cut fits, or the ranks leave too many to look at.
    """
    layers = len(costs)
    if not 1 <= stages <= layers:
        raise ValueError(
            f"1 to {layers} stages for {layers} layers (found {stages}; nearest {min(max(stages, 1), layers)})"
        )
    if min(costs) < 0 or first < 0 or last < 0:
        raise ValueError(f"costs that are not negative (found {min(*costs, first, last):g})")
    if len(memory) not in (0, layers) or len(limits) != (stages if memory else 0):
        raise ValueError(
            f"bytes of {layers} layers and limits of {stages} stages, or neither "
            f"(found {len(memory)} and {len(limits)})"
        )
    if len(ranks) not in (0, stages):
        raise ValueError(f"the rank of each of {stages} stages (found {len(ranks)})")
    whole = _integers([*costs, first, last])
    loads = Loads(tuple(accumulate(whole[:layers], initial=0)), whole[-2], whole[-1], stages)
    if not memory and len(set(whole[:layers])) == 1 and len(set(ranks)) == len(ranks):
        return _equal_layers(whole[0], layers, stages, whole[-2], whole[-1])
    held = tuple(accumulate(memory, initial=0))
    _check_memory(held, limits, layers, stages)
    fits = [[_ends(s, i, stages, layers, held, limits) for i in range(layers)] for s in range(stages)]
    most = _least_largest(loads, fits, stages, layers)
    cut = _most_even(loads, fits, stages, layers, most)
    if len(set(ranks)) < len(ranks):
        return by_rank(loads, fits, layers, tuple(ranks), cut)
    return cut


def _equal_layers(cost: int, layers: int, stages: int, first: int, last: int) -> tuple[int, ...]:
    """The cut of layers that all cost the same: each in turn goes to the stage with the least to do, of equal ones to
    an inner one, then to the earliest.

    A stage's load grows by the same step with each layer, so no exchange of one can lessen the largest load or the sum
    of squares: what the dynamic program gives, in a time that does not grow with the square of the layers.
    """
    ends = (0, stages - 1)
    heap = [(cost + first * (s == 0) + last * (s == stages - 1), s in ends, s) for s in range(stages)]
    heapify(heap)
    cut = [1] * stages
    for _ in range(layers - stages):
        load, outer, s = heap[0]
        cut[s] += 1
        heapreplace(heap, (load + cost, outer, s))
    return tuple(cut)


def _integers(values: Sequence[float]) -> list[int]:
    """The values times their largest denominator, exactly."""
    ratios = [float(value).as_integer_ratio() for value in values]
    scale = max(denominator for _, denominator in ratios)  # all are powers of two
    return [numerator * (scale // denominator) for numerator, denominator in ratios]


def _ends(s: int, i: int, stages: int, layers: int, held: Sequence[int], limits: Sequence[int]) -> list[int]:
    """Where a stage that starts with layer i may end: the later stages get one layer each, and its bytes fit."""
    last = s == stages - 1
    ends = range(layers if last else i + 1, layers + 1 - (stages - 1 - s))
    return [j for j in ends if not limits or held[j] - held[i] <= limits[s]]


def _check_memory(held: Sequence[int], limits: Sequence[int], layers: int, stages: int) -> None:
    """ValueError where every cut exceeds some limit, with the least excess that a cut has."""
    if not limits:
        return
    over = [[0] * (layers + 1) for _ in range(stages + 1)]
    far = held[-1] + 1
    over[stages] = [far] * layers + [-max(limits) - 1]
    for s in reversed(range(stages)):
        ends = [_ends(s, i, stages, layers, held, ()) for i in range(layers)]
        over[s] = [
            min((max(held[j] - held[i] - limits[s], over[s + 1][j]) for j in ends[i]), default=far)
            for i in range(layers)
        ] + [far]
    if over[0][0] > 0:
        raise ValueError(
            f"{layers} layers of {held[-1]} bytes in {stages} stages: the best cut is {over[0][0]} bytes over a "
            f"stage's limit (limits {tuple(limits)}; nearest: each {over[0][0]} more)"
        )


def _least_largest(loads: Loads, fits: list[list[list[int]]], stages: int, layers: int) -> int:
    """The least time that the largest stage can have."""
    far = loads.total[-1] + loads.first + loads.last + 1
    best = [far] * layers + [0]
    for s in reversed(range(stages)):
        best = [min((max(loads.of(s, i, j), best[j]) for j in fits[s][i]), default=far) for i in range(layers)] + [far]
    return best[0]


def _most_even(loads: Loads, fits: list[list[list[int]]], stages: int, layers: int, most: int) -> tuple[int, ...]:
    """Of the cuts without a stage above `most`, the one with the least sum of squares."""
    far = (stages * most * most + 1, 0)
    best = [far] * layers + [(0, 0)]
    choice: list[list[int]] = []
    for s in reversed(range(stages)):
        outer = s in (0, stages - 1)
        now, chosen = [far] * (layers + 1), [layers] * layers
        for i in range(layers):
            for j in fits[s][i]:
                load = loads.of(s, i, j)
                key = (load * load + best[j][0], outer * (j - i) + best[j][1])
                if load <= most and best[j] < far and key <= now[i]:  # among equals the most layers first
                    now[i], chosen[i] = key, j
        best = now
        choice.insert(0, chosen)
    cut, at = [], 0
    for s in range(stages):
        cut.append(choice[s][at] - at)
        at = choice[s][at]
    return tuple(cut)


def evenness(
    costs: Sequence[float], cut: Sequence[int], first: float = 0.0, last: float = 0.0, ranks: Sequence[int] = ()
) -> float:
    """The largest stage's time (with `ranks` the largest rank's) over the mean: 1 where all are equal."""
    ends = list(accumulate(cut, initial=0))
    loads = [sum(costs[i:j]) for i, j in pairwise(ends)]
    loads[0] += first
    loads[-1] += last
    if ranks:
        loads = [sum(load for load, r in zip(loads, ranks, strict=True) if r == rank) for rank in sorted(set(ranks))]
    return max(loads) * len(loads) / sum(loads)
