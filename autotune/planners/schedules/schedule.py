"""What a pipeline schedule is: an order of forwards and backwards for each rank, and where the stages are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple


class Step(NamedTuple):
    """One compute instruction of the order: F forward, B input gradient, W weight gradient, BW both gradients."""

    op: str
    stage: int
    item: int


Order = list[list[Step]]


def linear(ranks: int, chunks: int) -> tuple[int, ...]:
    """Stage s on rank s mod p: Megatron's placement, with one chunk or many."""
    return tuple(stage % ranks for stage in range(ranks * chunks))


def always(ranks: int, items: int, chunks: int) -> str | None:
    """No constraint beyond one chunk."""
    return None if chunks == 1 else f"one chunk a rank (found {chunks}; nearest 1)"


@dataclass(frozen=True)
class Schedule:
    """An entry of the table. Functions take (ranks, micro-batches, chunks).

    `refuse` gives the broken constraint with its nearest feasible value, or None. `makespan` and `peak` are closed
    forms in units of one chunk's forward with backward twice as long: the time of the whole, and for each rank the
    most chunk activations that are alive at once.
    """

    order: Callable[[int, int, int], Order]
    place: Callable[[int, int], tuple[int, ...]] = linear
    refuse: Callable[[int, int, int], str | None] = always
    makespan: Callable[[int, int, int], float] | None = None
    peak: Callable[[int, int, int], list[int]] | None = None
