"""Admissible lower bounds on a plan's step time and memory: what no order of its instructions can avoid.

Time, under the cost model: every rank must do all of its own compute and its update; the first micro-batch must have
passed the earlier stages before a rank can start, and its last gradient must pass them again before they can end.
Memory: the states of a rank's stages, and as many activations as the schedule's closed form says are alive at once.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from autotune.planners.costs.step import StepCosts
from autotune.planners.lower.train import micro_batches, stage_sizes, state_bytes
from autotune.planners.predict import Predictor
from autotune.planners.schedules import SCHEDULES
from autotune.spec.plan import Plan
from autotune.spec.work import Collective, Optimizer

StageTimes = tuple[tuple[float, float], ...]  # (forward, backward) seconds of each stage


@dataclass
class Bounder:
    """Bounds many plans, remembering what they share: the stage times depend on a few axes only."""

    predictor: Predictor
    _stages: dict[tuple[object, ...], tuple[StageTimes, StepCosts]] = field(default_factory=dict)

    def stages(self, plan: Plan) -> tuple[StageTimes, StepCosts]:
        key = (
            plan.stages,
            plan.tensor,
            plan.micro_batch,
            plan.recompute,
            plan.attention,
            plan.sequence_parallel,
            min(plan.world, self.predictor.profile.device.count or plan.world),
        )
        if key not in self._stages:
            p = self.predictor
            costs = StepCosts(plan, p.model, p.workload, p.profile, p.bodies(plan))
            times = tuple((costs.stage(s, False).seconds, costs.stage(s, True).seconds) for s in range(plan.stages))
            self._stages[key] = (times, costs)
        return self._stages[key]

    def time(self, plan: Plan) -> float:
        """Seconds that no execution of the plan's step can undercut, under the cost model."""
        times, costs = self.stages(plan)
        items = micro_batches(plan, self.predictor.workload)
        place = SCHEDULES[plan.schedule].place(plan.pipeline, plan.chunks)
        updates = self.updates(plan, costs)
        best = fill = drain = 0.0
        for stage in range(plan.pipeline):  # the first stage on each rank
            rank = place[stage]
            own = [s for s, owner in enumerate(place) if owner == rank]
            busy = items * sum(times[s][0] + times[s][1] for s in own)
            update = sum(updates[s][1] for s in own)
            wait = updates[own[0]][0] if len(own) == 1 else 0.0
            best = max(best, fill + busy + update + wait, fill + busy + drain)
            fill += times[stage][0]
            drain += times[stage][1]
        return best

    def updates(self, plan: Plan, costs: StepCosts) -> list[tuple[float, float]]:
        """(collectives over the replicas, optimizer) seconds of each stage."""
        pricer, precision = costs.pricer, self.predictor.workload.precision
        kind = "mixed" if precision == "bf16" else precision
        where = pricer.spread(plan.data, plan.tensor)
        found = []
        for size in costs.sizes:
            weights, gradients, _ = state_bytes(size.parameters, precision, 1)
            shards = plan.data if plan.zero else 1
            step = pricer.seconds(Optimizer(-(-size.parameters // shards), kind))
            wait = 0.0
            if plan.data > 1:
                ops = (
                    [("reduce_scatter", gradients), ("all_gather", weights)]
                    if plan.zero
                    else [("all_reduce", gradients)]
                )
                wait = sum(pricer.seconds(Collective(op, nbytes, plan.data, *where)) for op, nbytes in ops)
            found.append((wait, step))
        return found

    def memory(self, plan: Plan) -> int:
        """Bytes that the fullest rank allocates at least: its states, and the activations that its order keeps."""
        sizes = stage_sizes(plan, self.predictor.model, self.predictor.workload)  # nothing need be priced for this
        schedule = SCHEDULES[plan.schedule]
        place = schedule.place(plan.pipeline, plan.chunks)
        items = micro_batches(plan, self.predictor.workload)
        alive = schedule.peak(plan.pipeline, items, plan.chunks) if schedule.peak else [1] * plan.pipeline
        least = []
        for rank in range(plan.pipeline):
            own = [sizes[s] for s, owner in enumerate(place) if owner == rank]
            shards = plan.data if plan.zero else 1
            states = sum(sum(state_bytes(z.parameters, self.predictor.workload.precision, shards)) for z in own)
            least.append(states + alive[rank] * min(z.saved + z.inputs for z in own))
        return max(least)
