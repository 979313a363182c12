"""Solved: the order that the solver finds for the pipe's own times under its memory limit.

The problem is Zero Bubble's (2401.10241, appendix G); `planners.solvers` says how it is solved and proved. One chunk
goes down the ranks, two go down and up again.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from autotune.planners.schedules.schedule import Order, Pipe, Place, Schedule, Step, linear, wave
from autotune.planners.solvers.shop import KINDS, Shop, Words, least_peak, pipeline
from autotune.planners.solvers.solve import Solution, solve


@dataclass(frozen=True)
class Solved:
    """An order with its objective in the pipe's time, what no order can be better than, and the gap between them."""

    order: Order
    value: float
    bound: float
    gap: float
    optimal: bool
    nodes: int


def place(pipe: Pipe) -> Place:
    return wave(pipe) if pipe.chunks > 1 else linear(pipe)


def shop(pipe: Pipe, where: Place, longest_rank: bool = False, kept: float = 1.0) -> Shop:
    """The pipe as the solvers see it. ValueError for a limit that no order meets, or a stage on several ranks."""
    if any(len(ranks) != 1 for ranks in where):
        raise ValueError(f"each stage on one rank (found {where})")
    of = pipe.times.of
    forward, back, weight = (tuple(of(kind, s) for s in range(pipe.stages)) for kind in KINDS)
    ranks = tuple(ranks[0] for ranks in where)
    return pipeline(ranks, forward, back, weight, pipe.times.hop, pipe.items, pipe.limit, longest_rank, kept)


def words(order: Order, stages: int) -> Words:
    """An order as the solvers see it; BW is B and W at once."""
    letters = {"F": (0,), "B": (1,), "W": (2,), "BW": (1, 2)}
    return tuple(tuple(kind * stages + step.stage for step in steps for kind in letters[step.op]) for steps in order)


@lru_cache(maxsize=256)
def _solution(pipe: Pipe, where: Place, longest_rank: bool, kept: float, seeds: tuple[Words, ...]) -> Solution:
    return solve(shop(pipe, where, longest_rank, kept), seeds)


def solved(
    pipe: Pipe, where: Place, longest_rank: bool = False, kept: float = 1.0, seeds: tuple[Words, ...] = ()
) -> Solved:
    """Solves for the makespan, or for the longest rank; not worse than any of the seeds that keep the limit.

    `kept`: the part of a chunk activation that W still needs when B is over.
    """
    found = _solution(pipe, where, longest_rank, kept, seeds)
    order: Order = []
    for word in found.words:
        done: dict[int, int] = {}
        steps = []
        for letter in word:
            kind, stage = divmod(letter, pipe.stages)
            item = done[letter] = done.get(letter, -1) + 1
            steps.append(Step(KINDS[kind], stage, item))
        order.append(steps)
    return Solved(order, found.value, found.bound, found.gap, found.optimal, found.nodes)


def refuse(pipe: Pipe) -> str | None:
    if pipe.chunks not in (1, 2):
        return f"one or two chunks a rank (found {pipe.chunks}; nearest {min(max(pipe.chunks, 1), 2)})"
    least = least_peak([ranks[0] for ranks in place(pipe)])
    if 0 < pipe.limit < least:
        return f"a limit of at least {least} chunk activations (found {pipe.limit}; nearest {least})"
    return None


def limits(pipe: Pipe) -> tuple[int, ...]:
    """What 1F1B holds, half of it, and no limit."""
    whole = pipe.ranks * pipe.chunks
    return tuple(dict.fromkeys((whole, max(pipe.chunks, whole // 2), 0)))


SCHEDULE = Schedule(
    lambda pipe: solved(pipe, place(pipe), kept=pipe.kept).order,
    place=place,
    refuse=refuse,
    splits=True,
    chunks=(1, 2),
    limits=limits,
    timed=True,
)
