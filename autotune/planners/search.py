"""The search: enumerate, bound, simulate best bound first, measure the most promising, say how good the answer is.

When the next bound is no better than the best simulated plan, the search is over and the answer is optimal under the
cost model. Ended early (budget, Ctrl-C), it reports the gap that is left; if plans were left that nobody has bounded,
the gap is unknown.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence

from autotune.planners.advice import PricedAdvice
from autotune.planners.alone import Alone
from autotune.planners.bounds import Bounder
from autotune.planners.explore import MEMORY, NEVER, Exploration, deadline, objective, seconds_of
from autotune.planners.explore_front import FrontExploration
from autotune.planners.fits import nearest_of
from autotune.planners.fronts import by_interest, front_of, told
from autotune.planners.measured import measure_best
from autotune.planners.predict import Predictor
from autotune.planners.space import Enumeration
from autotune.planners.trial import Worker, Workers
from autotune.spec.errors import InfeasibleError
from autotune.spec.front import Front
from autotune.spec.plan import Plan
from autotune.spec.prediction import Bound, Found, Prediction, Question, Space

RANKED = 64  # predictions that the answer keeps


def limit_bytes(question: Question, world: int | None = None) -> int:
    """Device bytes that a plan on `world` devices (None: all of them) may allocate on one rank: the share that is
    allowed, less the runtime's own."""
    device, sharing = question.profile.device, question.profile.sharing(world or question.devices)
    return int(device.memory_bytes * question.memory_fraction / sharing - device.context_bytes)


def search(
    question: Question,
    *,
    known: Mapping[str, float] | None = None,
    remember: Callable[[Sequence[Prediction]], None] = lambda batch: None,
    measure: Callable[[Plan], float] | None = None,
    progress: Callable[[str], None] = lambda line: None,
) -> Found:
    """Finds the best plan of the question's space.

    `known` maps plan ids to measured seconds of an earlier, interrupted search: they are not measured again.
    `remember` is given every prediction in batches. `measure` runs a plan and gives its step seconds. Raises
    InfeasibleError when no plan fits, with the binding constraints.
    """
    began = time.monotonic()
    predictor = Predictor(question.model, question.workload, question.profile)
    bounder, allowed, ended = Bounder(predictor), limit_bytes(question), deadline(began, question.seconds)
    space = Enumeration(question, PricedAdvice(bounder), ended)
    with Workers(Worker(Alone(bounder, allowed))) as workers:
        known_so_far = (question, bounder, space, workers, allowed, remember, progress)
        rooms = {world: limit_bytes(question, world) for world in question.worlds or (question.devices,)}
        several = FrontExploration(*known_so_far, rooms=rooms) if question.objectives else None
        state = several or Exploration(*known_so_far, rooms=rooms)
        finished, interrupted = False, False
        try:
            state.gather()
            progress(_gathered(question, state))
            finished = state.prove(ended) and not space.unseen
        except KeyboardInterrupt:
            interrupted = True
            progress("interrupted: keeping what was found")
    best = state.best()
    if best is None and interrupted:
        raise KeyboardInterrupt  # nothing was found yet: that is no word on what fits
    if best is None and not finished:
        raise InfeasibleError(
            f"the budget ended before a plan that fits was found; {state.count} were simulated{_left_out(space)}",
            hint="raise [search] budget",
        )
    if best is None:
        full = any(kind.startswith(MEMORY) for kind in space.infeasible)
        near = nearest_of(question, allowed) if full else ""
        raise InfeasibleError(_nothing_fits(question, space, allowed), hint=near or None)
    ranking = sorted(state.simulated, key=lambda p: objective(question, p))
    front = front_of(question, several, finished) if several else None
    if front:
        ranking = _fronted(front, ranking)
    ranking = ranking[: max(RANKED, len(front.points) if front else 0)]
    measured, whole = dict(known or {}), True
    if measure is not None and question.measure_budget > 0 and finished:
        candidates = ranking[: min(question.measure_budget, len(front.points))] if front else ranking
        measured, whole = measure_best(question, candidates, measured, measure, progress)
        if front:
            front = told(question, front, measured)
            ranking = _fronted(front, ranking)
        else:
            ran = [p for p in ranking if p.plan.id in measured]
            ran.sort(key=lambda p: measured[p.plan.id])
            ranking = ran + [p for p in ranking if p.plan.id not in measured]
    ranking[0] = predictor.predict(ranking[0].plan)
    infeasible = dict(space.infeasible.most_common())
    return Found(
        question,
        tuple(ranking),
        _front_bound(several, ranking[0].step_s)
        if several
        else _bound(question, objective(question, best), None if finished else state.least, space.unseen > 0),
        Space(space.structures, space.structures - sum(infeasible.values()), infeasible, space.unseen),
        state.bounded,
        state.count,
        measured,
        finished,
        whole,
        front,
    )


def _fronted(front: Front, ranking: Sequence[Prediction]) -> list[Prediction]:
    """The plans of a front, those first that are of most interest, and then the others in their order."""
    known = {p.plan: p for p in ranking}
    plans = dict.fromkeys(by_interest(front))
    return [known[plan] for plan in plans] + [p for p in ranking if p.plan not in plans]


def _front_bound(state: FrontExploration, seconds: float) -> Bound:
    """The bound on the time of a step over the whole space, and how far above it the plan that is locked is."""
    floor = min(state.fastest, NEVER if state.least is None else state.least)
    known = floor > 0 and not state.space.unseen
    return Bound(max(floor, 0.0), seconds / floor - 1 if known else None)


def _bound(question: Question, value: float, least: float | None, partial: bool) -> Bound:
    """The bound over the space: the best value, or the least bound that is left; of a `partial` space the gap is
    unknown, as it is where nothing bounds the objective."""
    floor = value if least is None else min(least, value)
    known = question.workload.kind == "train" or floor == value
    if question.minimize == "tokens_per_s":
        value, floor = (seconds_of(question, each) for each in (value, floor))
    return Bound(floor if known else 0.0, value / floor - 1 if known and not partial else None)


def _gathered(question: Question, state: Exploration) -> str:
    least = state.least
    timed = (question.objectives or question.minimize in ("step_time", "latency")) and least is not None
    told = f"; none can take less than {least:.4g} s" if timed else ""
    feasible = state.waiting + len(state.simulated)
    return f"{state.space.structures} structures, {feasible} feasible{told}{_left_out(state.space)}"


def _left_out(space: Enumeration) -> str:
    """What the budget left no time to enumerate."""
    return f"; {space.unseen} of {space.choices} choices of the outer axes were not looked at" if space.unseen else ""


def _nothing_fits(question: Question, space: Enumeration, allowed: int) -> str:
    """Why there is no feasible plan: the reasons by count, with one example each."""
    where = f"{question.model.name} on {question.devices} x {question.profile.device.name}"
    lines = [f"no feasible plan for {where}; {space.structures} structures were looked at:"]
    for kind, count in space.infeasible.most_common(8):
        lines.append(f"  {count} x {space.examples[kind]}")
    if not space.structures:
        lines.append(f"  no data x tensor x pipeline of the given axes makes {question.devices} devices")
    return "\n".join(lines)
