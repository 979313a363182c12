"""Admissible lower bounds on a plan's step time and memory: what no order of its instructions can avoid.

Time, under the cost model: every rank must do all of its own compute and its update; the first micro-batch must have
passed the earlier stages before a rank can start, and its last gradient must pass them again before they can end.
Passes over a sharded vocabulary count where they cannot hide: those that the last stage waits for lie between
a rank's first forward and its last backward.
Memory: the states of a rank's stages, and as many activations as the schedule's closed form says are alive at once.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from operator import attrgetter

from autotune.planners.costs.step import StepCosts
from autotune.planners.family import Family, Stages, priced_stages, row_of
from autotune.planners.lower.sharding import sharding
from autotune.planners.lower.stage import Sizes
from autotune.planners.lower.train import stage_bytes
from autotune.planners.passes.subgroups import joined, moves
from autotune.planners.predict import Predictor
from autotune.planners.schedules import schedule_of
from autotune.spec.plan import Plan
from autotune.spec.program import Instruction

# The axes that the plans of one family differ in.
APART = {
    "zero": 0,
    "gathered": 0,
    "gather_each": "step",
    "offload": 0,
    "offload_choice": "selective",
    "offload_window": 2,
    "optimizer": "barrier",
    "optimizer_offload": 0,
    "optimizer_stride": 0,
    "optimizer_window": 0,
    "sync": "eager",
}
_family_of = attrgetter(*(axis.name for axis in fields(Plan) if axis.name not in APART))
MOST_FAMILIES = 20_000  # that are kept: about 10 kB each


@dataclass
class Bounder:
    """Bounds many plans, remembering what they share: the stage times depend on a few axes only."""

    predictor: Predictor
    _updates: dict[tuple[object, ...], tuple[float, float, float]] = field(default_factory=dict)
    _stage_states: dict[tuple[object, ...], tuple[int, int]] = field(default_factory=dict)
    _stages: dict[tuple[object, ...], Stages] = field(default_factory=dict)
    _families: dict[tuple[object, ...], Family] = field(default_factory=dict)

    def family(self, plan: Plan) -> Family:
        """What the plan shares with those that differ from it in where states and activations lie."""
        key = _family_of(plan)
        found = self._families.get(key)
        if found is None:
            if len(self._families) >= MOST_FAMILIES:
                self._families.clear()
            own = plan.altered(**APART)
            found = self._families[key] = Family(own, self.predictor, self._stages_of(own))
        return found

    def _stages_of(self, plan: Plan) -> Stages:
        key = (
            plan.stages,
            plan.layers,
            plan.vocabulary,
            plan.pipeline if plan.vocabulary != "ends" else 0,
            schedule_of(plan.schedule, plan.split).splits,
            row_of(plan, self.predictor.workload),
            plan.tensor,
            plan.context,
            plan.context_ring,
            plan.expert,
            plan.micro_batch,
            plan.recompute,
            plan.attention,
            plan.sequence_parallel,
            self.predictor.ranks(plan.world),
            self.predictor.pricer(plan.world).level(plan.world),
        )
        if key not in self._stages:
            self._stages[key] = priced_stages(self.costs(plan))
        return self._stages[key]

    def costs(self, plan: Plan) -> StepCosts:
        p = self.predictor
        return StepCosts(plan, p.model, p.workload, p.profile, p.bodies(plan))

    def time(self, plan: Plan) -> float:
        """Seconds that no execution of the plan's step can undercut, under the cost model."""
        family = self.family(plan)
        updates, drain = self.updates(plan), family.ends[1]
        before, beside, after = family.vocabulary
        shard = sum(step for _, step, _ in updates[plan.stages :])
        whole = self.gathered(plan)
        best = work = 0.0
        capacity = self.predictor.capacity(plan)
        for own, (start, busy, passed) in zip(family.own, family.ranks, strict=True):
            start += whole
            update = sum(updates[s][1] for s in own) + shard
            # Whichever stage has its last gradient last: it is summed over the replicas, then its weights are updated.
            # States on the host go there and back after it.
            last = min(wait + max(step, lane) for wait, step, lane in (updates[s] for s in own))
            # Its last input gradient's end: weight gradients of a split backward may all come later.
            until, drained = start + busy + beside, start + passed + beside
            work += before + busy + beside + after + update
            best = max(best, until + max(after + update, last), drained + min(drain[s] for s in own))
            best = max(best, before + busy + beside + after + update)
        return max(best, work / capacity) if capacity else best

    def gathered(self, plan: Plan) -> float:
        """Seconds before the first stage has its weights."""
        if not sharding(plan.zero, 0, plan.stages).weights:
            return 0.0
        return self.costs(plan).seconds(0, Instruction("UNSHARD", 0))

    def updates(self, plan: Plan) -> list[tuple[float, float, float]]:
        """(collectives over the replicas, optimizer, the busiest lane of states on the host) seconds of each stage."""
        host = plan.optimizer_offload, plan.optimizer_stride, plan.optimizer_window > 0
        axes = (plan.replicas, plan.expert, plan.tensor, plan.zero, *host, plan.world)
        costs: StepCosts | None = None
        found = []
        for stage, size in enumerate(self.family(plan).sizes):
            key = (size.parameters, size.routed, stage == plan.stages, *axes)
            known = self._updates.get(key)
            if known is None:
                costs = costs or self.costs(plan)
                known = self._updates[key] = _update(costs, stage)
            found.append(known)
        return found

    def memory(self, plan: Plan) -> int:
        """Bytes that the fullest rank allocates at least: its states, and the activations that its order keeps, as
        many on every rank as its closed form says."""
        family = self.family(plan)
        shard = self._states(plan, family, range(plan.stages, len(family.sizes)))[0]
        # What may wait on the host is not counted.
        needs = family.single if plan.offload else family.needs
        most = 0
        for stages, need in needs:
            states, whole = self._states(plan, family, stages)
            # Most are alive while a forward or backward runs, on whole weights.
            most = max(most, need + states + whole)
        return shard + most

    def resident(self, plan: Plan, rank: int) -> int:
        """Bytes of weights, gradients and optimizer states that are on a rank's device all along."""
        family = self.family(plan)
        shard = range(plan.stages, len(family.sizes))  # every rank's rows of the vocabulary
        return self._states(plan, family, (*family.own[rank], *shard))[0]

    def _states(self, plan: Plan, family: Family, stages: Iterable[int]) -> tuple[int, int]:
        """Bytes of the stages' weights, gradients and optimizer states on one device, and of the least that some of
        them has as whole weights beside these."""
        found = [self._states_of(plan, stage, family.sizes[stage]) for stage in stages]
        return sum(states for states, _ in found), min((whole for _, whole in found), default=0)

    def _states_of(self, plan: Plan, stage: int, size: Sizes) -> tuple[int, int]:
        """Bytes of a stage's weights, gradients, and optimizer states on the device; of its whole weights where they
        are not among these."""
        shards = (plan.replicas, plan.expert) if plan.zero else (1, 1)
        which = size.parameters, size.routed, stage == plan.stages
        key = (*which, *shards, plan.zero, plan.optimizer_offload)
        if key not in self._stage_states:
            own = stage_bytes(plan, stage, size.parameters, self.predictor.workload.precision, size.routed)
            gathered = own.whole_weights if sharding(plan.zero, stage, plan.stages).weights else 0
            self._stage_states[key] = own.weights + own.gradients + own.states, gathered
        return self._stage_states[key]


def _update(costs: StepCosts, stage: int) -> tuple[float, float, float]:
    """See `Bounder.updates`."""
    plan, wait = costs.plan, 0.0
    if plan.replicas > 1:
        shared = sharding(plan.zero, stage, plan.stages)
        ops = (*(("SCATTER",) if shared.gradients else shared.sums), *shared.spreads)
        wait = sum(costs.seconds(0, Instruction(op, stage)) for op in ops)
    return wait, sum(map(costs.pricer.seconds, costs.optimizer(stage))), busiest_lane(costs, stage)


def busiest_lane(costs: StepCosts, stage: int) -> float:
    """Seconds of the lane that a stage's subgroups keep busiest after its last gradient: the host, either direction of
    its link, or compute."""
    plan = costs.plan
    if not plan.optimizer_offload:
        return 0.0
    lanes: dict[str, float] = defaultdict(float)
    early = plan.optimizer_window > 0
    for instruction in (*moves(stage, plan.optimizer_stride, early), *joined(stage, plan.optimizer_stride)):
        lanes[instruction.lane] += costs.seconds(0, instruction)
    return max(lanes.values())
