"""Advice for an enumeration: what the machine's prices say about a plan's inner axes.

An order that is made for a machine is made from the relative durations of its stages. They are rounded to two digits
and written into the plan, so that the program depends on nothing but the plan.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import ceil

from autotune.planners.bounds import Bounder
from autotune.planners.costs.step import StepCosts
from autotune.planners.lower.shape import training_shape
from autotune.planners.lower.stage import cut_of, whole_runs
from autotune.planners.lower.subgroups import SUBGROUPS, split, subgroup_bytes
from autotune.planners.lower.train import own_share
from autotune.planners.passes.subgroups import AT_ONCE
from autotune.planners.schedules.times import Times
from autotune.planners.solvers.partition import partition
from autotune.planners.solvers.stride import Subgroup, best_stride
from autotune.spec.plan import Plan
from autotune.spec.program import Instruction

NEAR = 0.8  # of the host's memory; data, workers and the system take the rest
SCALE = 100.0  # a mean forward is written as this


@dataclass
class PricedAdvice:
    """Asks a bounder, which has the stages of most plans priced already."""

    bounder: Bounder
    _times: dict[Plan, str] = field(default_factory=dict)
    _strides: dict[tuple[int, ...], int] = field(default_factory=dict)
    _cuts: dict[tuple[object, ...], str] = field(default_factory=dict)

    def cuts(self, plan: Plan) -> tuple[str, ...]:
        """The even cut, and where stages then differ the one with the least largest stage."""
        if plan.stages == 1:
            return ("",)
        sharded = plan.pipeline if plan.vocabulary != "ends" else 0
        shape = training_shape(plan, self.bounder.predictor.workload)
        key = (plan.stages, sharded, shape, plan.recompute, self.bounder.predictor.ranks(plan.world))
        if key not in self._cuts:
            self._cuts[key] = self._balanced(plan)
        return tuple(dict.fromkeys(("", self._cuts[key])))

    def _balanced(self, plan: Plan) -> str:
        """The cut by dynamic programming over the blocks' prices; "" where it is the even one."""
        predictor = self.bounder.predictor
        model, costs = predictor.model, self.bounder.costs(plan)
        runs = whole_runs(model, ends=plan.vocabulary == "ends", expert=plan.expert)
        seconds = {block: costs.block(block) for block in dict.fromkeys(block for block, _ in runs)}
        layers = [seconds[block] for block, count in runs if block.kind == "layer" for _ in range(count)]
        ends = {block.kind: time for block, time in seconds.items()}
        # A sharded vocabulary leaves no embedding, and of the head the norm.
        embed, head = ends.get("embed", 0.0), ends.get("head", 0.0)
        even = cut_of(plan.altered(layers=""), model).layers
        best = partition(layers, plan.stages, embed, head)
        return "" if best == even else ",".join(map(str, best))

    def states(self, plan: Plan) -> tuple[int, ...]:
        """All optimizer states on the host, where the node's host has room for every rank's. A processor's memory is
        the host's: nothing is gained there."""
        predictor = self.bounder.predictor
        profile, precision = predictor.profile, predictor.workload.precision
        if profile.inline:
            return ()
        sizes = self.bounder.family(plan).sizes
        groups = (split(own_share(plan, size.parameters, size.routed), 1, 100)[1] for size in sizes)
        moved = SUBGROUPS * sum(subgroup_bytes(each, precision)[0] for each in groups) // plan.pipeline
        return (100,) if moved * predictor.ranks(plan.world) <= NEAR * profile.host.memory_bytes else ()

    def moved(self, plan: Plan) -> tuple[int, int]:
        """All of the activations where a chunk's go to the host and back in the time that the chunk computes, else the
        share that does (PipeOffload, 2503.01328, section 3: k = T_o / T_c, of which 100 / k percent are free); and a
        window of twice what a copy takes, in compute steps, so that one copy may wait for another."""
        costs, share, window = self.bounder.costs(plan), 100, Plan().offload_window
        for stage in range(plan.stages):
            copies = [costs.seconds(0, Instruction(op, stage)) for op in ("OFFLOAD", "RELOAD")]
            steps = [costs.stage(stage, op).seconds for op in ("F", "BW")]
            if sum(copies) > sum(steps):
                share = min(share, int(100 * sum(steps) / sum(copies)))
            window = max(window, ceil(2 * max(copies) * len(steps) / sum(steps)))
        return share, window

    def stride(self, plan: Plan) -> int:
        """The stride that balances host and device on the rank's largest stage."""
        predictor = self.bounder.predictor
        shares = [own_share(plan, size.parameters, size.routed) for size in self.bounder.family(plan).sizes]
        key = (max(shares), plan.optimizer_offload, predictor.ranks(plan.world))
        if key not in self._strides:
            self._strides[key] = best_stride(SUBGROUPS, subgroup_times(self.bounder.costs(plan)))
        return self._strides[key]

    def ahead(self, plan: Plan) -> int:
        """As many compute steps as the fetches take, of the stage with most parameters."""
        costs = self.bounder.costs(plan)
        stage = max(range(plan.stages), key=lambda s: costs.sizes[s].parameters)
        backward = costs.stage(stage, "BW").seconds
        return ceil(AT_ONCE * costs.seconds(0, Instruction("FETCH", stage)) / backward) if backward else 0

    def times(self, plan: Plan) -> str:
        """Durations of F, B, W of each stage and of a hop, relative to the mean forward."""
        key = plan.altered(schedule="1f1b", split="own", zero=0, gathered=0, group=0, limit=0, times="", order="")
        if key not in self._times:
            self._times[key] = str(relative(self.bounder.costs(plan), plan))
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
    return Times(forward, first, second, float(f"{hop / unit:.2g}"), _kept(costs))


def _kept(costs: StepCosts) -> float:
    """The share of a chunk activation that is alive from B to W, of the stage that keeps most; up to whole tenths."""
    shares = [(z.kept + z.made + z.inputs) / max(1, z.saved + z.inputs) for z in costs.sizes]
    return min(1.0, ceil(10 * max(shares)) / 10)


def _rounded(seconds: Sequence[float], unit: float) -> tuple[float, ...]:
    """Two digits each; one number where all are equal. Never nothing: a stage without weights still has a W."""
    values = tuple(max(1.0, float(f"{s / unit:.2g}")) for s in seconds)
    return values[:1] if len(set(values)) == 1 else values
