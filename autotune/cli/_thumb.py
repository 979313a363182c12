"""A target's plan beside the one that the rule of thumb writes, with what runs of both have measured."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from autotune.cli._execution import predict_target
from autotune.cli._target import Target
from autotune.spec.errors import UsageError
from autotune.spec.plan import Plan
from autotune.spec.prediction import Prediction, Question

if TYPE_CHECKING:
    from autotune.profiles_db.store import Store
    from autotune.report.explanation import Section
    from autotune.report.thumb import Measured

RUNS = 100  # newest of a plan, among which one for the same work on the same machine is looked for


def against_thumb(question: Question, prediction: Prediction, target: Target, store: Store) -> Section:
    """What the plan gains over the one that the rule of thumb writes."""
    from autotune.planners.thumb import RULES, rule_of_thumb
    from autotune.report.thumb import Measured, thumb_section

    rule, plan = RULES[question.workload.kind], rule_of_thumb(question)
    if plan is None:
        return thumb_section(rule, prediction, None, Measured(None, None, ""))
    thumb = predict_target(replace(target, plan=plan))
    return thumb_section(rule, prediction, thumb, measured_pair(target, plan, store))


def measured_pair(target: Target, thumb: Plan, store: Store) -> Measured:
    """What the target's plan and the rule's took on the machine that the plan is for: as runs of both say, else as the
    lock's search measured both; never one of each, which were timed differently."""
    from autotune.report.thumb import Measured

    own, other = _run_seconds(target, store), _run_seconds(replace(target, plan=thumb), store)
    if own and other:
        return Measured(own, other, "the newest run of each")
    searched = dict(target.lock.evaluated.get("measured", {})) if target.lock else {}
    if target.plan.id in searched and thumb.id in searched:
        return Measured(float(searched[target.plan.id]), float(searched[thumb.id]), "by the search")
    missing = [how for how, found in zip(_commands(target, thumb), (own, other), strict=True) if not found]
    which = "either plan" if len(missing) > 1 else "the rule's plan" if own else "this plan"
    return Measured(own, other, f"no run of {which} on that machine is stored: {' and '.join(missing)}")


def _commands(target: Target, thumb: Plan) -> tuple[str, str]:
    """What runs the target's plan, and what the rule's: that needs a recipe of the same work."""
    from autotune.report.thumb import pins

    recipe = target.recipe.path if target.recipe else "RECIPE"
    own = f"{recipe} {pins(target.plan)}" if target.recipe and not target.lock else target.shown
    other = f"{recipe} {pins(thumb)}".rstrip()
    return f"`autotune run {own.rstrip()}`", f"`autotune run {other}`"


def _run_seconds(target: Target, store: Store) -> float | None:
    """Seconds of a step in the newest finished run of the target's plan, for its work, on its machine."""
    try:
        runs = store.runs(RUNS, plan=target.plan.digest)
    except UsageError:  # the plan is not in the database
        return None
    asked = (target.model, target.workload, target.need_profile().fingerprint)
    alike = (run for run in runs if run.status == "finished" and (run.model, run.workload, run.machine) == asked)
    return next((run.step_s for run in alike if run.step_s), None)
