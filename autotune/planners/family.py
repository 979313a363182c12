"""Families: plans that differ only in where their states and activations lie share most of what bounds them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import NamedTuple

from autotune.planners.costs.step import StepCosts
from autotune.planners.lower.stage import Sizes, cut_of, first_alike
from autotune.planners.lower.traits import micro_batches, pipe_of, stage_sizes
from autotune.planners.predict import Predictor
from autotune.planners.schedules import SCHEDULES, Place, held, schedule_of
from autotune.planners.schedules.vocabulary import EMBED, EMBED_W, VOCABULARIES
from autotune.spec.plan import Plan
from autotune.spec.program import Instruction
from autotune.spec.workload import Workload

Need = tuple[tuple[int, ...], int]  # the stages of a rank, and bytes of its activations


class StageTime(NamedTuple):
    """Seconds of a stage: forward, least backward, and what a gradient needs to pass: B alone where it is split."""

    forward: float
    backward: float
    drain: float


class Stages(NamedTuple):
    """What the pipeline's stages take, of any number of micro-batches in any order."""

    times: tuple[StageTime, ...]
    hop: float  # seconds of a message between two ranks
    vocabulary: tuple[float, float, float]  # see `Family.vocabulary`, of one micro-batch


def priced_stages(costs: StepCosts) -> Stages:
    """The stages of a plan by its costs; equal stages are asked for once."""
    plan, splits = costs.plan, schedule_of(costs.plan.schedule, costs.plan.split).splits
    first = first_alike(costs.model, cut_of(plan, costs.model))
    seconds = {stage: _stage_time(costs, stage, splits) for stage in dict.fromkeys(first)}
    hop = costs.cost(Instruction("SEND", 0)).seconds if plan.stages > 1 else 0.0
    return Stages(tuple([seconds[stage] for stage in first]), hop, _vocabulary(costs))


def _stage_time(costs: StepCosts, stage: int, splits: bool) -> StageTime:
    """W's that are joined may take less than one by one: how many are is known of some schedules alone."""
    whole, forward = costs.stage(stage, "BW").seconds, costs.stage(stage, "F").seconds
    if not splits:
        return StageTime(forward, whole, whole)
    first, row = costs.stage(stage, "B").seconds, row_of(costs.plan, costs.workload)
    second = costs.stage(stage, "W", row).seconds / row if row else 0.0
    return StageTime(forward, min(whole, first + second), min(whole, first))


def row_of(plan: Plan, workload: Workload) -> int:
    """How many W's of a stage are always one; 0: nobody knows."""
    if plan.weight_gradients == "apart":
        return 1
    row = schedule_of(plan.schedule, plan.split).row
    # Passes over the vocabulary may come between them.
    return row(pipe_of(plan, micro_batches(plan, workload))) if row and plan.vocabulary == "ends" else 0


def _vocabulary(costs: StepCosts) -> tuple[float, float, float]:
    plan = costs.plan
    if plan.vocabulary == "ends":
        return 0.0, 0.0, 0.0
    entry = VOCABULARIES[plan.vocabulary]
    waited, late = entry.passes[: entry.barriers], entry.passes[entry.barriers :]
    groups = ((EMBED,), waited, (*late, EMBED_W))
    seconds = [sum(costs.cost(Instruction(op, plan.stages)).seconds for op in ops) for ops in groups]
    return seconds[0], seconds[1], seconds[2]


@dataclass
class Family:
    """What the plans of a family share; `plan` is any of them."""

    plan: Plan
    predictor: Predictor
    stages: Stages

    @property
    def times(self) -> tuple[StageTime, ...]:
        return self.stages.times

    @cached_property
    def items(self) -> int:
        return micro_batches(self.plan, self.predictor.workload)

    @cached_property
    def place(self) -> Place:
        return SCHEDULES[self.plan.schedule].place(pipe_of(self.plan, self.items))

    @cached_property
    def own(self) -> list[tuple[int, ...]]:
        """The stages of every rank."""
        return [held(self.place, rank) for rank in range(self.plan.pipeline)]

    @cached_property
    def sizes(self) -> tuple[Sizes, ...]:
        return stage_sizes(self.plan, self.predictor.model, self.predictor.workload)  # nothing need be priced for this

    @cached_property
    def peaks(self) -> list[int] | None:
        """Chunk activations alive at once on every rank, where the schedule's closed form says so."""
        schedule = schedule_of(self.plan.schedule, self.plan.split)
        return schedule.peak(pipe_of(self.plan, self.items)) if schedule.peak else None

    @cached_property
    def ways(self) -> list[float]:
        """Seconds of a message between each stage and the next, where no rank holds both."""
        place, hop = self.place, self.stages.hop
        return [0.0 if set(a) & set(b) else hop for a, b in pairwise(place)] + [0.0]

    @cached_property
    def ends(self) -> tuple[list[float], list[float]]:
        """Seconds before a stage's first micro-batch comes, and after its last gradient left; the last entries are of
        the whole way."""
        fill, drain = [0.0], [0.0]
        for time, way in zip(self.times, self.ways, strict=True):
            fill.append(fill[-1] + time.forward + way)
            drain.append(drain[-1] + time.drain + way)
        return fill, drain

    @cached_property
    def ranks(self) -> list[tuple[float, float, float]]:
        """Of every rank the seconds before its first forward, of its compute, and of what gradients pass through."""
        fill, found = self.ends[0], []
        for own in self.own:
            # A stage that two directions hold does half of the micro-batches on either rank.
            shares = [(self.items // len(self.place[s]), self.times[s]) for s in own]
            busy = sum(n * (time.forward + time.backward) for n, time in shares)
            passed = sum(n * (time.forward + time.drain) for n, time in shares)
            found.append((min(fill[s] for s in own), busy, passed))
        return found

    @property
    def vocabulary(self) -> tuple[float, float, float]:
        """Seconds of a rank's passes over its shard of the vocabulary: those that may run before its first forward,
        those that lie between that and its last backward, and those that may come later."""
        before, beside, after = self.stages.vocabulary
        return self.items * before, self.items * beside, self.items * after

    @cached_property
    def needs(self) -> list[Need]:
        """Bytes of every rank's activations at least, in any order: as many as the closed form says."""
        return self._needs(self.peaks or [1] * self.plan.pipeline)

    @cached_property
    def single(self) -> list[Need]:
        """As `needs`, where all activations that wait may be elsewhere."""
        return self._needs([1] * self.plan.pipeline) if self.peaks else self.needs

    def _needs(self, alive: Sequence[int]) -> list[Need]:
        """Bytes of activations, given how many of a chunk are alive on every rank: of ranks with stages of the same
        sizes the most."""
        splits = schedule_of(self.plan.schedule, self.plan.split).splits
        parts = {size: _least(size, splits) for size in dict.fromkeys(self.sizes)}
        stages, numbers = [parts[size] for size in self.sizes], {size: n for n, size in enumerate(parts)}
        alike = [numbers[size] for size in self.sizes]
        found: dict[tuple[int, ...], tuple[tuple[int, ...], int]] = {}
        for own, count in zip(self.own, alive, strict=True):
            key = tuple(sorted([alike[s] for s in own]))
            if key not in found or found[key][1] < count:
                found[key] = own, count
        return [(own, _held([stages[s] for s in own], count)) for own, count in found.values()]


class _Least(NamedTuple):
    """Bytes of a stage that no order can do without: of one micro-batch waiting and at work."""

    activation: int
    inputs: int
    at_once: int


def _least(size: Sizes, splits: bool) -> _Least:
    """`at_once`: while a forward or backward of the stage runs, in any order and wherever the rest is."""
    activation = min(size.saved, size.kept + size.made) if splits else size.saved
    backward = min(size.backward, size.made + size.input_gradient) if splits else size.backward
    at_once = size.saved + size.inputs + size.output + max(size.forward, backward)
    return _Least(activation, size.inputs, at_once)


def _held(stages: Sequence[_Least], alive: int) -> int:
    """Bytes of a rank's activations, of which so many chunks' are alive at once."""
    activation, inputs = min(z.activation for z in stages), min(z.inputs for z in stages)
    return max(alive * (activation + inputs), *(z.at_once for z in stages))
