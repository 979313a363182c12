"""`autotune validate`: predicted against measured, for stated plans and for published figures."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from autotune.cli import _output as out
from autotune.cli._session import opened
from autotune.cli._settings import command


def add(app: typer.Typer) -> None:
    command(app)(validate)


def validate(
    suite: Annotated[
        str, typer.Option("--suite", metavar="NAME", help="What to validate: papers, or a name that --list prints.")
    ] = "papers",
    listing: Annotated[bool, typer.Option("--list", help="Name the suites and published tables, and no more.")] = False,
    profile: Annotated[
        Path | None,
        typer.Option(
            "--profile", metavar="FILE", help="Predict from this profile of this machine, not the stored one."
        ),
    ] = None,
    plans: Annotated[
        str | None, typer.Option("--plans", metavar="N,M", help="These plans of the suite alone, by number from 0.")
    ] = None,
    repeats: Annotated[
        int | None,
        typer.Option("--repeats", min=1, metavar="N", help="Rounds over all plans; 3 on processors, else 1."),
    ] = None,
    steps: Annotated[
        int | None, typer.Option("--steps", min=1, metavar="N", help="Timed steps of each run; the suite's own number.")
    ] = None,
    as_is: Annotated[
        bool, typer.Option("--as-is", help="Measure no operation first: predict from the profile as it is.")
    ] = False,
    report: Annotated[
        list[Path] | None,
        typer.Option(
            "--report", metavar="FILE", help="Write the report: FILE.html (with plots) or FILE.md; repeatable."
        ),
    ] = None,
    require: Annotated[
        list[str] | None,
        typer.Option(
            "--require",
            metavar="BAR",
            help="Exit with 7 where missed: mean=0.05, worst=, tau=, rho=, regret=, memory.worst=, or targets.",
        ),
    ] = None,
) -> None:
    """Predict a stated set of plans, run or replay them, and say how far off the predictions are.

    A suite runs its plans on this machine; a published table needs no machine. Prints predicted and measured time and
    memory with signed errors and what each prediction rests on, then mean, worst, how far the orders agree (Kendall's
    tau-b, Spearman's rho), and regret: what the plan predicted best took longer than the best measured. Rows that
    coefficients were fitted to are shown apart and never judged. Rows are kept as they come: after an interruption the
    same command goes on.
    """
    from autotune.cli._validating import Asked, check_reports, list_suites, validated, write_report
    from autotune.cli._verdict import validation_json, validation_lines
    from autotune.runners.bars import missed, read
    from autotune.runners.validating import chosen_tables
    from autotune.spec.errors import Regression

    if listing:
        list_suites()
        return
    check_reports(report or [])
    bars = read(require or [], chosen_tables(suite))
    asked = Asked(suite, profile, plans, repeats, steps, as_is)
    progress = out.Progress(keep=True)
    with opened() as store:
        found, id = validated(asked, store, progress)
    out.data(*validation_lines(found))
    for file in report or []:
        write_report(file, found)
        out.data(f"report     {file}")
    short = missed(bars, found)
    required = {"bars": [str(bar) for bar in bars], "missed": short, "kept": not short} if bars else None
    out.emit(
        "validate", {**validation_json(found, id), "reports": [str(f) for f in report or []], "required": required}
    )
    if short:
        raise Regression("the validation misses what is required:\n  " + "\n  ".join(short))
