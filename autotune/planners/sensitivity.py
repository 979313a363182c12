"""How sensitive an optimum is: what each step along an axis would do to a plan's time and memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from autotune.planners.advice import PricedAdvice
from autotune.planners.bounds import Bounder
from autotune.planners.explore import too_large
from autotune.planners.predict import Predictor
from autotune.planners.search import limit_bytes
from autotune.planners.space import DEFAULTS
from autotune.planners.steps import Step, steps
from autotune.spec.plan import Plan
from autotune.spec.prediction import Prediction, Question
from autotune.spec.words import counted


@dataclass(frozen=True)
class Moved:
    """One step and what it is predicted to do. `prediction` is None where the plan cannot run; `reason` says why it
    cannot, or that it does not fit."""

    axis: str
    plan: Plan
    offered: bool  # by the question's own choices
    prediction: Prediction | None
    reason: str | None


@dataclass(frozen=True)
class Sensitivity:
    """`base` is the plan that the steps are taken from; `still`: axes of which the space has no other value."""

    base: Prediction
    moved: tuple[Moved, ...]
    still: tuple[str, ...]


def sensitivity(
    question: Question, base: Prediction, progress: Callable[[str], None] = lambda line: None
) -> Sensitivity:
    """Every plan one step away from `base`'s, predicted; the fastest that fit first, then what does not fit, then what
    cannot run."""
    predictor = Predictor(question.model, question.workload, question.profile)
    allowed, found = limit_bytes(question), list[Moved]()
    for step in steps(question, base.plan, PricedAdvice(Bounder(predictor))):
        found.append(_priced(step, predictor, allowed))
        progress(f"sensitivity: {counted(len(found), 'step', 'steps')}, now along {step.axis}")
    found.sort(key=_rank)
    axes = {moved.axis for moved in found} | {
        axis for moved in found for axis in DEFAULTS if getattr(moved.plan, axis) != getattr(base.plan, axis)
    }
    return Sensitivity(base, tuple(found), tuple(axis for axis in DEFAULTS if axis not in axes))


def _priced(step: Step, predictor: Predictor, allowed: int) -> Moved:
    if step.reason:
        return Moved(step.axis, step.plan, step.offered, None, step.reason)
    prediction = predictor.predict(step.plan, timeline=False)
    peak = max(prediction.peak_bytes)
    reason = too_large(peak, allowed) if peak > allowed else None
    return Moved(step.axis, step.plan, step.offered, prediction, reason)


def _rank(moved: Moved) -> tuple[bool, bool, float]:
    prediction = moved.prediction
    return prediction is None, moved.reason is not None, prediction.step_s if prediction else 0.0
