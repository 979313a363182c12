"""Layers to stages by dynamic programming, against every cut there is."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from itertools import combinations, pairwise
from random import Random

import pytest

from autotune.planners.solvers.partition import evenness, partition


def cuts(layers: int, stages: int) -> Iterator[tuple[int, ...]]:
    for ends in combinations(range(1, layers), stages - 1):
        edges = (0, *ends, layers)
        yield tuple(b - a for a, b in pairwise(edges))


def stage_loads(costs: list[float], cut: tuple[int, ...], first: float, last: float) -> list[Fraction]:
    at, loads = 0, []
    for n in cut:
        loads.append(sum((Fraction(c) for c in costs[at : at + n]), Fraction(0)))
        at += n
    loads[0] += Fraction(first)
    loads[-1] += Fraction(last)
    return loads


def by_rank(loads: list[Fraction], ranks: tuple[int, ...]) -> list[Fraction]:
    return [
        sum((l for l, r in zip(loads, ranks, strict=True) if r == rank), Fraction(0)) for rank in sorted(set(ranks))
    ]


@pytest.mark.parametrize("seed", range(30))
def test_equals_enumeration(seed: int) -> None:
    """The least largest stage and, among those, the least sum of squares; with and without limits in bytes."""
    random = Random(seed)
    layers = random.randint(1, 9)
    stages = random.randint(1, layers)
    costs = [random.choice((0.1, 0.2, 0.3, random.random())) for _ in range(layers)]
    first, last = random.random(), random.random()
    memory = [random.randint(1, 5) for _ in range(layers)] if seed % 2 else []
    limits = [random.randint(4, 12) for _ in range(stages)] if memory else []

    def fits(cut: tuple[int, ...]) -> bool:
        ends = [sum(cut[:s]) for s in range(stages + 1)]
        return not limits or all(sum(memory[ends[s] : ends[s + 1]]) <= limits[s] for s in range(stages))

    legal = [cut for cut in cuts(layers, stages) if fits(cut)]
    if not legal:
        with pytest.raises(ValueError, match="over a stage's limit"):
            partition(costs, stages, first, last, memory=memory, limits=limits)
        return

    def key(cut: tuple[int, ...]) -> tuple[Fraction, Fraction]:
        loads = stage_loads(costs, cut, first, last)
        return max(loads), sum((l * l for l in loads), Fraction(0))

    found = partition(costs, stages, first, last, memory=memory, limits=limits)
    assert found in legal and key(found) == min(map(key, legal))


@pytest.mark.parametrize("ranks", [(0, 1, 1, 0), (0, 1, 0, 1), (0, 1, 2, 0, 1, 2), (0, 1, 2, 2, 1, 0)])
@pytest.mark.parametrize("seed", range(8))
def test_ranks_with_several_stages(ranks: tuple[int, ...], seed: int) -> None:
    random = Random(seed)
    costs = [random.choice((1.0, 2.0, random.random())) for _ in range(10)]
    first, last = random.choice((0.0, 0.7)), random.random()

    def key(cut: tuple[int, ...]) -> tuple[Fraction, Fraction]:
        loads = by_rank(stage_loads(costs, cut, first, last), ranks)
        return max(loads), sum((l * l for l in loads), Fraction(0))

    found = partition(costs, len(ranks), first, last, ranks)
    assert sum(found) == 10 and min(found) >= 1
    assert key(found) == min(map(key, cuts(10, len(ranks))))


def test_equal_layers_are_cut_as_ever() -> None:
    """The inner stages take the remainder, the earlier ones first."""
    assert partition([0.1] * 9, 4) == (2, 3, 2, 2)
    assert partition([0.1] * 10, 4) == (2, 3, 3, 2)
    assert partition([0.1] * 11, 4) == (3, 3, 3, 2)
    assert partition([0.3] * 12, 4) == (3, 3, 3, 3)


def test_a_heavy_head_takes_layers_off_the_last_stage() -> None:
    cut = partition([1.0] * 14, 4, last=2.0)
    assert cut == (4, 4, 4, 2)
    assert evenness([1.0] * 14, cut, last=2.0) == 1.0
    assert evenness([1.0] * 14, (3, 4, 4, 3), last=2.0) == 1.25
    assert evenness([1.0] * 14, (3, 4, 4, 3), last=2.0, ranks=(0, 1, 1, 0)) == 1.0


def test_what_is_wrong_is_said() -> None:
    with pytest.raises(ValueError, match=r"1 to 3 stages for 3 layers \(found 4; nearest 3\)"):
        partition([1.0] * 3, 4)
    with pytest.raises(ValueError, match=r"2 bytes over a stage's limit .*each 2 more"):
        partition([1.0] * 4, 2, memory=[6, 1, 1, 1], limits=[4, 4])
    assert partition([1.0] * 4, 2, memory=[6, 1, 1, 1], limits=[6, 6]) == (1, 3)
    with pytest.raises(ValueError, match="not negative"):
        partition([1.0, -1.0], 2)


def test_a_deep_model_is_cut_at_once() -> None:
    """126 layers in 64 stages with a heavy head: exact, and no stage above the head's own."""
    cut = partition([1.0] * 126, 64, first=0.5, last=2.5)
    assert sum(cut) == 126 and cut[-1] == 1
    ends = [sum(cut[:s]) for s in range(65)]
    assert max(ends[s + 1] - ends[s] + (0.5 if s == 0 else 0) + (2.5 if s == 63 else 0) for s in range(64)) == 3.5


def test_a_fold_over_many_ranks() -> None:
    """64 layers, 16 ranks with two stages each: embedding and head weigh two layers on rank 0."""
    ranks = (*range(16), *reversed(range(16)))
    costs = [1.0] * 64
    cut = partition(costs, 32, first=0.25, last=1.75, ranks=ranks)
    loads = by_rank(stage_loads(costs, cut, 0.25, 1.75), ranks)
    assert sum(cut) == 64 and sorted(loads) == [4] * 14 + [5] * 2  # 66 over 16 ranks in whole layers
    assert cut[0] + cut[-1] + 2 == loads[0]


def test_too_many_vectors_of_other_placements_are_refused() -> None:
    with pytest.raises(ValueError, match="leave `ranks` out"):
        partition([1.0 + 0.01 * n for n in range(64)], 32, ranks=(*range(16), *range(16)))


def test_equal_layers_are_cut_as_the_dynamic_program_cuts_them() -> None:
    """The short way for layers of one cost, against the program that it stands for, ties included."""
    draw = Random(5)
    for _ in range(400):
        layers = draw.randint(1, 24)
        stages = draw.randint(1, min(layers, 8))
        cost = draw.choice([1.0, 2.0, 3.0])
        first, last = (draw.choice([0.0, 0.5, 1.0, 2.0, 5.0, 7.25]) for _ in range(2))
        # A limit that nothing reaches keeps the program from taking the short way.
        slow = partition([cost] * layers, stages, first, last, memory=[1] * layers, limits=[layers] * stages)
        assert partition([cost] * layers, stages, first, last) == slow, (layers, stages, cost, first, last)
