"""What a pipeline schedule is: an order of forwards and backwards for each rank, and where the stages are.

A schedule is a pure function of a `Pipe`. It gives compute instructions alone: passes add messages, gradient sums,
vocabulary work, offloading and the update, and the program decides by itself what is kept, sent and freed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import NamedTuple

from autotune.planners.schedules.times import UNIT, Times


class Step(NamedTuple):
    """One compute instruction of the order: F forward, B input gradient, W weight gradient, BW both gradients.

    Passes over the order put in others; a stage beyond the last stands for what every rank has a part of.
    """

    op: str
    stage: int
    item: int


Order = list[list[Step]]  # [rank] -> its steps
Place = tuple[tuple[int, ...], ...]  # [stage] -> the ranks that hold it: one, or one a direction


@dataclass(frozen=True)
class Pipe:
    """What an order depends on: p ranks, m micro-batches, v chunks (stages / ranks; replicas do not count).

    `group`, `limit` and `times` are axes of the plan that few schedules look at; 0 leaves the choice to the schedule.
    """

    ranks: int
    items: int
    chunks: int = 1
    group: int = 0  # micro-batches that a scheduling unit takes together (GIS-H, ZeroPP)
    limit: int = 0  # chunk activations that a rank may hold (orders searched under a memory limit)
    times: Times = field(default=UNIT)  # relative durations, for orders made for a machine
    order: str = ""  # an order written out (schedules.text)

    @property
    def stages(self) -> int:
        return self.ranks * self.chunks

    @property
    def kept(self) -> float:
        """The share of a chunk activation that is alive from B to W: what a limit counts for it."""
        return self.times.kept


def linear(pipe: Pipe) -> Place:
    """Stage s on rank s mod p: Megatron's placement, with one chunk or many."""
    return _linear(pipe.ranks, pipe.stages)


@lru_cache(maxsize=256)
def _linear(ranks: int, stages: int) -> Place:
    return tuple([(stage % ranks,) for stage in range(stages)])


def wave(pipe: Pipe) -> Place:
    """Stages go down the ranks and up again, chunk after chunk: a V with two chunks, Hanayo's waves with more."""
    p = pipe.ranks
    return tuple((s % p if s // p % 2 == 0 else p - 1 - s % p,) for s in range(pipe.stages))


def held(place: Place, rank: int) -> tuple[int, ...]:
    """The stages that a rank holds, in order."""
    return _held(place).get(rank, ())


@lru_cache(maxsize=1024)
def _held(place: Place) -> Mapping[int, tuple[int, ...]]:
    found: dict[int, list[int]] = {}
    for stage, ranks in enumerate(place):
        for rank in ranks:
            found.setdefault(rank, []).append(stage)
    return {rank: tuple(stages) for rank, stages in found.items()}


def single_chunk(pipe: Pipe) -> str | None:
    """No constraint beyond one chunk."""
    return None if pipe.chunks == 1 else f"one chunk a rank (found {pipe.chunks}; nearest 1)"


@dataclass(frozen=True)
class Schedule:
    """An entry of the table.

    `refuse` gives the broken constraint with its nearest feasible value ("micro-batches a multiple of 4 (found 6;
    nearest 8)"), or None. `makespan` and `peak` are closed forms at unit cost (F = B = W = 1 of one chunk, BW = 2, no
    hops): the time of the whole, and for each rank the most chunk activations that are alive at once, each from its F
    to its W or BW. A form that holds for a part of the legal pipes alone gives None elsewhere.
    """

    order: Callable[[Pipe], Order]
    place: Callable[[Pipe], Place] = linear
    refuse: Callable[[Pipe], str | None] = single_chunk
    makespan: Callable[[Pipe], float | None] | None = None
    peak: Callable[[Pipe], list[int] | None] | None = None
    splits: bool = False  # whether the order has B and W in the place of BW
    row: Callable[[Pipe], int] | None = None  # how many W of a stage stand side by side, where always so many
    chunks: tuple[int, ...] = (1,)  # what the search tries
    groups: Callable[[Pipe], tuple[int, ...]] = lambda pipe: (0,)  # the `group` values that the search tries
    limits: Callable[[Pipe], tuple[int, ...]] = lambda pipe: (0,)  # the `limit` values that the search tries
    searched: bool = True  # whether a search tries it unasked
    timed: bool = False  # whether the order looks at `pipe.times`: the search then fills them in from the profile
