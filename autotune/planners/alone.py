"""A rank alone: lower bounds on a step's time and memory from one rank's own list, for a share of the whole's effort.

The list is completed by the passes that look at one rank at a time, and no message is waited for: whatever meets takes
its own time alone. Of the other ranks only this is kept: no forward of a stage starts before the stages before it have
done one, and no backward before all of them have and the stages after it have gone back; after a backward the stages
before it have theirs to do. Every step of the whole program is at least as late, so the bound is admissible. It sees
what sums over a rank cannot: copies and vocabulary passes that compute waits for. Memory is that of the list, where
what another rank sends takes its bytes from its first reader on: its receive is posted before that.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from autotune.planners.bounds import Bounder
from autotune.planners.costs.step import StepCosts
from autotune.planners.family import Family
from autotune.planners.lower.train import kind_of, kinds_of, lasts, own_list
from autotune.planners.lower.traits import traits
from autotune.planners.predict import TooLarge, TooSlow
from autotune.planners.resolve import resolve, uncollected
from autotune.spec.plan import Plan
from autotune.spec.program import DEVICE, Buffer, Program

BACKWARDS = ("B", "BW")  # what hands a gradient on


@dataclass(frozen=True)
class Around:
    """Seconds that a rank owes to the others, by stage: before its forwards and backwards, and after the latter."""

    forward: Sequence[float]
    backward: Sequence[float]
    after: Sequence[float]


def around(family: Family) -> Around:
    """What the stages before and after each stage take at least."""
    fill, drain = family.ends
    whole, backward = fill[-1], [0.0] * family.plan.stages
    for stage in reversed(range(family.plan.stages)):
        backward[stage] = whole + family.ways[stage]
        whole = backward[stage] + family.times[stage].drain
    return Around(fill[:-1], backward, drain[:-1])


def alone(bounder: Bounder, plan: Plan, allowed: int, enough: float = float("inf")) -> TooLarge | TooSlow:
    """The bytes that some rank needs beyond `allowed`, or seconds that no execution of the step can undercut: those of
    the first rank that shows `enough`, or the most that any of them does."""
    predictor = bounder.predictor
    key = traits(plan, predictor.model, predictor.workload)
    others, costs = around(bounder.family(plan)), bounder.costs(plan)
    kinds = kinds_of(plan, predictor.model, predictor.workload)
    most = bounder.time(plan)
    for rank in _telling(plan.pipeline):
        with uncollected():
            mine = own_list(key, rank)
            least = _peak(mine, rank, costs, kinds)
            if least > allowed:
                return TooLarge(plan, least)
            if most < enough:
                most = max(most, _makespan(mine, rank, costs, others, predictor.profile.inline))
    return TooSlow(plan, most)


def _telling(ranks: int) -> Iterator[int]:
    """The ranks that are looked at: those that wait most at the start and at the end, and one between them."""
    yield from dict.fromkeys((0, ranks - 1, ranks // 2))


def _peak(program: Program, rank: int, costs: StepCosts, kinds: Mapping[str, Buffer]) -> int:
    """The most device bytes at one of a rank's own instructions."""
    (listing,), (given,) = program.ranks, program.live
    size: dict[str, int] = {}
    transient: dict[tuple[str, int, int], int] = {}
    live: set[str] = set()
    freed = {name for instruction in listing for name in instruction.frees}
    now = most = 0

    def bytes_of(name: str) -> int:
        if name not in size:
            buffer = kinds[kind_of(name)]
            size[name] = buffer.size if buffer.tier == DEVICE else 0
        return size[name]

    for name in given:
        if lasts(name):
            live.add(name)
            now += bytes_of(name)
    for instruction in listing:
        op, stage, _, part, _, reads, writes, frees = instruction[:8]
        for name in (*reads, *writes):
            if name not in live:
                live.add(name)
                now += bytes_of(name)
        like = (op, stage, part)
        if like not in transient:
            transient[like] = costs.transient(rank, instruction)
        if now + transient[like] > most:
            most = now + transient[like]
        for name in frees:
            live.discard(name)
            now -= bytes_of(name)
        for name in writes:
            if name not in freed and not lasts(name):  # it is sent, and gone with that
                live.discard(name)
                now -= bytes_of(name)
    return most


def _makespan(program: Program, rank: int, costs: StepCosts, others: Around, inline: bool) -> float:
    """The longest path through a rank's own list. Nothing in it meets, so an event is a position."""
    (listing,), most = program.ranks, 0.0
    waits = resolve(program, inline).waits
    seconds: dict[tuple[str, int, int], float] = {}
    end: list[float] = []
    for wait, instruction in zip(waits, listing, strict=True):
        op, stage, _, part = instruction[:4]
        at = 0.0
        for earlier in wait:
            if end[earlier] > at:
                at = end[earlier]
        if op == "F":
            at = max(at, others.forward[stage])
        elif op in BACKWARDS:
            at = max(at, others.backward[stage])
        if (op, stage, part) not in seconds:
            seconds[op, stage, part] = costs.seconds(rank, instruction)
        end.append(at + seconds[op, stage, part])
        if op in BACKWARDS:
            most = max(most, end[-1] + others.after[stage])
    return max(most, max(end, default=0.0))
