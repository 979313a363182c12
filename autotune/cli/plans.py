"""`autotune plans`: lists, shows and compares stored plans."""

from __future__ import annotations

from typing import Annotated

import typer

from autotune.cli import _arguments as arguments
from autotune.cli import _output as out
from autotune.cli._session import opened
from autotune.cli._settings import command, current

group = typer.Typer(help="Stored plans: list, show, compare.", no_args_is_help=True, rich_markup_mode=None)


@command(group, "ls")
def list_plans(
    limit: arguments.Limit = 20,
    top: Annotated[int, typer.Option("--top", min=0, metavar="N", help="How many of each question; 0: all.")] = 5,
    model: Annotated[str, typer.Option("--model", metavar="NAME", help="Only of this model.")] = "",
    measured: Annotated[bool, typer.Option("--measured", help="Only those that were measured or run.")] = False,
) -> None:
    """List stored plans.

    The latest question first, its fastest plans on top. A question is a model, a
    workload, a machine and a number of devices.
    """
    from autotune.cli._views import left_out, plan_entry_json, plan_entry_rows

    with opened(create=False) as store:
        entries = store.plans(limit, top=top, model=model, measured=measured)
        of_top, whole = (store.count_plans(top=most, model=model, measured=measured) for most in (top, 0))
        out.data(*out.table(plan_entry_rows(entries), right=(4, 5, 6, 7)) if entries else ["no plans yet"])
        out.emit("plans.ls", {"plans": [plan_entry_json(entry) for entry in entries], "db": store.place.shown})
    if not current().as_json and len(entries) < whole:
        out.say(left_out(len(entries), of_top, whole, limit))


@command(group)
def show(plan: Annotated[str, typer.Argument(metavar="PLAN", help="A plan's id, or its beginning.")]) -> None:
    """Show a plan's axes and runs."""
    from autotune.cli._target import axes_of
    from autotune.cli._views import change_lines, run_entry_json, run_entry_rows

    with opened(create=False) as store:
        found = store.plan(plan)
        runs = store.runs(50, plan=found.digest)
        out.data(f"plan       {found.id}  {found.describe()}")
        out.data(*change_lines(found))
        out.data(*out.table([(f"  {axis}", str(value)) for axis, value in axes_of(found).items()]))
        out.data(*out.table(run_entry_rows(runs), right=(3, 4, 5)) if runs else ["no runs"])
        content = {
            "plan": found.to_dict(),
            "plan_id": found.id,
            "changes": list(found.changes),
            "digest": found.digest,
            "db": store.place.shown,
        }
        out.emit("plans.show", {**content, "runs": [run_entry_json(run) for run in runs]})


@command(group)
def diff(
    first: Annotated[str, typer.Argument(metavar="PLAN", help="A plan's id.")],
    second: Annotated[str, typer.Argument(metavar="PLAN", help="Another's.")],
) -> None:
    """Compare two plans axis by axis."""
    from autotune.cli._target import axes_of

    with opened(create=False) as store:
        a, b = store.plan(first), store.plan(second)
    pairs = {axis: (value, axes_of(b)[axis]) for axis, value in axes_of(a).items() if value != axes_of(b)[axis]}
    rows = [("axis", a.id, b.id), *((axis, str(x), str(y)) for axis, (x, y) in pairs.items())]
    out.data(*out.table(rows) if pairs else [f"{a.id} and {b.id} are the same plan"])
    out.emit("plans.diff", {"plans": [a.id, b.id], "differences": {axis: list(pair) for axis, pair in pairs.items()}})
