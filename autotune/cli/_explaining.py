"""What there is to say of a plan: the search that found it where a lock tells of one, else its prediction alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from autotune.cli._bands import banded
from autotune.cli._drawing import everywhere, measured_timeline
from autotune.cli._execution import predict_target
from autotune.cli._target import Target
from autotune.cli._thumb import against_thumb
from autotune.spec.errors import UsageError
from autotune.spec.lock import Lock
from autotune.spec.plan import Plan
from autotune.spec.prediction import Bound, Found, Prediction, Question, Space

if TYPE_CHECKING:
    from autotune.profiles_db.store import Store
    from autotune.report.explanation import Explanation, Section

OTHERS = 500  # plans of a search among which the neighbours of the winner are looked for


def explanation_of(
    target: Target, versus: str | None, store: Store, stepping: Callable[[str], None] | None = None
) -> Explanation:
    """The explanation of a target, with where the prediction was wrong if the plan has run. `stepping` asks for what
    each step along an axis does, and is told how far that is.

    Raises UsageError where no profile says for which machine the plan is.
    """
    from autotune.report.explain import explain_found, explain_prediction, explain_versus

    profile = target.need_profile()
    prediction = predict_target(target)
    assert prediction is not None
    if versus is not None:
        other = predict_target(replace(target, plan=store.plan(versus)))
        assert other is not None
        return explain_versus(prediction, other)
    question = question_of(target)
    if target.lock and target.recipe:
        explained = explain_found(found_of(target.lock, question, prediction, target, store))
    else:
        explained = explain_prediction(prediction, profile)
    more = [against_thumb(question, prediction, target, store)]
    more += _stepped(question, prediction, target, stepping) if stepping else []
    more += _mispriced(target, prediction, store)
    return replace(explained, sections=(*explained.sections, *more))


def question_of(target: Target) -> Question:
    """What a search for a target would answer: its recipe's question, else any plan for the same work and machine."""
    profile = target.need_profile()
    if target.recipe:
        return replace(target.recipe.question(profile), workload=target.workload)
    return Question(target.model, target.workload, profile, target.devices)


def _stepped(
    question: Question, prediction: Prediction, target: Target, progress: Callable[[str], None]
) -> list[Section]:
    """What each step along an axis does."""
    from autotune.planners.sensitivity import sensitivity
    from autotune.report.sensitivity import sensitivity_section

    found = sensitivity(question, prediction, progress)
    moved = (replace(m, prediction=banded(m.prediction, target)) if m.prediction else m for m in found.moved)
    return [sensitivity_section(replace(found, moved=tuple(moved)))]


def found_of(lock: Lock, question: Question, best: Prediction, target: Target, store: Store) -> Found:
    """The search's answer again: figures from the lock, the other plans from the database or predicted anew."""
    measured = {str(plan): float(value) for plan, value in dict(lock.evaluated.get("measured", {})).items()}
    others: list[Prediction] = []
    if lock.runner_up:
        plan = Plan.from_dict(dict(lock.runner_up["plan"]), "lock: runner_up")
        second = predict_target(replace(target, plan=plan))
        others += [second] if second else []
    seen = {best.plan, *(prediction.plan for prediction in others)}
    others += [banded(row, target) for row in _stored(question, store) if row.plan not in seen]
    return Found(
        question=question,
        ranking=(best, *others),
        bound=Bound(float(lock.bound["step_s"]), None if lock.bound["gap"] is None else float(lock.bound["gap"])),
        space=Space(
            int(lock.space["structures"]),
            int(lock.space["feasible"]),
            dict(lock.space["infeasible"]),
            int(lock.space.get("unseen", 0)),
        ),
        bounded=int(lock.evaluated.get("bounded", 0)),
        simulated=int(lock.evaluated.get("simulated", 0)),
        measured=measured,
        finished=bool(lock.bound.get("closed", False)),
    )


def _stored(question: Question, store: Store) -> list[Prediction]:
    """The fastest plans that the database holds for this question; none where the search was elsewhere."""
    name = store.asked(question)
    return store.predictions(name, OTHERS) if name else []


def _mispriced(target: Target, prediction: Prediction, store: Store) -> list[Section]:
    """Predicted against measured by instruction, where the plan has run and its timeline was kept."""
    from autotune.report.compare import differences, lines
    from autotune.report.explanation import Section

    measured = measured_timeline(target, store)
    if measured is None or prediction.timeline is None:
        return []
    try:
        rows = differences(everywhere(prediction.timeline, target.plan), measured)
    except UsageError:  # the run's program is of another version of the lowering
        return []
    facts = {"rows": [row.to_dict() for row in rows]}
    return [Section("measured", "Predicted against measured (the last run)", tuple(lines(rows)), facts)]
