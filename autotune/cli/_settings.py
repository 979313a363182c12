"""The options that every command takes, before or after the command's name, and the settings they make."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Annotated, Any, TypeVar

import typer

Command = TypeVar("Command", bound=Callable[..., None])

Db = Annotated[
    str | None,
    typer.Option("--db", metavar="PATH", help="Plan database: a file or a SQLAlchemy URL (also AUTOTUNE_DB)."),
]
Json = Annotated[bool, typer.Option("--json", help="One JSON object on stdout, with its schema's name inside.")]
Quiet = Annotated[bool, typer.Option("-q", "--quiet", help="Only results and errors.")]
Verbose = Annotated[bool, typer.Option("-v", "--verbose", help="Say more on stderr.")]
NoColor = Annotated[bool, typer.Option("--no-color", help="Plain text (also NO_COLOR).")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


@dataclass(frozen=True)
class Settings:
    """What the common options say."""

    db: str | None = None
    as_json: bool = False
    quiet: bool = False
    verbose: bool = False
    no_color: bool = False
    debug: bool = False


COMMON: dict[str, tuple[Any, Any]] = {
    "db": (Db, None),
    "as_json": (Json, False),
    "quiet": (Quiet, False),
    "verbose": (Verbose, False),
    "no_color": (NoColor, False),
    "debug": (Debug, False),
}

_current = Settings()


def current() -> Settings:
    """The settings of the command that runs."""
    return _current


def begin(**given: Any) -> None:
    """Start from the options that stood before the command's name."""
    global _current
    _current = Settings(**given)


def _add(**given: Any) -> None:
    """Add the options that stood after the command's name."""
    global _current
    _current = replace(_current, **{key: value for key, value in given.items() if value})


def command(app: typer.Typer, name: str | None = None) -> Callable[[Command], Command]:
    """Register a function as a command of `app` that also takes the common options.

    The wrapper carries a signature of its own because typer reads options from signatures; the function itself stays
    an ordinary function of its own parameters.
    """

    def register(function: Command) -> Command:
        own = inspect.signature(function, eval_str=True)

        def run(**given: Any) -> None:
            _add(**{key: given.pop(key) for key in COMMON})
            function(**given)

        common = [
            inspect.Parameter(key, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=kind)
            for key, (kind, default) in COMMON.items()
        ]
        parameters = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in own.parameters.values()]
        run.__name__, run.__doc__ = function.__name__, function.__doc__
        run.__signature__ = own.replace(parameters=[*parameters, *common])  # type: ignore[attr-defined]
        run.__annotations__ = {p.name: p.annotation for p in (*parameters, *common)}
        app.command(name)(run)
        return function

    return register
