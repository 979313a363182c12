"""Predicts a plan: lowers it, simulates the program with the profile's prices, adds up memory by class."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from autotune.planners.costs.body import BodyCosts, Cost, added
from autotune.planners.costs.price import Pricer
from autotune.planners.costs.step import StepCosts
from autotune.planners.costs.works import Around
from autotune.planners.feasible import why_not
from autotune.planners.lower.train import lower_training
from autotune.planners.resolve import resolve, uncollected
from autotune.planners.sharing import Capacity
from autotune.planners.simulate import busy_by, held_by, prices, spans_of, timed
from autotune.spec.errors import InfeasibleError
from autotune.spec.machine import COPIES_AT_ONCE, Profile
from autotune.spec.model import ModelSpec
from autotune.spec.plan import Plan
from autotune.spec.prediction import Prediction
from autotune.spec.program import COMPUTE, D2H, DEVICE, H2D
from autotune.spec.timeline import Timeline
from autotune.spec.workload import Workload

COST_MODEL = "6"  # goes up whenever predictions may change: stored predictions of another version are not reused

CLASSES = {
    "w": "weights",
    "g": "gradients",
    "o": "optimizer",
    "f": "optimizer",
    "a": "activations",
    "x": "boundaries",
    "d": "boundaries",
}
CLASSES |= dict.fromkeys("kbyzu", "activations")
CLASSES |= {"tw": "weights", "fw": "weights", "fg": "gradients", "te": "gradients"}  # whole ones of shards


class TooLarge(NamedTuple):
    """A plan that needs at least these device bytes on one rank: more than are allowed."""

    plan: Plan
    bytes: int


class TooSlow(NamedTuple):
    """A plan whose step takes at least these seconds: more than is of use. `look`: the look at its ranks alone that has
    shown it (see planners.alone); None: its simulation. `bytes`: of what a device takes at least, as far as looked."""

    plan: Plan
    seconds: float
    look: int | None = None
    bytes: int = 0


@dataclass
class Predictor:
    """Predicts many plans of one model, workload and machine, remembering what they share."""

    model: ModelSpec
    workload: Workload
    profile: Profile
    _pricers: dict[int, Pricer] = field(default_factory=dict)
    _bodies: dict[tuple[int, int, int, Around], BodyCosts] = field(default_factory=dict)
    _rounds: dict[int, Predictor] = field(default_factory=dict)

    def ranks(self, world: int) -> int:
        """Workers that share a node."""
        most = min(world, self.profile.device.count or world)
        # Workers beyond a processor's cores share them: the simulator says when, so prices are those of full cores.
        return min(most, self.profile.device.cores) if self.profile.inline and self.profile.device.cores else most

    def capacity(self, plan: Plan) -> float | None:
        """How many pipeline ranks, with all their replicas and tensor peers, can compute at once at full speed."""
        cores = self.profile.device.cores
        return cores / (plan.replicas * plan.tensor) if self.profile.inline and cores and plan.world > cores else None

    def capacities(self, plan: Plan) -> list[Capacity]:
        """What the plan's pipeline ranks share: a processor's cores, where none is left over for messages; the memory
        of the host that copies go through."""
        peers, device, found = plan.replicas * plan.tensor, self.profile.device, list[Capacity]()
        count = min(plan.world, device.count or plan.world)
        if self.profile.inline and 1 < device.cores <= plan.world:
            found.append(Capacity(None, device.cores / peers))
        if at_once := self.profile.coefficients.get(f"{COPIES_AT_ONCE}.{count}"):
            found.append(Capacity(frozenset({H2D, D2H}), at_once / min(peers, count), max(1, count // peers)))
        return found

    def pricer(self, world: int) -> Pricer:
        """Prices at the number of workers that share a node."""
        ranks = self.ranks(world)
        if ranks not in self._pricers:
            self._pricers[ranks] = Pricer(self.profile, ranks)
        return self._pricers[ranks]

    def bodies(self, plan: Plan) -> BodyCosts:
        pricer = self.pricer(plan.world)
        level, inner = pricer.spread(plan.tensor, 1)
        exchange = pricer.spread(plan.context // plan.context_ring, plan.tensor)
        divided = pricer.spread(plan.expert, plan.tensor)
        around = Around(*exchange, pricer.level(plan.context * plan.tensor), *divided)
        key = (self.ranks(plan.world), level, inner, around)
        if key not in self._bodies:
            self._bodies[key] = BodyCosts(self.profile, pricer, level, inner, around)
        return self._bodies[key]

    def predict(self, plan: Plan, timeline: bool = True) -> Prediction:
        """The prediction of a feasible plan (see planners.feasible)."""
        found = self.attempt(plan, timeline=timeline)
        assert isinstance(found, Prediction)  # nothing was asked of it that it could miss
        return found

    def attempt(
        self, plan: Plan, allowed: int | None = None, limit: float = float("inf"), timeline: bool = False
    ) -> Prediction | TooLarge | TooSlow:
        """As `predict`; but a training plan that needs more than `allowed` bytes, or `limit` seconds or more, is left
        as soon as that is known: memory first, which takes no time to be simulated."""
        if self.workload.kind != "train":
            return self._generation(plan)
        costs = StepCosts(plan, self.model, self.workload, self.profile, self.bodies(plan))
        with uncollected():
            program = lower_training(plan, self.model, self.workload)
            ranks, priced = range(program.world), prices(program, costs)
            held = [held_by(program, rank, priced[rank]) for rank in ranks]
            most = max(max(series[DEVICE], default=0) for series in held)
            if allowed is not None and most > allowed:
                return TooLarge(plan, most)
            resolved = resolve(program, self.profile.inline)
            start, end = timed(program, priced, resolved, self.capacities(plan))
            makespan = max(end, default=0.0) - min(start, default=0.0)
            if makespan >= limit:
                return TooSlow(plan, makespan)
            busy = [busy_by(program, resolved, rank, start, end) for rank in ranks]
            slowest = max(ranks, key=busy.__getitem__)
            shown = ranks if timeline else (slowest,)
            spans = [span for rank in shown for span in spans_of(program, resolved, rank, start, end)]
        sent = tuple(sum(price[2] for price in mine) for mine in priced)
        line = Timeline("predicted", program, tuple(spans), held, sent)
        total = added(costs.cost(i) for i in program.ranks[slowest] if i.lane == COMPUTE)
        kinds = dict(total.kinds)
        kinds["exposed communication"] = line.exposed_communication(slowest)
        kinds["idle"] = max(0.0, makespan - busy[slowest] - kinds["exposed communication"])
        memory = tuple(memory_by_class(line, rank, self.profile) for rank in ranks)
        return Prediction(
            plan,
            makespan,
            self.workload.tokens / makespan,
            tuple(allocated(m) for m in memory),
            memory,
            kinds,
            shares(total),
            line if timeline else None,
        )

    def round(self, plan: Plan) -> Predictor:
        """The predictor of the sequences that a plan generates together."""
        together = plan.data * plan.micro_batch
        if together not in self._rounds:
            self._rounds[together] = replace(self, workload=replace(self.workload, batch=together), _rounds={})
        return self._rounds[together]

    def _generation(self, plan: Plan) -> Prediction:
        """The replicas take `micro_batch` sequences at a time, one round after another."""
        from autotune.planners.predict_generation import predict_generation

        rounds = self.workload.batch // (plan.data * plan.micro_batch)
        one = predict_generation(self.round(plan), plan)
        return replace(
            one,
            step_s=one.step_s * rounds,
            tokens_per_s=self.workload.tokens / (one.step_s * rounds),
            breakdown={kind: seconds * rounds for kind, seconds in one.breakdown.items()},
            peak_bytes=tuple(map(allocated, one.memory)),
        )


def allocated(memory: Mapping[str, int]) -> int:
    """What the allocator hands out at the peak: every class but the runtime's own overhead."""
    return sum(size for kind, size in memory.items() if kind != "overhead")


def shares(cost: Cost) -> dict[str, float]:
    """The share of busy seconds that rests on each grade."""
    whole = sum(cost.grades.values())
    return {grade: seconds / whole for grade, seconds in cost.grades.items()} if whole else {}


def memory_by_class(line: Timeline, rank: int, profile: Profile) -> Mapping[str, int]:
    """Device bytes of a rank at its peak, by class of buffer; `transient` is what instructions take and give back.

    The classes add up to the peak: what is live at the instruction where the peak is.
    """
    program, series = line.program, line.memory[rank]["device"]
    at = max(range(len(series)), key=series.__getitem__, default=0)
    buffers, live = program.buffers[rank], set(program.given(rank))
    for instruction in program.ranks[rank][: at + 1]:
        live.update(instruction.writes)
        if instruction is not program.ranks[rank][at]:
            live.difference_update(instruction.frees)
    parts: Counter[str] = Counter()
    for name in live:
        if buffers[name].tier != DEVICE:
            continue
        parts[CLASSES.get(name.split(".")[0], "data")] += buffers[name].size
    parts["transient"] = series[at] - parts.total() if series else 0
    parts["overhead"] = profile.device.context_bytes
    return dict(parts)


def predict(
    model: ModelSpec, workload: Workload, profile: Profile, plan: Plan, devices: int | None = None
) -> Prediction:
    """Predicts one plan. Raises InfeasibleError when it cannot run."""
    if reason := why_not(model, workload, plan, devices):
        raise InfeasibleError(f"plan {plan.describe()}: {reason}")
    return Predictor(model, workload, profile).predict(plan)
