"""`autotune techniques`: which paper is where in autotune, and in what state."""

from __future__ import annotations

from typing import Annotated

import typer

from autotune.cli import _output as out
from autotune.cli._settings import command


def add(app: typer.Typer) -> None:
    command(app)(techniques)


def techniques(
    name: Annotated[str | None, typer.Argument(metavar="NAME|ID", help="One of them, e.g. S078 or gpipe.")] = None,
    group: Annotated[str | None, typer.Option("--group", metavar="GROUP", help="Only of this group.")] = None,
    state: Annotated[str | None, typer.Option("--state", metavar="works|planned", help="Only in this state.")] = None,
) -> None:
    """List techniques of the literature.

    Which papers plans can use or will: group, tier, what they must equal, state, and where they are here.
    """
    from autotune.spec.techniques import find, listed

    rows = [find(name)] if name else listed(group or "", state or "")
    if name:
        out.data(*out.table(list(rows[0].to_dict().items())))
    else:
        cells = [(row.id, row.state, row.tier, row.equality, row.group, row.name, row.where) for row in rows]
        out.data(*out.table([("id", "state", "tier", "equal", "group", "name", "where"), *cells]))
        out.say(f"{len(rows)} techniques, {sum(row.state == 'works' for row in rows)} work in this version")
    out.emit("techniques", {"techniques": [row.to_dict() for row in rows]})
