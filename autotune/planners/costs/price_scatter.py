"""Interpolation between scattered samples in a space of log sizes: what fraction of the roofline a shape reaches.

A local straight-line fit, weighted by inverse distance, over the nearest samples (Cleveland & Devlin 1988, local
regression), held inside the range of those samples; with few or degenerate samples it becomes their weighted mean
(Shepard 1968). A point outside the box that the samples span is moved to the box's edge first: no trend continues.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from math import exp, log

Point = tuple[float, ...]

NEIGHBOURS = 8
POWER = 4  # of the distance, in the weights: in log sizes the near ones tell most
RIDGE = 0.05  # pulls the slopes to 0 where the neighbours do not fix them; of the summed weights


class Scatter:
    """Positive values at points of log sizes."""

    def __init__(self, points: Sequence[Point], values: Sequence[float]) -> None:
        """`points` all of one length; values at equal points are averaged (geometric mean). At least one."""
        merged: dict[Point, list[float]] = {}
        for point, value in zip(points, values, strict=True):
            merged.setdefault(point, []).append(log(value))
        # Sorted by the axis with the most different values, so that a search can stop as soon as that axis alone is
        # farther away than the neighbours already found.
        axes = range(len(points[0]))
        self._axis = max(axes, key=lambda axis: len({point[axis] for point in merged}))
        rows = sorted((point[self._axis], point, sum(ys) / len(ys)) for point, ys in merged.items())
        self._keys = [row[0] for row in rows]
        self._points = [row[1] for row in rows]
        self._logs = [row[2] for row in rows]
        self.low = tuple(min(point[axis] for point in merged) for axis in axes)
        self.high = tuple(max(point[axis] for point in merged) for axis in axes)

    def at(self, point: Point) -> tuple[float, bool]:
        """(value, whether `point` is inside the box that the samples span)."""
        inside = tuple(min(max(x, low), high) for x, low, high in zip(point, self.low, self.high, strict=True))
        near = self._nearest(inside)
        if near[0][0] < 1e-18:
            return exp(self._logs[near[0][1]]), inside == point
        return exp(self._fit(inside, near)), inside == point

    def _nearest(self, point: Point) -> list[tuple[float, int]]:
        """The nearest samples as (squared distance, index), nearest first."""
        keys, points, at = self._keys, self._points, point[self._axis]
        best: list[tuple[float, int]] = []
        worst = float("inf")
        right = bisect_left(keys, at)
        left = right - 1
        while left >= 0 or right < len(keys):
            if left < 0 or (right < len(keys) and keys[right] - at < at - keys[left]):
                i, right = right, right + 1
            else:
                i, left = left, left - 1
            gap = keys[i] - at
            if gap * gap > worst:
                break
            distance = 0.0
            for a, b in zip(points[i], point, strict=True):
                distance += (a - b) * (a - b)
            if distance < worst:
                best.append((distance, i))
                if len(best) > NEIGHBOURS:
                    best.remove(max(best))
                if len(best) == NEIGHBOURS:
                    worst = max(best)[0]
        return sorted(best)

    def _fit(self, point: Point, near: list[tuple[float, int]]) -> float:
        """The fitted log value at `point`: the intercept of the weighted line through the neighbours."""
        weights = [(near[0][0] / distance) ** (POWER / 2) for distance, _ in near]
        values = [self._logs[i] for _, i in near]
        size = len(point) + 1
        ridge = RIDGE * sum(weights)
        matrix = [[0.0] * (size + 1) for _ in range(size)]
        for (_, i), weight, value in zip(near, weights, values, strict=True):
            row = [1.0, *(a - b for a, b in zip(self._points[i], point, strict=True)), value]
            for r in range(size):
                scaled = weight * row[r]
                if scaled:
                    target = matrix[r]
                    for c in range(size + 1):
                        target[c] += scaled * row[c]
        for r in range(1, size):
            matrix[r][r] += ridge
        return min(max(_intercept(matrix), min(values)), max(values))


def _intercept(matrix: list[list[float]]) -> float:
    """The first unknown of the positive definite system `matrix` (augmented): eliminated from the last one up."""
    for pivot in range(len(matrix) - 1, 0, -1):
        below = matrix[pivot]
        for r in range(pivot):
            factor = matrix[r][pivot] / below[pivot]
            if factor:
                row = matrix[r]
                for c in range(pivot):
                    row[c] -= factor * below[c]
                row[-1] -= factor * below[-1]
    return matrix[0][-1] / matrix[0][0]
