"""Where the plan database is: a flag, the environment, this folder's `.autotune`, or the user's data folder.

Standard library only, so that asking for the place costs nothing.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

VARIABLE = "AUTOTUNE_DB"
FILE = "plans.db"


@dataclass(frozen=True)
class Place:
    """A database as SQLAlchemy opens it (`url`), as people read it (`shown`: no password), and its files' folder.

    `path` is the SQLite file; None for a server or a database in memory. `url` is empty where a plain path was given:
    a path may hold `?`, `#` and `%`, which a URL would misread.
    """

    url: str
    shown: str
    path: Path | None
    files: Path


def locate(
    flag: str | os.PathLike[str] | None = None, environ: Mapping[str, str] | None = None, folder: Path | None = None
) -> str:
    """The path or URL to open: `flag`, then $AUTOTUNE_DB, then `folder`/.autotune/plans.db where that folder exists,
    then the user's data folder. `folder` is the working directory unless told."""
    environ = os.environ if environ is None else environ
    if flag:
        return os.fspath(flag)
    if environ.get(VARIABLE):
        return environ[VARIABLE]
    local = (folder or Path.cwd()) / ".autotune"
    return str((local if local.is_dir() else data_folder(environ)) / FILE)


def data_folder(environ: Mapping[str, str]) -> Path:
    """`$XDG_DATA_HOME/autotune`; a relative value is ignored, as the XDG base directory specification asks."""
    home = environ.get("XDG_DATA_HOME", "")
    base = Path(home) if home and Path(home).is_absolute() else Path.home() / ".local" / "share"
    return base / "autotune"


def place(location: str | os.PathLike[str]) -> Place:
    """What `location` (a path, or any SQLAlchemy URL) means. Touches no disk."""
    text = os.fspath(location)
    if "://" not in text:
        path = Path(os.path.abspath(os.path.expanduser(text)))
        return Place("", str(path), path, path.with_name(f"{path.name}.files"))
    shown = re.sub(r"(://[^:/@]*):[^@]*@", r"\1:***@", text)
    if not text.startswith("sqlite"):
        return Place(text, shown, None, data_folder(os.environ) / "files")
    inside = text.split("://", 1)[1].removeprefix("/").split("?", 1)[0].removeprefix("file:")
    if not inside or inside == ":memory:":
        return Place(text, shown, None, data_folder(os.environ) / "files")
    path = Path(os.path.abspath(inside))
    return Place(text, shown, path, path.with_name(f"{path.name}.files"))
