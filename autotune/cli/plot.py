"""`autotune plot`: draws timelines, predicted and measured."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from autotune.cli import _arguments as arguments
from autotune.cli import _output as out
from autotune.cli._session import opened
from autotune.cli._settings import command


def add(app: typer.Typer) -> None:
    command(app)(plot)


def plot(
    target: Annotated[
        str, typer.Argument(metavar="RECIPE|LOCK|PLAN|RUN", help="As for run, or the id of a stored run.")
    ],
    overrides: arguments.Overrides = None,
    pins: arguments.Pins = None,
    out_file: Annotated[
        Path | None,
        typer.Option("--out", metavar="FILE", help=".html (a page), .json (Perfetto) or .svg; PLAN.html by default."),
    ] = None,
    predicted_only: Annotated[bool, typer.Option("--predicted", help="Leave the measured timeline out.")] = False,
) -> None:
    """Draw a plan's timeline as one file.

    Predicted and, where the plan has run, measured, on one time scale.
    """
    from autotune.cli._drawing import check_picture, timelines_of, write_picture

    if out_file:
        check_picture(out_file)
    with opened() as store:
        name, title, lines = timelines_of(target, overrides or [], pins or [], store, predicted_only)
    file = out_file or Path(f"{name}.html")
    write_picture(file, lines, title)
    kinds = [line.kind for line in lines]
    out.data(f"{file}: {' and '.join(kinds)}")
    out.emit("plot", {"file": str(file), "timelines": kinds, "title": title})
