"""The front of a search: which of the undominated plans are told, which is locked, and how much may be missing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from autotune.planners.explore_front import FrontExploration, halved
from autotune.planners.pareto import Vector, missing, thinned
from autotune.spec.front import Front, FrontPoint, knee, preferred
from autotune.spec.objectives import KNEE, OBJECTIVES, values
from autotune.spec.plan import Plan
from autotune.spec.prediction import Prediction, Question

LOCKED = "locked"


def front_of(question: Question, state: FrontExploration, finished: bool) -> Front:
    """The front of what was simulated. Of plans that are as good as another within the tolerance one is told."""
    vectors = thinned(state.archive.vectors, halved(question.tolerance))
    left = 0.0 if finished else missing(state.archive.vectors, state.bounds)
    points = tuple(_point(question, vector, state.held[vector]) for vector in vectors)
    front = Front(
        question.objectives,
        points,
        question.prefer,
        question.tolerance,
        None if state.space.unseen else left,
        state.pruned,
        dict(question.rates),
    )
    return told(question, front, {})


def _point(question: Question, vector: Vector, found: Prediction) -> FrontPoint:
    asked = (OBJECTIVES[name] for name in question.objectives)
    figures = tuple(each.told(value) for each, value in zip(asked, vector, strict=True))
    return FrontPoint(found.plan, figures, found.step_s, max(found.peak_bytes))


def told(question: Question, front: Front, measured: Mapping[str, float]) -> Front:
    """The front with what each plan is to it. Where plans were measured and their time matters, what is locked is the
    best of these, by their measured seconds."""
    vectors = [values(question, p.plan.world, p.step_s, float(p.peak_bytes)) for p in front.points]
    roles: list[list[str]] = [[] for _ in vectors]
    for axis, name in enumerate(question.objectives):
        roles[min(range(len(vectors)), key=lambda n: (vectors[n][axis], *vectors[n]))].append(f"best {name}")
    if (middle := knee(vectors)) is not None:
        roles[middle].append(KNEE)
    roles[_locked(question, front, vectors, measured)].insert(0, LOCKED)
    return replace(
        front, points=tuple(replace(p, roles=tuple(said)) for p, said in zip(front.points, roles, strict=True))
    )


def _locked(question: Question, front: Front, vectors: list[Vector], measured: Mapping[str, float]) -> int:
    """Which point is locked."""
    lead = OBJECTIVES.get(question.prefer or question.objectives[0])
    ran = [n for n, point in enumerate(front.points) if point.plan.id in measured]
    if not ran or lead is None or lead.quantity != "seconds":
        return preferred(question.prefer, question.objectives, vectors)

    def value(number: int) -> float:
        plan = front.points[number].plan
        return lead.unit(question, plan.world) * measured[plan.id]

    return min(ran, key=value)


def by_interest(front: Front) -> list[Plan]:
    """The plans of a front in the order in which they are worth measuring: the locked one, those best in an objective,
    the knee, then the others from the middle of the front outwards."""
    others = [point for point in front.points if not point.roles]
    middle = (len(others) - 1) / 2
    rest = [others[n] for n in sorted(range(len(others)), key=lambda n: abs(n - middle))]
    marked = sorted((p for p in front.points if p.roles), key=lambda p: (LOCKED not in p.roles, KNEE in p.roles))
    return [point.plan for point in (*marked, *rest)]
