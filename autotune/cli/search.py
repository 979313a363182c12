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
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Search and measure anew, whatever the plan database holds.")
    ] = False,
    no_lock: Annotated[bool, typer.Option("--no-lock", help="Do not write NAME.lock.json.")] = False,
) -> None:
    """Find the fastest plan for a recipe and lock it.

    Says how far from the best possible the answer can be, and why other plans were out. Works for any machine that has
    a profile, at hand or not; where it is at hand the best plans are run as well. Ctrl-C keeps what was found, and the
    same command resumes. What was searched to its end before is answered at once from the plan database, or it is said
    what changed since: the recipe, the machine, its profile, the cost model, or versions of libraries.
    """
    from autotune.cli._searching import answer_json, find
    from autotune.cli._views import found_lines, moment, ranking_lines

    flags = {"machine.devices": devices, "search.budget.measure": measure, "search.budget.seconds": seconds}
    given = [f"{key}={value}" for key, value in flags.items() if value is not None]
    asked = read_recipe(recipe, [*(overrides or []), *given])
    progress = out.Progress()
    with opened() as store:
        try:
            answer = find(asked, store, lock=not no_lock, progress=progress, fresh=fresh)
        finally:
            progress.close()
        found = answer.found
        out.data(*found_lines(found))
        out.data(*ranking_lines(found))
        if answer.lock:
            out.data(f"lock       {answer.lock}")
        out.emit("search", answer_json(answer))
        if stored := answer.before.answer:
            out.say(f"from the plan database, searched on {moment(stored.searched)}; --fresh searches anew")
        if not found.finished:
            out.say("the search stopped before its bound closed: the same command goes on from here")
        elif not found.whole:
            out.say("not every plan that was to be measured has been: the same command goes on from here")
        out.say(f"next: autotune run {recipe if answer.lock else found.best.plan.id}")
