"""`autotune db`: the plan database itself."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from autotune.cli import _output as out
from autotune.cli._session import opened
from autotune.cli._settings import command

group = typer.Typer(help="The plan database: info, migrate, export.", no_args_is_help=True, rich_markup_mode=None)


@command(group)
def info() -> None:
    """Say where it is and what is in it."""
    with opened(create=False) as store:
        found = store.info()
        out.data(
            f"database   {found.shown}",
            f"version    {found.version} (this autotune: {found.supported}), {found.dialect} {found.journal_mode}",
            f"size       {found.size / 2**20:.1f} MiB, and {found.files} files of {found.files_size / 2**20:.1f} MiB",
        )
        out.data(*out.table([(f"  {table}", str(rows)) for table, rows in sorted(found.counts.items())], right=(1,)))
        out.emit(
            "db.info",
            {
                "db": found.shown,
                "version": found.version,
                "supported": found.supported,
                "dialect": found.dialect,
                "journal_mode": found.journal_mode,
                "size": found.size,
                "files": found.files,
                "files_size": found.files_size,
                "counts": dict(found.counts),
            },
        )


@command(group)
def migrate() -> None:
    """Bring it to this version.

    The old file is copied first.
    """
    with opened(create=False) as store:
        moved = store.migrated
        before, after = (moved.before, moved.after) if moved else (0, 0)
        backup = str(moved.backup) if moved and moved.backup else None
        same = "is up to date" if before == after else f"went from version {before} to {after}"
        out.data(f"{store.place.shown} {same}" + (f"; the old file is {backup}" if backup else ""))
        out.emit("db.migrate", {"db": store.place.shown, "before": before, "after": after, "backup": backup})


@command(group)
def export(
    target: Annotated[Path, typer.Argument(metavar="TARGET", help="A file, or a folder for csv; never overwritten.")],
    form: Annotated[str, typer.Option("--to", metavar="json|csv|sqlite|optuna", help="The form.")] = "json",
    search: Annotated[str, typer.Option("--search", metavar="ID", help="For optuna: which search; the last one.")] = "",
) -> None:
    """Write a copy for other tools.

    Everything as json, csv or sqlite; optuna: one search as studies for optuna-dashboard.
    """
    with opened(create=False) as store:
        if form == "optuna":
            studies = store.export_optuna(target, search)
            out.data(f"{target}: {', '.join(studies)}")
        else:
            studies = []
            out.data(str(store.export(form, target)))
        out.emit("db.export", {"target": str(target), "form": form, "studies": studies})
