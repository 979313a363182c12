"""How well two orders of the same things agree."""

from __future__ import annotations

from collections.abc import Sequence
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
