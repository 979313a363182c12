"""What a grid of shapes depends on, and the order that makes a grid useful wherever its time runs out."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import product


@dataclass(frozen=True)
class Setting:
    """device: "cpu" or "cuda"; quick: a coarse grid; world: how many processes measure at the same time."""

    device: str = "cpu"
    quick: bool = True
    world: int = 1


def coarse_first(count: int) -> list[int]:
    """0..count-1, the ends first, then halves, quarters and so on: any prefix covers the whole range."""
    order: list[int] = []
    step = max(1, count - 1)
    while len(order) < count:
        order += [i for i in range(0, count, step) if i not in order]
        order += [count - 1] if count - 1 not in order else []
        step = max(1, step // 2)
    return order


def spread_out(*axes: Iterable[int]) -> list[tuple[int, ...]]:
    """The product of `axes`, ordered so that any prefix covers each axis as evenly as it can: corners, then halves."""
    values = [list(axis) for axis in axes]
    levels = [
        {axis[index]: max(0, place.bit_length() - 1) for place, index in enumerate(coarse_first(len(axis)))}
        for axis in values
    ]

    def coarseness(point: tuple[int, ...]) -> tuple[int, int]:
        own = [level[v] for level, v in zip(levels, point, strict=True)]
        return max(own), sum(own)

    return sorted(product(*values), key=lambda point: (coarseness(point), point))
