"""The space of plans that a question spans: enumerated lazily, with a count of what is infeasible and why."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import fields
from functools import cached_property
from itertools import product
from math import gcd, prod
from typing import Protocol

from autotune.planners.decoding.strategies import STRATEGIES, acceptance_key, unknown, variants
from autotune.planners.feasible import least_ring, unfit, unsharded, why_not
from autotune.planners.lower.recompute import RECOMPUTE
from autotune.planners.lower.sharding import LEVELS
from autotune.planners.lower.traits import pipe_of
from autotune.planners.schedules import OWN, SCHEDULES, Place, held, schedule_of
from autotune.spec.machine import Profile
from autotune.spec.plan import FUSED, LIBRARY, PLAIN, Plan
from autotune.spec.prediction import Question
from autotune.spec.work import MASKED, Attention

Values = tuple[object, ...]
SEARCHED = tuple(name for name, entry in SCHEDULES.items() if entry.searched)
DEFAULTS = {f.name: f.default for f in fields(Plan)}


def divisors(number: int) -> tuple[int, ...]:
    return tuple(d for d in range(1, number + 1) if number % d == 0)


def degrees_of(question: Question) -> tuple[int, ...]:
    """Every degree that a mesh of the question's devices may have."""
    return tuple(sorted({d for world in question.worlds or (question.devices,) for d in divisors(world)}))


def backends(profile: Profile) -> Values:
    """Attention backends worth trying: those the profile has measured, but never the materialised scores."""
    seen = {s.work.backend for s in profile.samples if isinstance(s.work, Attention)}
    return tuple(sorted(b for b in seen - {"math", "sdpa"} if not b.startswith(MASKED))) or ("sdpa",)


def axis_values(question: Question) -> dict[str, Values]:
    """Every axis with its choices: the recipe's where it names the axis, everything valid where it does not."""
    workload, train = question.workload, question.workload.kind == "train"
    degrees = degrees_of(question)
    sequences = workload.global_batch if train else workload.batch
    everything: dict[str, Values] = {
        "data": degrees,
        "tensor": degrees,
        "pipeline": degrees,
        "context": degrees if train and workload.sequence_length >= LONG else (DEFAULTS["context"],),
        "micro_batch": tuple(d for d in divisors(sequences) if not train or d & (d - 1) == 0),
        "schedule": SEARCHED if train else (DEFAULTS["schedule"],),
        "recompute": tuple(RECOMPUTE) if train else ("none",),
        "attention": backends(question.profile),
        # Levels 2 and 3 send more: `relieved` tries them where a plan does not fit.
        "zero": (LEVELS if question.saving else LEVELS[:2]) if train else (0,),
        # Moving activations only adds to a step: `relieved` tries it where a plan does not fit.
        "offload": MOVED if train and question.saving else (0,),
        "optimizer": (DEFAULTS["optimizer"],),
        "split": (DEFAULTS["split"],),
        "offload_choice": (DEFAULTS["offload_choice"],),
        "offload_window": (DEFAULTS["offload_window"],),
        # Later sums only add waits: the recipe must want them (say, to measure both).
        "sync": (DEFAULTS["sync"],),
        "sequence_parallel": (False, True) if train else (False,),
        # Reading a prompt in parts takes longer and less memory: a long one may not fit otherwise.
        "prompt_chunk": (0, *(n for n in PARTS if 2 * n <= workload.prompt_length)) if not train else (0,),
        # Pages pay where prompts differ, which a search does not weigh up.
        "page": (DEFAULTS["page"],),
        # What changes results the recipe must ask for (spec.plan.CHANGES).
        "weights": (DEFAULTS["weights"],),
        "kernels": (LIBRARY, FUSED) if not train and question.profile.device.kind == "cuda" else (LIBRARY,),
    }
    return {axis: tuple(question.axes.get(axis, choices)) for axis, choices in everything.items()}


def _vocabularies(plan: Plan) -> Values:
    """The `vocabulary` values worth trying: of the sharded ones that with two barriers, which takes about as long as
    the others and keeps least."""
    sharded = plan.pipeline > 1 and plan.optimizer == DEFAULTS["optimizer"]
    return ("ends", "vocab-2") if sharded else ("ends",)


def _products(plan: Plan, row: int) -> Values:
    """The `weight_gradients` values worth trying, where so many W's of a stage always stand side by side."""
    return ("apart", "joined") if row > 1 and not plan.sequence_parallel else ("apart",)


BY_CHUNK = ("breadth-first", "zeropp")  # orders for a rank that has its weights a chunk at a time
FEW = (1, 2)  # chunks that a search lets a rank hold whole: no gather runs beside work with one, and one with two
MOVED = (0, 50, 100)  # percent of the activations on the host that a search tries
MESH = ("data", "tensor", "pipeline", "context")
PARTS = (2048,)  # tokens of a prompt that a search reads at a time, beside all of them
LONG = 8192  # tokens of a sequence from which on ranks share it unasked
# Axes whose choices hang on the plan so far.
INNER = (
    "chunks",
    "vocabulary",
    "layers",
    "group",
    "limit",
    "times",
    "order",
    "gathered",
    "optimizer_offload",
    "optimizer_stride",
    "optimizer_window",
    "weight_gradients",
    "gather_each",
)


class Advice(Protocol):
    """What an enumeration asks about a plan that is complete but for its inner axes."""

    def cuts(self, plan: Plan) -> tuple[str, ...]:
        """The `layers` worth trying."""

    def times(self, plan: Plan) -> str:
        """The relative durations of the plan's stages."""

    def states(self, plan: Plan) -> tuple[int, ...]:
        """The `optimizer_offload` that relieves the plan's devices, where there is one."""

    def stride(self, plan: Plan) -> int:
        """The `optimizer_stride` of a plan with optimizer states on the host."""

    def ahead(self, plan: Plan) -> int:
        """The `optimizer_window` in which the first subgroups are fetched."""

    def moved(self, plan: Plan) -> tuple[int, int]:
        """The `offload` whose copies take no longer than compute, and the `offload_window` that lets them."""


class Plain:
    """No advice: the even cut, equal times."""

    def cuts(self, plan: Plan) -> tuple[str, ...]:
        return ("",)

    def times(self, plan: Plan) -> str:
        return ""

    def states(self, plan: Plan) -> tuple[int, ...]:
        return ()

    def stride(self, plan: Plan) -> int:
        return 0

    def ahead(self, plan: Plan) -> int:
        return 0

    def moved(self, plan: Plan) -> tuple[int, int]:
        return MOVED[-1], Plan().offload_window


def canonical(plan: Plan) -> bool:
    """Whether a plan is the one that stands for those that differ from it only where it makes no difference.

    One rank alone fills no bubble: where nothing waits on the host between a forward and its backward, and no data rank
    for another's share of a chunk, no order of its micro-batches or stages is better than the usual one.
    """
    return plan.pipeline > 1 or plan.offload > 0 or plan.zero > 1 or plan.schedule == DEFAULTS["schedule"]


def generalise(reason: str) -> str:
    """A reason without the plan's own figures, so that equal causes are counted together."""
    return re.sub(r" \(found .*?\)", "", reason)


class Enumeration:
    """Iterates over the feasible plans of a question; `infeasible` counts the others by reason."""

    def __init__(
        self, question: Question, advice: Advice | None = None, ended: Callable[[], bool] = lambda: False
    ) -> None:
        self.question = question
        self.ended = ended  # whether there is no more time
        self.advice = advice or Plain()
        self.values = axis_values(question)
        self.structures = 0
        self.looked_at = 0  # of `choices`
        self.infeasible: Counter[str] = Counter()
        self.examples: dict[str, str] = {}
        pinned = question.axes.get("schedule")
        self._keep_all = pinned is not None and "1f1b" not in pinned

    @cached_property
    def meshes(self) -> list[Plan]:
        """The degrees that make the number of devices, or one of those that the question allows."""
        plans = (Plan().altered(**dict(zip(MESH, d, strict=True))) for d in product(*(self.values[n] for n in MESH)))
        filled = [plan for plan in plans if plan.world in (self.question.worlds or (self.question.devices,))]
        ringed = [plan.altered(context_ring=ring) for plan in filled for ring in self._rings(plan)]
        return [plan.altered(expert=expert) for plan in ringed for expert in self._experts(plan)]

    def _experts(self, plan: Plan) -> Values:
        """The `expert` values worth trying: every one that divides both experts and replicas."""
        experts = self.question.model.experts
        trains = self.question.workload.kind == "train" and experts is not None
        degrees = divisors(gcd(experts.count, plan.replicas)) if experts and trains else (DEFAULTS["expert"],)
        return self.question.axes.get("expert", degrees)

    def _rings(self, plan: Plan) -> Values:
        """The `context_ring` values worth trying: as many ranks as can exchange heads, and none."""
        choices = dict.fromkeys((least_ring(plan, self.question.model), plan.context))
        return self.question.axes.get("context_ring", tuple(choices))

    @property
    def choices(self) -> int:
        """How many there are of the outer axes: each is one structure or more."""
        return len(self.meshes) * prod(len(values) for name, values in self.values.items() if name not in MESH)

    @property
    def unseen(self) -> int:
        """The choices that there was no time for."""
        return self.choices - self.looked_at

    def __iter__(self) -> Iterator[Plan]:
        model, workload = self.question.model, self.question.workload
        rest = [n for n in self.values if n not in MESH]
        for mesh in self.meshes:
            for choice in product(*(self.values[n] for n in rest)):
                if self.ended():
                    return
                outer = mesh.altered(**dict(zip(rest, choice, strict=True)))
                unfitting = unfit(outer, model, workload)
                for plan in (outer,) if unfitting else self.inner(outer):
                    if not canonical(plan) and not self._keep_all:
                        continue
                    self.structures += 1
                    reason = unfitting or why_not(model, workload, plan) or unknown(plan, workload)
                    if reason is None:
                        yield plan
                    else:
                        self.reject(reason)
                self.looked_at += 1

    def inner(self, plan: Plan) -> Iterator[Plan]:
        """The plan with every choice of its inner axes: the recipe's, or what its schedule and the advice offer."""
        given, schedule = self.question.axes, SCHEDULES.get(plan.schedule)
        if schedule and plan.split != OWN and self.question.workload.kind == "train":
            if schedule.splits:
                yield plan  # refused
                return
            schedule = schedule_of(plan.schedule, plan.split)
        if schedule is None or self.question.workload.kind != "train":
            for choice in product(*map(self._given, INNER)):
                yield from self._decodings(plan.altered(**dict(zip(INNER, choice, strict=True))))
            return
        items = max(1, self.question.workload.global_batch // (plan.data * plan.micro_batch))
        first = {axis: self._given(axis)[0] for axis in ("group", "limit", "order")}
        for chunks in given.get("chunks", schedule.chunks):
            chunked = plan.altered(chunks=chunks, **first)
            deep = chunked.stages > max(1, self.question.model.layers)
            refused = deep or schedule.refuse(pipe := pipe_of(chunked, items))
            if refused or unsharded(self.question.model, plan.tensor, ends=False):
                yield chunked  # refused as it is: its inner choices would be, and some of them have no price
                continue
            products = given.get("weight_gradients", _products(chunked, schedule.row(pipe) if schedule.row else 1))
            groups, limits = given.get("group", schedule.groups(pipe)), given.get("limit", schedule.limits(pipe))
            vocabularies = given.get("vocabulary", _vocabularies(chunked))
            if "ends" in vocabularies and unsharded(self.question.model, plan.tensor):
                yield chunked  # a vocabulary that the tensor ranks cannot divide: its padded shards remain
                vocabularies = tuple(where for where in vocabularies if where != "ends")
            for placed in self._placed(chunked, vocabularies):
                times = given.get("times", (self.advice.times(placed),) if schedule.timed else ("",))
                for group, limit, each, order, how in product(groups, limits, times, self._given("order"), products):
                    ordered = placed.altered(group=group, limit=limit, times=each, order=order, weight_gradients=how)
                    rooms = given.get("gathered", self._gathered(plan, schedule.place(pipe)))
                    for few in rooms:
                        roomed = ordered.altered(gathered=few)
                        for often in self._often(roomed):
                            yield from self._states(roomed.altered(gather_each=often))

    def _decodings(self, plan: Plan) -> Iterator[Plan]:
        """The plan with every way of proposing tokens: the recipe's, or those whose acceptance is known, with as many
        tokens as it is known of. Without one a price has nothing to rest on: such a plan is refused by `unknown`."""
        given, workload = self.question.axes, self.question.workload
        known = {acceptance.key: len(acceptance.rates) for acceptance in workload.acceptance}
        for name in map(str, given.get("decoding", tuple(STRATEGIES))):
            if name not in STRATEGIES:
                yield plan.altered(decoding=name)  # refused
                continue
            for choice in variants(name, workload, given):
                how = plan.altered(**choice)
                if name == PLAIN or known.get(acceptance_key(how), 0) >= how.speculate or "decoding" in given:
                    yield how

    def _placed(self, plan: Plan, vocabularies: Iterable[object]) -> Iterator[Plan]:
        """The plan with every place of its vocabulary and every cut of its layers."""
        for where in vocabularies:
            sharded = plan.altered(vocabulary=where)
            for cut in self.question.axes.get("layers", self.advice.cuts(sharded)):
                yield sharded.altered(layers=cut)

    def _gathered(self, plan: Plan, place: Place) -> Values:
        """The `gathered` values worth trying. With a single chunk nothing is gathered beside work, and nothing saved:
        the recipe must want that."""
        named = "zero" in self.question.axes
        if plan.zero < 2 or len(held(place, 0)) == 1:
            return (0,) if plan.zero < 2 or named else ()
        few = tuple(count for count in FEW if count < len(held(place, 0)))
        if not named and not self.question.saving:
            return (0,)
        return (0, *few) if plan.zero > 2 else few

    def _often(self, plan: Plan) -> Values:
        """The `gather_each` values worth trying: `_roomier` tries a gather a unit where a plan does not fit, and where
        little memory is one aim of several nothing waits for that."""
        units = plan.zero == LEVELS[-1] and not plan.gathered and plan.schedule in BY_CHUNK
        weighed = units and self.question.saving and self.question.objectives
        return self.question.axes.get("gather_each", ("step", "unit") if weighed else (DEFAULTS["gather_each"],))

    def _states(self, plan: Plan) -> Iterator[Plan]:
        """The plan with its optimizer states where they may be: on the device, unless little memory is the aim."""
        least = self.question.saving
        for share in self.question.axes.get("optimizer_offload", (0, *self.advice.states(plan)) if least else (0,)):
            yield from self._strides(plan.altered(optimizer_offload=share))

    def _strides(self, plan: Plan) -> Iterator[Plan]:
        advised = self.advice.stride(plan) if plan.optimizer_offload else 0
        for stride in self.question.axes.get("optimizer_stride", (advised,)):
            strided = plan.altered(optimizer_stride=stride)
            # Fetched early, states take room beside the last activations: where there is none, they come at the update.
            early = (0, self.advice.ahead(strided)) if stride else (0,)
            for window in dict.fromkeys(self.question.axes.get("optimizer_window", early)):
                yield strided.altered(optimizer_window=window)

    def _given(self, axis: str) -> Values:
        return tuple(self.question.axes.get(axis, (DEFAULTS[axis],)))

    def relieved(self, plan: Plan) -> tuple[Plan, ...]:
        """What stands in for a plan that does not fit: the same with weights and gradients shared, with all activations
        on the host, with all optimizer states there, and with several of these, as far as they are open."""
        if plan.offload or plan.optimizer_offload:
            return self._stateless(plan)
        return (*self._shared(plan), *self._moved(plan, MOVED[-1:]), *self._stateless(plan))

    def eased(self, plan: Plan) -> tuple[Plan, ...]:
        """What to try when all activations on the host do fit, or one chunk at a time: less of it. Where they do not,
        nothing less can."""
        moved = self._moved(plan, MOVED[1:-1]) if plan.offload == MOVED[-1] else ()
        return (*moved, *self._roomier(plan))

    def widened(self, plan: Plan) -> tuple[Plan, ...]:
        """What to try beside a good plan with all activations on the host: copies that have longer, of all of them and
        of the share that takes no longer than compute."""
        usual = plan.offload == MOVED[-1] and plan.offload_window == DEFAULTS["offload_window"]
        if self.question.saving and not self.question.objectives:
            return ()  # longer copies only keep more
        if not usual or not self._unnamed("offload") or not self._unnamed("offload_window"):
            return ()
        share, window = self.advice.moved(plan)
        percents = {share, MOVED[-1]} - {0} if window > plan.offload_window else set()
        self.structures += len(percents)
        return tuple(plan.altered(offload=percent, offload_window=window) for percent in sorted(percents))

    def _roomier(self, plan: Plan) -> tuple[Plan, ...]:
        """Of a plan with one chunk whole at a time: with room for more, and with whole weights."""
        if (plan.zero, plan.gathered) != (LEVELS[-1], FEW[0]) or not self._sharable:
            return ()
        more = [plan.altered(gathered=count) for count in (*FEW[1:], 0) if count < plan.chunks]
        if plan.schedule in BY_CHUNK and self._open("gather_each"):
            more.append(plan.altered(gathered=0, gather_each="unit"))
        found = (*more, plan.altered(zero=LEVELS[-2]))
        self.structures += len(found)
        return found

    def _shared(self, plan: Plan) -> tuple[Plan, ...]:
        """Weights and gradients shared, one chunk whole at a time, of plans that share the states alone."""
        if plan.zero != 1 or not self._sharable:
            return ()
        found = []
        for chunked in self._in_chunks(plan):
            shared = chunked.altered(zero=LEVELS[-1], gathered=FEW[0])
            reason = why_not(self.question.model, self.question.workload, shared)
            self.structures += 1
            if reason:
                self.reject(reason)
            else:
                found.append(shared)
        return tuple(found)

    def _in_chunks(self, plan: Plan) -> tuple[Plan, ...]:
        """The plan, if a rank has several chunks. One rank alone has a single one, in use all along: in its place the
        layers in chunks, in orders that stay with one, and of these in units of as few micro-batches as may be."""
        orders = [name for name in BY_CHUNK if name in self.values["schedule"]]
        if plan.pipeline > 1 or not orders:
            return (plan,) if plan.chunks > 1 else ()
        found = []
        for name, entry in ((name, SCHEDULES[name]) for name in orders):
            for chunks in entry.chunks:
                if 1 < chunks <= self.question.model.layers:
                    chunked = plan.altered(schedule=name, chunks=chunks)
                    pipe = pipe_of(chunked, self.question.workload.global_batch // (plan.data * plan.micro_batch))
                    found.append(chunked.altered(group=min(entry.groups(pipe))))
        return tuple(found)

    def _moved(self, plan: Plan, percents: tuple[int, ...]) -> tuple[Plan, ...]:
        if not self._open("offload"):
            return ()
        self.structures += len(percents)
        return tuple(plan.altered(offload=percent) for percent in percents)

    def _stateless(self, plan: Plan) -> tuple[Plan, ...]:
        if plan.optimizer_offload or not self._open("optimizer_offload"):
            return ()
        shares = self.advice.states(plan)
        self.structures += len(shares)
        return tuple(p for share in shares for p in self._strides(plan.altered(optimizer_offload=share)))

    @property
    def _sharable(self) -> bool:
        return self._open("zero") and self._open("gathered")

    def _open(self, axis: str) -> bool:
        """Whether the search may move what the recipe left open: where memory is an aim, every choice is enumerated."""
        return self._unnamed(axis) and not self.question.saving

    def _unnamed(self, axis: str) -> bool:
        return axis not in self.question.axes and self.question.workload.kind == "train"

    def reject(self, reason: str) -> None:
        """Counts one plan as infeasible; `examples` keeps the first full reason of each kind."""
        kind = generalise(reason)
        self.infeasible[kind] += 1
        self.examples.setdefault(kind, reason)
