"""`autotune recipe`: makes, checks and shows recipes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from autotune.cli import _arguments as arguments
from autotune.cli import _output as out
from autotune.cli._session import read_recipe
from autotune.cli._settings import command

group = typer.Typer(help="Recipes: make, check, show.", no_args_is_help=True, rich_markup_mode=None)


@command(group)
def new(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The recipe to write (.toml); never overwritten.")],
    config: Annotated[
        Path | None, typer.Option("--config", metavar="FILE", help="A Hugging Face config.json; a small model without.")
    ] = None,
    kind: Annotated[str, typer.Option("--kind", metavar="train|generate", help="The workload.")] = "train",
    use: Annotated[str, typer.Option("--machine", metavar="NAME", help="this, a profile's name or file.")] = "this",
    devices: Annotated[int, typer.Option("--devices", min=1, metavar="N", help="Devices the plan may use.")] = 1,
) -> None:
    """Write a commented recipe to start from."""
    from autotune.cli._scaffold import write_recipe

    write_recipe(file, config, kind, use, devices)
    read_recipe(str(file), [])
    out.data(str(file))
    out.emit("recipe.new", {"file": str(file)})
    out.say(f"next: autotune search {file}")


@command(group)
def check(recipe: arguments.Recipe, overrides: arguments.Overrides = None) -> None:
    """Check a recipe, its model and its files.

    Every problem at once, exit 2 if there is one.
    """
    asked = read_recipe(recipe, overrides or [])
    model = asked.model()
    out.data(f"{recipe}: ok ({asked.kind}, {model.name}: {model.architecture}, {model.layers} layers)")
    out.emit("recipe.check", {"recipe": recipe, "digest": asked.digest, "model": model.name, "kind": asked.kind})


@command(group)
def schema() -> None:
    """Print the JSON schema of recipes.

    For editors: with Taplo, `#:schema FILE` on a recipe's first line.
    """
    import json

    from autotune.spec.recipe import json_schema

    print(json.dumps(json_schema(), indent=1))


@command(group)
def show(recipe: arguments.Recipe, overrides: arguments.Overrides = None) -> None:
    """Show a recipe merged.

    The file, AUTOTUNE_* variables and --set flags, with every default.
    """
    from autotune.cli._scaffold import as_toml

    asked = read_recipe(recipe, overrides or [])
    out.data(*as_toml(asked.merged()))
    out.emit("recipe.show", {"recipe": recipe, "digest": asked.digest, "merged": asked.merged()})
