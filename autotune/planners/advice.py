"""Advice for an enumeration: what the machine's prices say about a plan's inner axes.

An order that is made for a machine is made from the relative durations of its stages. They are rounded to two digits
and written into the plan, so that the program depends on nothing but the plan.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from math import ceil

from autotune.planners.bounds import Bounder
from autotune.planners.costs.step import StepCosts
from autotune.planners.lower.stage import cut_of
from autotune.planners.schedules.times import Times
from autotune.planners.solvers.partition import partition
from autotune.spec.plan import Plan
from autotune.spec.program import Instruction

SCALE = 100.0  # a mean forward is written as this


@dataclass
class PricedAdvice:
    """Asks a bounder, which has the stages of most plans priced already."""

    bounder: Bounder
    _times: dict[Plan, str] = field(default_factory=dict)
    _cuts: dict[Plan, str] = field(default_factory=dict)

    def cuts(self, plan: Plan) -> tuple[str, ...]:
        """The even cut, and where stages then differ the one with the least largest stage."""
        if plan.stages == 1:
            return ("",)
        key = replace(plan, schedule="1f1b", zero=0, group=0, limit=0, times="", order="", offload=0)
        if key not in self._cuts:
            self._cuts[key] = self._balanced(plan)
        return tuple(dict.fromkeys(("", self._cuts[key])))

    def _balanced(self, plan: Plan) -> str:
        """The cut by dynamic programming over the blocks' prices; "" where it is the even one."""
        model = self.bounder.predictor.model
        costs = self.bounder.stages(plan)[1]
        priced = [(block.kind, costs.block(block)) for stage in costs.stages for block in stage]
        layers = [seconds for kind, seconds in priced if kind == "layer"]
        # A sharded vocabulary leaves no embedding, and of the head the norm.
        embed, head = (sum(seconds for kind, seconds in priced if kind == end) for end in ("embed", "head"))
        even = cut_of(replace(plan, layers=""), model).layers
        best = partition(layers, plan.stages, embed, head)
        return "" if best == even else ",".join(map(str, best))

    def times(self, plan: Plan) -> str:
        """Durations of F, B, W of each stage and of a hop, relative to the mean forward."""
        key = replace(plan, schedule="1f1b", zero=0, group=0, limit=0, times="", order="")
        if key not in self._times:
            _, costs = self.bounder.stages(plan)
            self._times[key] = str(relative(costs, plan))
        return self._times[key]


def relative(costs: StepCosts, plan: Plan) -> Times:
    """The stages' prices as an order sees them."""
    columns = [[costs.stage(s, op).seconds for s in range(plan.stages)] for op in ("F", "B", "W")]
    unit = sum(columns[0]) / len(columns[0]) / SCALE
    hop = costs.seconds(0, Instruction("SEND", 0)) if plan.pipeline > 1 else 0.0
    forward, first, second = (_rounded(column, unit) for column in columns)
    return Times(forward, first, second, float(f"{hop / unit:.2g}"), _kept(costs))


def _kept(costs: StepCosts) -> float:
    """The share of a chunk activation that is alive from B to W, of the stage that keeps most; up to whole tenths."""
    shares = [(z.kept + z.made + z.inputs) / max(1, z.saved + z.inputs) for z in costs.sizes]
    return min(1.0, ceil(10 * max(shares)) / 10)


def _rounded(seconds: Sequence[float], unit: float) -> tuple[float, ...]:
    """Two digits each; one number where all are equal. Never nothing: a stage without weights still has a W."""
    values = tuple(max(1.0, float(f"{s / unit:.2g}")) for s in seconds)
    return values[:1] if len(set(values)) == 1 else values
