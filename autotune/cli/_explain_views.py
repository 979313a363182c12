"""The views of `explain`: each looks at one question alone, in the place of the whole explanation."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from autotune.cli._explaining import question_of
from autotune.cli._target import Target
from autotune.spec.errors import InfeasibleError, Problem, UsageError, nearest_name

if TYPE_CHECKING:
    from autotune.report.explanation import Explanation


def launches_view(target: Target, trace: Path | None) -> Explanation:
    """Whether launches are what is waited for; with `trace`, a torch.profiler trace, as measured too."""
    from autotune.planners.launches import launches
    from autotune.planners.predict import Predictor
    from autotune.report.launches import explain_launches
    from autotune.spec.kernel_trace import read_kernel_trace

    profile = target.need_profile()
    traced = (trace.name, read_kernel_trace(trace)) if trace else None
    found = launches(Predictor(target.model, target.workload, profile), target.plan)
    return explain_launches(target.plan, profile, found, traced)


def context_view(target: Target, trace: Path | None) -> Explanation:
    """What the length of prompts costs a served model."""
    from autotune.planners.context_costs import at_length, context_costs, lengths, options
    from autotune.report.context_costs import explain_context

    if target.workload.kind != "generate":
        raise UsageError(f"{target.shown}: --view context is of a generation, and this trains")
    question, plan = question_of(target), target.plan
    by_length = [at_length(question, plan, length) for length in lengths(question)]
    own = context_costs(question, plan)
    return explain_context(plan, question.profile, by_length, own, list(options(question, plan)))


VIEWS: dict[str, Callable[[Target, Path | None], Explanation]] = {
    "launches": launches_view,
    "context": context_view,
}


def view_of(name: str, target: Target, trace: Path | None) -> Explanation:
    """The view that `--view` names. Raises InfeasibleError for a plan that cannot run."""
    from autotune.planners.feasible import why_not

    if reason := why_not(target.model, target.workload, target.plan, target.devices):
        raise InfeasibleError(f"plan {target.plan.describe()}: {reason}")
    return VIEWS[name](target, trace)


def check_view(name: str | None, trace: Path | None, others: bool) -> None:
    """Refuse a view that there is not, and options that do not go with it, before anything is read."""
    if name is not None and name not in VIEWS:
        problem = Problem("--view", "", repr(name), "one of " + ", ".join(VIEWS), nearest_name(name, VIEWS))
        raise UsageError("cannot tell what to show", problems=[problem])
    if name is not None and others:
        raise UsageError("--view shows one question alone", hint="drop --versus and --sensitivity")
    if trace is not None and name != "launches":
        raise UsageError("--trace tells what launches took", hint="add --view launches")
