"""Arguments and options that several commands share, so that they read alike everywhere."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Recipe = Annotated[str, typer.Argument(metavar="RECIPE", help="A recipe (TOML); - reads standard input.")]
Target = Annotated[
    str,
    typer.Argument(metavar="RECIPE|LOCK|PLAN", help="A recipe (its lock is used), a lock, or a stored plan's id."),
]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override a recipe's key, e.g. search.tensor=2; repeatable."),
]
Pins = Annotated[
    list[str] | None,
    typer.Option(
        "--pin",
        metavar="AXIS=VALUE",
        help="Take this plan, not the locked one; repeatable. Other axes are as by default, data fills the devices.",
    ),
]
Order = Annotated[
    Path | None,
    typer.Option("--order", metavar="FILE", help="Take this pipeline order: one line a rank, like 0F0 0F1 0BW0 0BW1."),
]
Limit = Annotated[int, typer.Option("--limit", min=1, metavar="N", help="How many to list.")]
