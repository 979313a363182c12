"""Vectors of objectives, the less the better: which dominate which, and the volume that a set of them dominates.

Sets in the plane and in space are small enough for exact sweeps: no estimate is made anywhere.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections.abc import Iterable, Sequence

Vector = tuple[float, ...]


def covers(a: Sequence[float], b: Sequence[float], tolerance: float = 0.0) -> bool:
    """Whether `a` is in no objective more than a share of `tolerance` worse than `b`. Values are not negative."""
    return all(x <= (1 + tolerance) * y for x, y in zip(a, b, strict=True))


class Archive:
    """The vectors that no other covers, of all that were added, in the order of their first objective."""

    def __init__(self, vectors: Iterable[Vector] = ()) -> None:
        self.vectors: list[Vector] = []
        for vector in vectors:
            self.add(vector)

    def add(self, vector: Vector) -> bool:
        """Takes in a vector unless another covers it; whether it was taken. What it covers goes."""
        if self.covered(vector):
            return False
        first = bisect_left(self.vectors, vector)
        self.vectors[first:] = [other for other in self.vectors[first:] if not covers(vector, other)]
        insort(self.vectors, vector)
        return True

    def covered(self, vector: Sequence[float], tolerance: float = 0.0) -> bool:
        """Whether some vector of the archive covers this one."""
        most = [(1 + tolerance) * value for value in vector]
        near = bisect_right(self.vectors, (most[0], *(float("inf") for _ in most[1:])))
        # From the right: in the plane the first of these has the least of the second objective.
        found = (all(x <= y for x, y in zip(self.vectors[n], most, strict=True)) for n in range(near - 1, -1, -1))
        return next(found, False) if len(most) <= 2 else any(found)


def thinned(vectors: Sequence[Vector], tolerance: float) -> list[Vector]:
    """Of mutually undominated vectors some such that every other is covered by one of these within the tolerance; what
    is best in some objective stays."""
    ends = [min(vectors, key=lambda v: (v[axis], *v)) for axis in range(len(vectors[0]))] if vectors else []
    kept = list(dict.fromkeys(ends))
    for vector in sorted(vectors):
        if not any(covers(other, vector, tolerance) for other in kept):
            kept.append(vector)
    return sorted(kept)


def volume(vectors: Iterable[Vector], reference: Vector) -> float:
    """What the vectors dominate of the box below `reference`: its length, area or volume (one to three objectives)."""
    inside = [v for v in Archive(vectors).vectors if all(x < r for x, r in zip(v, reference, strict=True))]
    if len(reference) == 1:
        return reference[0] - inside[0][0] if inside else 0.0
    if len(reference) == 2:
        return _area(inside, (reference[0], reference[1]))
    if len(reference) != 3:
        raise ValueError(f"a volume of {len(reference)} objectives; expected 1 to 3")
    whole, layer = 0.0, Archive()
    ordered = sorted(inside, key=lambda v: v[2])
    for number, (x, y, z) in enumerate(ordered):
        layer.add((x, y))
        above = ordered[number + 1][2] if number + 1 < len(ordered) else reference[2]
        if above > z:
            whole += (above - z) * _area(layer.vectors, (reference[0], reference[1]))
    return whole


def _area(vectors: Sequence[Vector], reference: tuple[float, float]) -> float:
    """Of undominated vectors in the plane, by their first objective."""
    found, top = 0.0, reference[1]
    for x, y in vectors:
        found += (reference[0] - x) * (top - y)
        top = y
    return found


def missing(front: Sequence[Vector], floors: Iterable[Vector]) -> float:
    """Of the volume that a front and lower bounds on what is left may dominate, the share that the front does not.

    The box ends a tenth above the worst of the front in each objective, and every objective is scaled to it.
    """
    if not front:
        return 1.0
    corner = [1.1 * max(column) or 1.0 for column in zip(*front, strict=True)]
    ones = (1.0,) * len(corner)

    def scaled(vector: Vector) -> Vector:
        return tuple(value / most for value, most in zip(vector, corner, strict=True))

    mine = [scaled(vector) for vector in front]
    may = volume([*mine, *map(scaled, floors)], ones)
    return max(0.0, 1 - volume(mine, ones) / may)
