"""What goes on the page of a target: out of its lock, its prediction and the database."""

from __future__ import annotations

from dataclasses import replace
from statistics import median
from typing import TYPE_CHECKING

from autotune.cli._drawing import everywhere, measured_timeline
from autotune.cli._execution import predict_target
from autotune.cli._explaining import explanation_of, found_of
from autotune.cli._target import Target
from autotune.report.bands import fell
from autotune.spec.lock import bands_of

if TYPE_CHECKING:
    from autotune.profiles_db.records import RunEntry
    from autotune.profiles_db.store import Store
    from autotune.report.sheet import PastRun, Sheet

RUNS = 500  # newest runs among which those of the same work are looked for


def sheet_of(target: Target, store: Store) -> Sheet:
    """The page's content. Raises UsageError where no profile says for which machine the plan is."""
    from autotune.report.sheet import Sheet

    profile = target.need_profile()
    prediction = predict_target(target)
    assert prediction is not None
    plans, measured, gap, fraction = [prediction], dict[str, float](), None, 1.0
    if target.lock and target.recipe:
        question = replace(target.recipe.question(profile), workload=target.workload)
        found = found_of(target.lock, question, prediction, target, store)
        plans, measured = list(found.ranking), dict(found.measured)
        gap, fraction = found.bound.gap, question.memory_fraction
    runs = [past for run in reversed(store.runs(RUNS)) if (past := _past(run, target)) is not None]
    if own := [run.step_s for run in runs if run.plan == target.plan.id]:
        measured[target.plan.id] = median(own)
    lines = [prediction.timeline] if prediction.timeline else []
    if (ran := measured_timeline(target, store)) is not None:
        lines = [*(everywhere(line, target.plan) for line in lines), ran]
    name = target.recipe.name if target.recipe else f"plan {target.plan.id}"
    title = f"{name}: {target.model.name} on {target.devices} x {profile.device.name}"
    explained = explanation_of(target, None, store)
    return Sheet(title, explained, plans, lines, runs, profile, measured, gap, fraction)


def _past(run: RunEntry, target: Target) -> PastRun | None:
    """A finished run of the same model and workload."""
    from autotune.report.sheet import PastRun

    step = run.step_s
    if run.model != target.model or run.workload != target.workload or not step:
        return None
    error = run.prediction.step_s / step - 1 if run.prediction else None
    bands = bands_of(run.facts.get("predicted", {}))
    return PastRun(
        run.started[:19].replace("T", " "),
        run.id,
        run.plan.id,
        step,
        error,
        max(run.peak_bytes, default=0),
        run.git_sha,
        fell(bands, "step_s", step),
    )
