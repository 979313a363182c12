"""Several tensors as one: where each is in a flat tensor of all of them, and views of it there."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import NamedTuple, TypeVar

from torch import Tensor

K = TypeVar("K")
Shape = tuple[int, ...]


class Place(NamedTuple):
    """Where a tensor is in a flat one, and its shape."""

    range: slice
    shape: Shape


def elements(shapes: Mapping[K, Shape]) -> int:
    """Of tensors of these shapes together."""
    return sum(map(prod, shapes.values()))


def placed(shapes: Mapping[K, Shape], begin: int = 0) -> dict[K, Place]:
    """Tensors of these shapes one after another, from `begin` on."""
    found = {}
    for key, shape in shapes.items():
        end = begin + prod(shape)
        found[key] = Place(slice(begin, end), shape)
        begin = end
    return found


def views(flat: Tensor, places: Mapping[K, Place]) -> dict[K, Tensor]:
    return {key: flat[place.range].view(place.shape) for key, place in places.items()}
