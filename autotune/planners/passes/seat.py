"""Where a list stands: its rank, and who has the pipeline's ends. All that a pass over one list knows of the others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from autotune.planners.lower.traits import Traits
from autotune.planners.schedules import Step
from autotune.spec.program import Instruction

Listing = Sequence[Instruction]  # of one rank


class Ways(NamedTuple):
    """The way of every micro-batch: the ranks that run its first and its last stage (of two copies of a stage, one)."""

    stages: int
    ranks: int
    first: Mapping[int, int]
    final: Mapping[int, int]
    shares: bool = False  # see Traits


class Seat(NamedTuple):
    """A rank and the ways through all of them."""

    rank: int
    ways: Ways


def ways_of(order: Sequence[Sequence[Step | Instruction]], traits: Traits) -> Ways:
    """The ways in an order, or in the program that it has become."""
    pipe, place = traits.pipe, traits.place
    at: dict[int, dict[int, int]] = {}
    for stage in {0, pipe.stages - 1}:
        at[stage] = dict.fromkeys(range(pipe.items), place[stage][0])
        for rank in place[stage][1:]:  # of two directions, each has its own micro-batches
            at[stage] |= {item: rank for op, where, item, *_ in order[rank] if where == stage and op == "F"}
    return Ways(pipe.stages, pipe.ranks, at[0], at[pipe.stages - 1], traits.shares)
