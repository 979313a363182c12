"""Advice for an enumeration: what the machine's prices say about a plan's inner axes.

An order that is made for a machine is made from the relative durations of its stages. They are rounded to two digits
and written into the plan, so that the program depends on nothing but the plan.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from math import inf

from autotune.planners.bounds import Bounder
from autotune.planners.costs.step import StepCosts
from autotune.planners.lower.subgroups import SUBGROUPS, split, subgroup_bytes
from autotune.planners.lower.traits import stage_sizes
from autotune.planners.schedules.times import Times
from autotune.planners.solvers.stride import Subgroup, best_stride
from autotune.spec.plan import Plan
from autotune.spec.program import Instruction

NEAR = 0.8  # of the allowed bytes; activations and transients come on top of what the bound counts
SCALE = 100.0  # a mean forward is written as this


@dataclass
class PricedAdvice:
    """Asks a bounder, which has the stages of most plans priced already."""

    bounder: Bounder
    allowed: float = inf  # bytes that a plan may allocate on a rank
    _times: dict[Plan, str] = field(default_factory=dict)

    def cuts(self, plan: Plan) -> tuple[str, ...]:
        return ("",)

    def states(self, plan: Plan) -> tuple[int, ...]:
        """All optimizer states on the device; and all on the host where memory is what binds, the states alone coming
        near to what a rank may allocate, and the node's host has room. A processor's memory is the host's."""
        predictor = self.bounder.predictor
        profile, precision = predictor.profile, predictor.workload.precision
        if profile.inline or self.bounder.memory(plan) <= NEAR * self.allowed:
            return (0,)
        shards = plan.data if plan.zero else 1
        groups = (
            split(size.parameters, shards, 100)[1] for size in stage_sizes(plan, predictor.model, predictor.workload)
        )
        moved = SUBGROUPS * sum(subgroup_bytes(each, precision)[0] for each in groups) // plan.pipeline
        return (0, 100) if moved * predictor.ranks(plan.world) <= NEAR * profile.host.memory_bytes else (0,)

    def stride(self, plan: Plan) -> int:
        """The stride that balances host and device on the rank's largest stage."""
        _, costs = self.bounder.stages(plan)
        return best_stride(
            SUBGROUPS, subgroup_times(StepCosts(plan, costs.model, costs.workload, costs.profile, costs.bodies))
        )

    def times(self, plan: Plan) -> str:
        """Durations of F, B, W of each stage and of a hop, relative to the mean forward."""
        key = replace(plan, schedule="1f1b", zero=0, group=0, limit=0, times="")
        if key not in self._times:
            _, costs = self.bounder.stages(plan)
            self._times[key] = str(relative(costs, plan))
        return self._times[key]


def subgroup_times(costs: StepCosts) -> Subgroup:
    """Seconds of one subgroup's moves and updates, of the stage with most parameters."""
    stage = max(range(len(costs.sizes)), key=lambda s: costs.sizes[s].parameters)
    ops = ("FETCH", "OPT_FETCHED", "RETURN", "GRADIENT_DOWN", "OPT_HOST", "WEIGHT_UP")
    return Subgroup(*(costs.seconds(0, Instruction(op, stage)) for op in ops))


def relative(costs: StepCosts, plan: Plan) -> Times:
    """The stages' prices as an order sees them."""
    columns = [[costs.stage(s, op).seconds for s in range(plan.stages)] for op in ("F", "B", "W")]
    unit = sum(columns[0]) / len(columns[0]) / SCALE
    hop = costs.seconds(0, Instruction("SEND", 0)) if plan.pipeline > 1 else 0.0
    forward, first, second = (_rounded(column, unit) for column in columns)
    return Times(forward, first, second, float(f"{hop / unit:.2g}"))


def _rounded(seconds: Sequence[float], unit: float) -> tuple[float, ...]:
    """Two digits each; one number where all are equal. Never nothing: a stage without weights still has a W."""
    values = tuple(max(1.0, float(f"{s / unit:.2g}")) for s in seconds)
    return values[:1] if len(set(values)) == 1 else values
