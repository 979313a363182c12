"""Admissible lower bounds on a plan's step time and memory: what no order of its instructions can avoid.

Time, under the cost model: every rank must do all of its own compute and its update; the first micro-batch must have
passed the earlier stages before a rank can start, and its last gradient must pass them again before they can end.
Passes over a sharded vocabulary count where they cannot hide: those that the last stage waits for lie between
a rank's first forward and its last backward.
Memory: the states of a rank's stages, and as many activations as the schedule's closed form says are alive at once.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from autotune.planners.costs.step import StepCosts
from autotune.planners.lower.stage import Sizes
from autotune.planners.lower.train import order_of, resident_bytes, state_bytes
from autotune.planners.lower.traits import micro_batches, pipe_of, place_of, stage_sizes, traits
from autotune.planners.passes.offload import on_device
from autotune.planners.passes.subgroups import joined, moves
from autotune.planners.predict import Predictor
from autotune.planners.schedules import SCHEDULES, held
from autotune.planners.schedules.vocabulary import EMBED, EMBED_W, VOCABULARIES
from autotune.spec.plan import Plan
from autotune.spec.program import Instruction

StageTimes = tuple[tuple[float, float, float], ...]  # seconds of each stage: forward, least backward, least drain


@dataclass
class Bounder:
    """Bounds many plans, remembering what they share: the stage times depend on a few axes only."""

    predictor: Predictor
    _lanes: dict[tuple[int, ...], float] = field(default_factory=dict)
    _alive: dict[tuple[object, ...], list[Alive]] = field(default_factory=dict)
    _stages: dict[tuple[object, ...], tuple[StageTimes, StepCosts]] = field(default_factory=dict)

    def stages(self, plan: Plan) -> tuple[StageTimes, StepCosts]:
        key = (
            plan.stages,
            plan.layers,
            plan.vocabulary,
            plan.pipeline if plan.vocabulary != "ends" else 0,
            SCHEDULES[plan.schedule].splits,
            plan.tensor,
            plan.micro_batch,
            plan.recompute,
            plan.attention,
            plan.sequence_parallel,
            self.predictor.ranks(plan.world),
            self.predictor.pricer(plan.world).level(plan.world),
        )
        if key not in self._stages:
            costs = self.costs(plan)
            splits = SCHEDULES[plan.schedule].splits
            self._stages[key] = (tuple(self._times(costs, s, splits) for s in range(plan.stages)), costs)
        return self._stages[key]

    def costs(self, plan: Plan) -> StepCosts:
        p = self.predictor
        return StepCosts(plan, p.model, p.workload, p.profile, p.bodies(plan))

    def _times(self, costs: StepCosts, stage: int, splits: bool) -> tuple[float, float, float]:
        """Forward, backward, and what a gradient needs to pass: B alone where the schedule splits."""
        whole = costs.stage(stage, "BW").seconds
        forward = costs.stage(stage, "F").seconds
        if not splits:
            return forward, whole, whole
        first = costs.stage(stage, "B").seconds
        return forward, min(whole, first + costs.stage(stage, "W").seconds), min(whole, first)

    def time(self, plan: Plan) -> float:
        """Seconds that no execution of the plan's step can undercut, under the cost model."""
        times, costs = self.stages(plan)
        items = micro_batches(plan, self.predictor.workload)
        place = place_of(plan, items)
        updates = self.updates(plan)
        fill, drain = self.ends(plan)
        before, beside, after = self.vocabulary(plan, costs, items)
        best = work = 0.0
        capacity = self.predictor.capacity(plan)
        for rank in range(plan.pipeline):
            own = held(place, rank)
            # A stage that two directions hold does half of the micro-batches on either rank.
            busy = sum((items // len(place[s])) * (times[s][0] + times[s][1]) for s in own)
            update = sum(updates[s][1] for s in (*own, *range(plan.stages, len(updates))))
            # Whichever stage has its last gradient last: it is summed over the replicas, then its weights are updated.
            # States on the host go there and back after it.
            last = min(wait + max(step, lane) for wait, step, lane in (updates[s] for s in own))
            start = min(fill[s] for s in own)
            # Its last input gradient's end: weight gradients of a split backward may all come later.
            passed = sum((items // len(place[s])) * (times[s][0] + times[s][2]) for s in own)
            until, drained = start + busy + beside, start + passed + beside
            work += before + busy + beside + after + update
            best = max(best, until + max(after + update, last), drained + min(drain[s] for s in own))
            best = max(best, before + busy + beside + after + update)
        return max(best, work / capacity) if capacity else best

    def ends(self, plan: Plan) -> tuple[list[float], list[float]]:
        """Seconds before a stage's first micro-batch comes, and after its last gradient left; the last entries are of
        the whole way."""
        fill, drain = [0.0], [0.0]
        for stage, (forward, _, back) in enumerate(self.stages(plan)[0]):
            way = self.way(plan, stage)
            fill.append(fill[-1] + forward + way)
            drain.append(drain[-1] + back + way)
        return fill, drain

    def way(self, plan: Plan, stage: int) -> float:
        """Seconds of a message between a stage and the next, where no rank holds both."""
        place = place_of(plan, micro_batches(plan, self.predictor.workload))
        if stage + 1 >= plan.stages or set(place[stage]) & set(place[stage + 1]):
            return 0.0
        return self.stages(plan)[1].cost(Instruction("SEND", stage)).seconds

    def vocabulary(self, plan: Plan, costs: StepCosts, items: int) -> tuple[float, float, float]:
        """Seconds of a rank's passes over its shard of the vocabulary: those that may run before its first forward,
        those that lie between that and its last backward, and those that may come later."""
        if plan.vocabulary == "ends":
            return 0.0, 0.0, 0.0
        entry = VOCABULARIES[plan.vocabulary]
        waited, late = entry.passes[: entry.barriers], entry.passes[entry.barriers :]
        groups = ((EMBED,), waited, (*late, EMBED_W))
        seconds = [items * sum(costs.cost(Instruction(op, plan.stages)).seconds for op in ops) for ops in groups]
        return seconds[0], seconds[1], seconds[2]

    def updates(self, plan: Plan) -> list[tuple[float, float, float]]:
        """(collectives over the replicas, optimizer, the busiest lane of states on the host) seconds of each stage."""
        costs = self.costs(plan)
        sums = (("reduce_scatter", 1), ("all_gather", 0)) if plan.zero else (("all_reduce", 1),)
        found = []
        for stage, size in enumerate(costs.sizes):
            step = sum(map(costs.pricer.seconds, costs.optimizer(stage)))
            wait = 0.0
            if plan.data > 1:
                wait = sum(costs.pricer.seconds(costs.over_data(op, stage, which)) for op, which in sums)
            shards = plan.data if plan.zero else 1
            key = (size.parameters, shards, plan.optimizer_offload, plan.optimizer_stride, costs.pricer.ranks)
            if key not in self._lanes:
                self._lanes[key] = busiest_lane(costs, stage)
            found.append((wait, step, self._lanes[key]))
        return found

    def ordered_memory(self, plan: Plan) -> int:
        """As `memory`, of what the plan's own order shows: worth its making where activations move to the host."""
        if not plan.offload:
            return self.memory(plan)
        key = traits(plan, self.predictor.model, self.predictor.workload)
        which = (key.schedule, key.pipe, key.vocabulary, key.product, plan.offload)
        if which not in self._alive:
            self._alive[which] = [on_device(listing, plan.offload) for listing in order_of(key)]
        return self.memory(plan, self._alive[which])

    def memory(self, plan: Plan, alive: Sequence[Alive] | None = None) -> int:
        """Bytes that the fullest rank allocates at least: its states, and the activations that its order keeps, as
        many on every rank as its closed form says or as `alive` does."""
        sizes = stage_sizes(plan, self.predictor.model, self.predictor.workload)  # nothing need be priced for this
        schedule = SCHEDULES[plan.schedule]
        pipe = pipe_of(plan, micro_batches(plan, self.predictor.workload))
        place = schedule.place(pipe)
        known = schedule.peak(pipe) if schedule.peak and not plan.offload else None
        # What may wait on the host is not counted.
        alive = alive or [((n, n),) for n in known or [1] * plan.pipeline]
        parts = {size: self._least(plan, size, schedule.splits) for size in dict.fromkeys(sizes)}
        shard = sum(parts[size].states for size in sizes[plan.stages :])  # every rank's rows of the vocabulary
        most = 0
        for rank in range(plan.pipeline):
            own = [parts[sizes[s]] for s in held(place, rank)]
            activation, inputs = min(z.activation for z in own), min(z.inputs for z in own)
            kept = max(n * activation + x * inputs for n, x in alive[rank])
            most = max(most, shard + sum(z.states for z in own) + max(kept, *(z.at_once for z in own)))
        return most

    def _least(self, plan: Plan, size: Sizes, splits: bool) -> _Least:
        precision = self.predictor.workload.precision
        weights, gradients, _ = state_bytes(size.parameters, precision, 1)
        states = weights + gradients + resident_bytes(plan, size.parameters, precision)
        activation = min(size.saved, size.kept + size.made) if splits else size.saved
        return _Least(states, activation, size.inputs, _at_once(size, splits))


Alive = tuple[tuple[int, int], ...]  # of a rank: (chunk activations, inputs of chunks) on its device at once


class _Least(NamedTuple):
    """Bytes of a stage that no order can do without: of its states, of one micro-batch waiting and at work."""

    states: int
    activation: int
    inputs: int
    at_once: int


def busiest_lane(costs: StepCosts, stage: int) -> float:
    """Seconds of the lane that a stage's subgroups keep busiest: the host, either direction of its link, or compute."""
    if not costs.plan.optimizer_offload:
        return 0.0
    lanes: dict[str, float] = defaultdict(float)
    for instruction in (*moves(stage, costs.plan.optimizer_stride), *joined(stage, costs.plan.optimizer_stride)):
        lanes[instruction.lane] += costs.seconds(0, instruction)
    return max(lanes.values())


def _at_once(size: Sizes, splits: bool) -> int:
    """Bytes that one forward or backward of a stage needs while it runs, in any order and wherever the rest is."""
    backward = min(size.backward, size.made + size.input_gradient) if splits else size.backward
    return size.saved + size.inputs + size.output + max(size.forward, backward)
