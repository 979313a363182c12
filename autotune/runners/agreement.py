"""How well two orders of the same things agree, and what choosing by one of them costs."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from itertools import combinations
from math import nan, sqrt


def kendall_tau(a: Sequence[float], b: Sequence[float]) -> float:
    """Kendall's tau-b of two equally long lists: 1 the same order, -1 the opposite, about 0 unrelated.

    (agreeing - disagreeing pairs) / sqrt(pairs that differ in a x pairs that differ in b): a tie in one list alone
    counts against it (Kendall, "The treatment of ties in ranking problems", Biometrika 33, 1945). NaN where either
    list is all ties. Raises ValueError for lists of different lengths.
    """
    both, in_a, in_b = 0, 0, 0
    for (x, u), (y, v) in combinations(zip(a, b, strict=True), 2):
        first, second = (x > y) - (x < y), (u > v) - (u < v)
        both += first * second
        in_a += first != 0
        in_b += second != 0
    return both / sqrt(in_a * in_b) if in_a and in_b else nan


def ranks(values: Sequence[float]) -> list[float]:
    """The rank of each value from 1, ties at the mean of theirs."""
    order = sorted(range(len(values)), key=values.__getitem__)
    found = [0.0] * len(values)
    first = 0
    while first < len(order):
        last = first
        while last + 1 < len(order) and values[order[last + 1]] == values[order[first]]:
            last += 1
        for place in range(first, last + 1):
            found[order[place]] = 1 + (first + last) / 2
        first = last + 1
    return found


def spearman_rho(a: Sequence[float], b: Sequence[float]) -> float:
    """Spearman's rank correlation of two equally long lists: Pearson's, of their ranks (Spearman 1904). NaN where
    either list is all ties."""
    if len(a) != len(b):
        raise ValueError(f"lists of {len(a)} and {len(b)} values")
    x, y = ranks(a), ranks(b)
    middle = (len(a) + 1) / 2
    both = sum((u - middle) * (v - middle) for u, v in zip(x, y, strict=True))
    sizes = sum((u - middle) ** 2 for u in x) * sum((v - middle) ** 2 for v in y)
    return both / sqrt(sizes) if sizes else nan


def regrets(rows: Iterable[tuple[str, float, float]]) -> list[float]:
    """What choosing by prediction costs: of each case with two alternatives or more, the measured value of the one
    predicted least over the least measured, minus 1. `rows` are (case, predicted, measured); a case "" is none."""
    cases: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for case, predicted, measured in rows:
        if case:
            cases[case].append((predicted, measured))
    return [
        min(pairs, key=lambda pair: pair[0])[1] / min(measured for _, measured in pairs) - 1
        for pairs in cases.values()
        if len(pairs) > 1
    ]
