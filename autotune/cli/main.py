"""The `autotune` command: its commands, and how errors become messages and exit codes.

No module here may import torch, SQLAlchemy, Optuna or pydantic at its top: `autotune --help` has 0.3 s.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence
from typing import Annotated, NoReturn

import typer

from autotune import __version__
from autotune.cli import _output as out
from autotune.cli import _settings as settings
from autotune.cli import (
    db,
    doctor,
    explain,
    export,
    gate,
    plans,
    plot,
    profile,
    recipe,
    report,
    run,
    search,
    simulate,
    techniques,
    validate,
)
from autotune.spec.errors import AutotuneError, UsageError

BUG = "this is a bug in autotune: please report it with the lines above"
INTERRUPTED = 130

app = typer.Typer(
    name="autotune",
    help="Finds, runs, proves and keeps the fastest plan for training or serving a transformer.",
    epilog="Start with: autotune profile --quick; autotune search RECIPE; autotune run RECIPE",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
GROUPS = {"recipe": recipe.group, "plans": plans.group, "db": db.group}
for register in (
    profile.add,
    search.add,
    run.add,
    simulate.add,
    explain.add,
    plot.add,
    report.add,
    gate.add,
    export.add,
    validate.add,
):
    register(app)
for name in ("plans", "recipe"):
    app.add_typer(GROUPS[name], name=name)
techniques.add(app)
app.add_typer(GROUPS["db"], name="db")
doctor.add(app)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"autotune {__version__}")
        raise typer.Exit


@app.callback()
def options(
    db: settings.Db = None,
    as_json: settings.Json = False,
    quiet: settings.Quiet = False,
    verbose: settings.Verbose = False,
    no_color: settings.NoColor = False,
    debug: settings.Debug = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="The version, and no more.")
    ] = False,
) -> None:
    """Finds, runs, proves and keeps the fastest plan for training or serving a transformer."""
    settings.begin(db=db, as_json=as_json, quiet=quiet, verbose=verbose, no_color=no_color, debug=debug)


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and exit with the code of autotune.spec.errors."""
    _leave(_run(arguments))


def _run(arguments: Sequence[str] | None) -> int:
    """The exit code of the command that `arguments` name; what went wrong is said."""
    try:
        app(args=arguments, prog_name="autotune")
    except SystemExit as end:  # how typer ends: always
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except AutotuneError as error:
        if settings.current().debug:
            traceback.print_exc()
        hint = error.hint or (
            "--help lists the options" if isinstance(error, UsageError) and not error.problems else None
        )
        out.fail(str(error), hint)
        return error.exit_code
    except KeyboardInterrupt:
        out.say("interrupted")
        return INTERRUPTED
    except Exception:
        traceback.print_exc()
        out.fail(BUG)
        return 1
    return 0


def _leave(code: int) -> NoReturn:
    """End with `code`: at once where this process was a worker of a world, as gloo's threads may abort Python's way."""
    world = sys.modules.get("autotune.runners.world")
    if world is not None and "autotune.runners.worker" in sys.modules and world.world_here() is not None:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


if __name__ == "__main__":
    main()
