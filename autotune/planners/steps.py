"""The plans one step away from a plan: one axis moved to a neighbouring value of the space, the others as they are.

Nothing here knows an axis by its meaning. Numbers have an order, so a step is the next one up or down; of names and
switches every other value is one step away. The degrees of the mesh make the number of devices, so one that grows is
paid for by one that shrinks. Where the plan cannot keep an inner axis as it is (a cut of the layers into other many
stages), what the space offers first, with the fewest changes, takes its place.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import islice

from autotune.planners.decoding.strategies import AXES as DECODING
from autotune.planners.decoding.strategies import unknown
from autotune.planners.feasible import unfit, why_not
from autotune.planners.space import DEFAULTS, INNER, MESH, Advice, Enumeration, Plain, Values, canonical
from autotune.spec.plan import Plan
from autotune.spec.prediction import Question

HANGING = (*INNER, "decoding", *DECODING)  # axes whose choices hang on the plan so far
INSIDE = {"context_ring": "context", "expert": "data"}  # axes inside a mesh: their choices hang on it alone
BRINGS = {"decoding": DECODING}  # axes whose value brings others with it
TRIED = 4096  # choices of the inner axes among which one is looked for that a moved plan can have


@dataclass(frozen=True)
class Step:
    """A plan one step along `axis` from another; `reason`: why it cannot run, else None. `offered`: whether the
    question's own choices have the value."""

    axis: str
    plan: Plan
    reason: str | None
    offered: bool


def widest(question: Question) -> Question:
    """The same question with every axis open: what a search for the least memory enumerates, which leaves nothing to
    be tried only where a plan does not fit."""
    return replace(question, axes={}, minimize="peak_memory")


def steps(question: Question, plan: Plan, advice: Advice | None = None) -> Iterator[Step]:
    """Every plan one step away from `plan`, axis by axis; a plan that two axes lead to comes once, and one that differs
    only where it makes no difference not at all (see `space.canonical`)."""
    advice = advice or Plain()
    seen = {plan}
    values = neighbourhood(question, plan, advice)
    for axis, choices in values.items():
        for value in beside(choices, getattr(plan, axis)):
            for moved in _moved(plan, axis, value, values):
                step = _step(question, plan, axis, moved, advice)
                if step.plan not in seen and (canonical(step.plan) or not canonical(plan)):
                    seen.add(step.plan)
                    yield step


def neighbourhood(question: Question, plan: Plan, advice: Advice) -> dict[str, Values]:
    """The values of every axis around a plan: the space's with everything open, and the recipe's own."""
    space = Enumeration(widest(question), advice)
    inside = [each for each in space.meshes if _same(each, plan, MESH)]
    found: dict[str, Values] = dict(space.values)
    found |= {axis: tuple(dict.fromkeys(getattr(each, axis) for each in inside)) for axis in INSIDE}
    found |= {axis: _hanging(question, plan, axis, advice) for axis in HANGING}
    own = {axis: (*choices, *question.axes.get(axis, ()), getattr(plan, axis)) for axis, choices in found.items()}
    return {axis: tuple(dict.fromkeys(choices)) for axis, choices in own.items()}


def _hanging(question: Question, plan: Plan, axis: str, advice: Advice) -> Values:
    """What the space offers of one axis where all others are the plan's."""
    kept = {other: (getattr(plan, other),) for other in HANGING if other not in (axis, *BRINGS.get(axis, ()))}
    space = Enumeration(replace(widest(question), axes=kept), advice)
    found = islice(space.inner(plan), TRIED)
    return tuple(dict.fromkeys(getattr(each, axis) for each in found))


def beside(choices: Values, value: object) -> Values:
    """The values one step away: of numbers the next below and above, of anything else every other."""
    others = [choice for choice in choices if choice != value]
    numbers = [n for n in others if isinstance(n, int) and not isinstance(n, bool)]
    if not isinstance(value, int) or isinstance(value, bool) or len(numbers) < len(others):
        return tuple(others)
    below, above = [n for n in numbers if n < value], [n for n in numbers if n > value]
    return (*([max(below)] if below else []), *([min(above)] if above else []))


def _moved(plan: Plan, axis: str, value: object, values: Mapping[str, Values]) -> Iterator[Plan]:
    """The plan with one axis moved; a degree of the mesh with each other degree that can make up for it."""
    if axis not in MESH:
        yield plan.altered(**{axis: value})
        return
    for other in MESH:
        rest = plan.altered(**{axis: value, other: 1}).world
        if other != axis and plan.world % rest == 0 and (paid := plan.world // rest) in values[other]:
            yield plan.altered(**{axis: value, other: paid})


def _step(question: Question, plan: Plan, axis: str, moved: Plan, advice: Advice) -> Step:
    """The step to a moved plan, or to the nearest with the moved values that can run."""
    kept = [name for name in (*MESH, axis) if getattr(moved, name) != getattr(plan, name)]
    reason = refused(question, moved)
    if reason and not unfit(moved, question.model, question.workload):
        near = [each for each in _choices(question, moved, advice) if _same(each, moved, kept)]
        near = [each for each in near if not refused(question, each)]
        if near:
            moved, reason = min(near, key=lambda each: _differing(each, moved)), None
    return Step(axis, moved, reason, all(_offered(question, moved, name) for name in kept))


def _choices(question: Question, moved: Plan, advice: Advice) -> Iterator[Plan]:
    """The moved plan with every choice of its inner axes, and of the axes inside its mesh."""
    space = Enumeration(widest(question), advice)
    inside = [each for each in space.meshes if _same(each, moved, MESH)]
    for mesh in inside:
        outer = moved.altered(**{axis: getattr(mesh, axis) for axis in INSIDE})
        if not unfit(outer, question.model, question.workload):
            yield from islice(space.inner(outer), TRIED)


def _same(a: Plan, b: Plan, axes: Iterable[str]) -> bool:
    return all(getattr(a, axis) == getattr(b, axis) for axis in axes)


def _offered(question: Question, plan: Plan, axis: str) -> bool:
    """Whether the question's own choices have the plan's value of an axis; they have every value of one left open."""
    return axis not in question.axes or getattr(plan, axis) in question.axes[axis]


def _differing(a: Plan, b: Plan) -> int:
    return sum(getattr(a, axis) != getattr(b, axis) for axis in DEFAULTS)


def refused(question: Question, plan: Plan) -> str | None:
    """Why a plan cannot run, or cannot be priced."""
    reason = why_not(question.model, question.workload, plan, question.devices)
    return reason or unknown(plan, question.workload)
