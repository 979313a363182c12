"""`autotune report`: one page on a recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from autotune.cli import _arguments as arguments
from autotune.cli import _output as out
from autotune.cli._session import opened
from autotune.cli._settings import command


def add(app: typer.Typer) -> None:
    command(app)(report)


def report(
    target: arguments.Target,
    overrides: arguments.Overrides = None,
    pins: arguments.Pins = None,
    out_file: Annotated[
        Path | None, typer.Option("--out", metavar="FILE", help="An .html file; NAME.report.html by default.")
    ] = None,
) -> None:
    """Write one self-contained page on a recipe.

    The answer and how good it is, its timeline predicted and measured, memory over time, the plans it was chosen from
    by time and memory, why others lost, the machine, and every run so far.
    """
    from autotune.cli._drawing import check_picture, write_whole
    from autotune.cli._reporting import sheet_of
    from autotune.cli._target import find_target
    from autotune.report.sheet import page

    if out_file:
        check_picture(out_file, (".html",))
    with opened() as store:
        found = find_target(target, overrides or [], pins or [], store)
        sheet = sheet_of(found, store)
    name = found.recipe.name if found.recipe else found.plan.id
    file = out_file or Path(f"{name}.report.html")
    write_whole(file, page(sheet))
    out.data(f"{file}: {len(sheet.plans)} plans, {len(sheet.timelines)} timelines, {len(sheet.runs)} runs")
    out.emit(
        "report",
        {"file": str(file), "plan_id": found.plan.id, "plans": len(sheet.plans), "runs": len(sheet.runs)},
    )
