"""Measured times by size, for work whose time grows with one number: bytes, parameters or a count.

Between samples the time is a straight line in the size: exact for a start-up time plus a rate, which such work is made
of (a line in log size and log time puts the elbow between the two 90 % too high where samples are 64 times apart).
Noise can make a larger size look faster; those samples are pooled, so that more is never priced as less.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable


class SizeTable:
    """Seconds by size, never decreasing."""

    def __init__(self, pairs: Iterable[tuple[float, float]]) -> None:
        """`pairs` of (size, seconds), both above 0, in any order; equal sizes are averaged. At least one."""
        found: dict[float, list[float]] = {}
        for size, seconds in pairs:
            found.setdefault(size, []).append(seconds)
        self.sizes = sorted(found)
        self.seconds = _isotonic([sum(found[size]) / len(found[size]) for size in self.sizes])

    def at(self, size: float, floor: float) -> tuple[float, str]:
        """(seconds, grade) at `size`. Outside what was measured the rate of the nearest sample is kept: a larger size
        takes as many times longer, a smaller one as many times shorter but not below `floor` (or the least sample)."""
        i = bisect_left(self.sizes, size)
        if i == len(self.sizes):
            return self.seconds[-1] * size / self.sizes[-1], "extrapolated"
        if self.sizes[i] == size:
            return self.seconds[i], "measured"
        if i == 0:
            first = self.seconds[0]
            return max(first * size / self.sizes[0], min(first, floor)), "extrapolated"
        part = (size - self.sizes[i - 1]) / (self.sizes[i] - self.sizes[i - 1])
        return self.seconds[i - 1] + part * (self.seconds[i] - self.seconds[i - 1]), "interpolated"


def _isotonic(values: list[float]) -> list[float]:
    """The closest never-decreasing values in least squares (pool adjacent violators; Barlow et al. 1972, 1.2)."""
    pools: list[tuple[float, int]] = []
    for value in values:
        total, count = value, 1
        while pools and pools[-1][0] / pools[-1][1] > total / count:
            total, count = total + pools[-1][0], count + pools[-1][1]
            pools.pop()
        pools.append((total, count))
    return [total / count for total, count in pools for _ in range(count)]
