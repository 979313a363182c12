"""`autotune gate`: whether locked plans are still as fast, as small and as right as their baselines."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from autotune.cli import _arguments as arguments
from autotune.cli import _output as out
from autotune.cli._session import opened
from autotune.cli._settings import command


def add(app: typer.Typer) -> None:
    command(app)(gate)


def gate(
    recipes: Annotated[list[str], typer.Argument(metavar="RECIPE", help="Recipes (TOML), each with its lock.")],
    overrides: arguments.Overrides = None,
    predicted: Annotated[
        bool, typer.Option("--predicted", help="Run nothing: compare what is predicted now with the lock, and search.")
    ] = False,
    baseline: Annotated[
        str,
        typer.Option("--baseline", metavar="WHERE", help="lock, db (db:RUN) or git:REF, which is run beside this."),
    ] = "lock",
    update: Annotated[bool, typer.Option("--update", help="Measure, and write it as the baseline.")] = False,
    launches: Annotated[
        int | None, typer.Option("--launches", min=3, metavar="N", help="Process launches a side, not [gate]'s.")
    ] = None,
    threshold: Annotated[
        float | None, typer.Option("--threshold", metavar="X", help="The change that counts, as a fraction (0.03).")
    ] = None,
    retries: Annotated[
        int | None,
        typer.Option("--retries", min=0, metavar="N", help="How often two launches a side are added if inconclusive."),
    ] = None,
    other: Annotated[
        bool,
        typer.Option("--allow-other-machine", help="Another machine's baseline: report, and judge nothing."),
    ] = False,
    junit: Annotated[Path | None, typer.Option("--junit", metavar="FILE", help="Also write JUnit XML.")] = None,
    github: Annotated[
        bool, typer.Option("--github", help="Also print GitHub annotations and write the step's summary.")
    ] = False,
) -> None:
    """Compare locked plans with their baselines.

    Exit 7: a regression; 6: other losses or answers; 9: inconclusive; of several recipes the worst. The sample is a
    process launch. With --predicted nothing is run, and the answer is the same on every machine.
    """
    from autotune.cli._gating import Flags, hold, leave, written

    flags = Flags(predicted, baseline, update, launches, threshold, retries, other, tuple(overrides or ()))
    flags.check()
    with opened() as store:
        outcomes = [hold(recipe, flags, store) for recipe in recipes]
    written(outcomes, junit, github)
    leave(outcomes, out.fail)
