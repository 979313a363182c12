"""`autotune search`: finds the fastest plan for a recipe and locks it."""

from __future__ import annotations

from typing import Annotated

import typer

from autotune.cli import _arguments as arguments
from autotune.cli import _output as out
from autotune.cli._session import opened, read_recipe
from autotune.cli._settings import command


def add(app: typer.Typer) -> None:
    command(app)(search)


def search(
    recipe: arguments.Recipe,
    overrides: arguments.Overrides = None,
    devices: Annotated[
        int | None, typer.Option("--devices", min=1, metavar="N", help="Devices the plan may use.")
    ] = None,
    measure: Annotated[
        int | None,
        typer.Option("--measure", min=0, metavar="K", help="Run the K most promising plans for a few steps."),
    ] = None,
    seconds: Annotated[
        float | None, typer.Option("--seconds", min=0.1, metavar="S", help="Stop after S seconds.")
    ] = None,
    no_lock: Annotated[bool, typer.Option("--no-lock", help="Do not write NAME.lock.json.")] = False,
) -> None:
    """Find the fastest plan for a recipe and lock it.

    Says how far from the best possible the answer can be, and why other plans were out. Works for any machine that has
    a profile, at hand or not; where it is at hand the best plans are run as well. Ctrl-C keeps what was found, and the
    same command resumes.
    """
    from autotune.cli._searching import find
    from autotune.cli._views import found_json, found_lines, ranking_lines

    flags = {"machine.devices": devices, "search.budget.measure": measure, "search.budget.seconds": seconds}
    given = [f"{key}={value}" for key, value in flags.items() if value is not None]
    asked = read_recipe(recipe, [*(overrides or []), *given])
    progress = out.Progress()
    with opened() as store:
        try:
            answer = find(asked, store, lock=not no_lock, progress=progress)
        finally:
            progress.close()
        found = answer.found
        out.data(*found_lines(found))
        out.data(*ranking_lines(found))
        if answer.lock:
            out.data(f"lock       {answer.lock}")
        out.emit(
            "search", {**found_json(found, str(answer.lock) if answer.lock else None), "search_id": answer.search[:10]}
        )
        if not found.finished:
            out.say("the search stopped before its bound closed: the same command goes on from here")
        out.say(f"next: autotune run {recipe if answer.lock else found.best.plan.id}")
