"""`autotune explain`: why a plan takes what it takes, why it won, and what the answer rests on."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from autotune.cli import _arguments as arguments
from autotune.cli import _output as out
from autotune.cli._session import opened
from autotune.cli._settings import command
from autotune.spec.errors import UsageError


def add(app: typer.Typer) -> None:
    command(app)(explain)


def explain(
    target: arguments.Target,
    overrides: arguments.Overrides = None,
    pins: arguments.Pins = None,
    versus: Annotated[
        str | None, typer.Option("--versus", metavar="PLAN", help="Compare with a stored plan for the same work.")
    ] = None,
    sensitivity: Annotated[
        bool,
        typer.Option("--sensitivity", help="Predict every plan one step along an axis from this one as well."),
    ] = False,
    view: Annotated[
        str | None,
        typer.Option("--view", metavar="NAME", help="One question alone: launches (who waits for whom) | context."),
    ] = None,
    trace: Annotated[
        Path | None,
        typer.Option("--trace", metavar="FILE", help="With --view launches: a torch.profiler trace of real kernels."),
    ] = None,
) -> None:
    """Explain why a plan takes what it takes.

    Where its time and memory go, why it beat the runner-up, why others were infeasible, how good the answer is, and
    where the prediction was wrong if the plan has run.
    """
    from autotune.cli._explain_views import check_view, view_of
    from autotune.cli._explaining import explanation_of
    from autotune.cli._target import find_target

    if versus is not None and sensitivity:
        raise UsageError("--sensitivity is of one plan, and --versus compares two", hint="drop one of them")
    check_view(view, trace, versus is not None or sensitivity)
    progress = out.Progress()
    with opened() as store:
        found = find_target(target, overrides or [], pins or [], store)
        try:
            if view:
                explanation = view_of(view, found, trace)
            else:
                explanation = explanation_of(found, versus, store, progress if sensitivity else None)
        finally:
            progress.close()
    out.data(*explanation.lines())
    content = explanation.to_dict()
    content.pop("schema")
    out.emit("explain", content)
