"""The layers that make a recipe: the file, then AUTOTUNE_* of the environment, then --set flags; the later wins."""

from __future__ import annotations

import copy
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from autotune.spec.errors import Problem, UsageError, nearest_name
from autotune.spec.recipe_schema import SECTIONS

PREFIX = "AUTOTUNE_"
LARGEST_FILE = 4 << 20  # bytes; a recipe is a page of text


@dataclass(frozen=True)
class Override:
    """One key set from outside the file. `origin` is what a message calls it."""

    origin: str
    key: tuple[str, ...]
    value: object


def parse_value(text: str) -> object:
    """`text` read as a TOML value (4, [1, 2], true, "x", { min = 1, max = 4 }); anything else is a string."""
    try:
        table = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:
        return text
    return table["value"] if table.keys() == {"value"} else text


def from_flags(flags: Sequence[str]) -> Iterator[Override]:
    """Overrides of `--set section.key=value`.

    Raises UsageError for a flag without `=` or without a key.
    """
    for flag in flags:
        key, equals, text = flag.partition("=")
        path = tuple(part.strip() for part in key.split("."))
        if not equals or not all(path):
            problem = Problem(f"--set {flag}", "", "no section.key=value", "for example search.tensor=2")
            raise UsageError("cannot read a --set flag", problems=[problem])
        yield Override(f"--set {key.strip()}", path, parse_value(text.strip()))


def from_environment(environ: Mapping[str, str]) -> Iterator[Override]:
    """Overrides of AUTOTUNE_SECTION_KEY=value, e.g. AUTOTUNE_SEARCH_TENSOR=2; `__` goes one table deeper.

    Variables whose first word is no section (AUTOTUNE_DB) are other settings and are left alone.
    """
    for name in sorted(environ):
        section, _, rest = name.removeprefix(PREFIX).lower().partition("_")
        if name.startswith(PREFIX) and section in SECTIONS and rest:
            yield Override(f"environment {name}", (section, *rest.split("__")), parse_value(environ[name]))


def read_toml(path: Path, shown: str) -> dict[str, Any]:
    """The table in a TOML file that must be a readable regular file of UTF-8 text.

    Raises UsageError naming the file and, for a syntax error, its place.
    """
    if not path.is_file():
        found = "a folder" if path.is_dir() else ("not a regular file" if path.exists() else "nothing")
        near = _neighbour(path)
        raise UsageError(
            "cannot read the recipe", problems=[Problem(shown, "", found, "a readable recipe (TOML) file", near)]
        )
    try:
        if path.stat().st_size > LARGEST_FILE:
            raise UsageError("cannot read the recipe", problems=[Problem(shown, "", "a huge file", "a page of TOML")])
        return parse_toml(path.read_bytes(), shown)
    except OSError as error:
        reason = error.strerror or type(error).__name__
        problem = Problem(shown, "", reason.lower(), "a readable recipe (TOML) file")
        raise UsageError("cannot read the recipe", problems=[problem]) from error


def parse_toml(content: bytes, shown: str) -> dict[str, Any]:
    """The table in `content`; UsageError with the line and column of what is not UTF-8 TOML."""
    try:
        return tomllib.loads(content.decode())
    except UnicodeDecodeError as error:
        problem = Problem(shown, f"byte {error.start}", "bytes that are not UTF-8", "UTF-8 text")
        raise UsageError("the recipe is not valid TOML", problems=[problem]) from error
    except tomllib.TOMLDecodeError as error:
        problem = Problem(shown, "", str(error), "valid TOML")
        raise UsageError("the recipe is not valid TOML", problems=[problem]) from error
    except RecursionError as error:
        problem = Problem(shown, "", "values nested too deep", "valid TOML")
        raise UsageError("the recipe is not valid TOML", problems=[problem]) from error


def _neighbour(path: Path) -> str | None:
    """The recipe in the same folder with the nearest name."""
    try:
        names = [p.name for p in path.parent.glob("*.toml")]
    except OSError:
        return None
    near = nearest_name(path.name, names)
    return str(path.parent / near) if near else None


def merge(base: Mapping[str, Any], overrides: Sequence[Override]) -> tuple[dict[str, Any], dict[str, str]]:
    """(the merged table, dotted key -> origin of the layer that set it). `base` is left as it is.

    Raises UsageError where an override goes into something that is no table.
    """
    merged: dict[str, Any] = copy.deepcopy(dict(base))
    origins: dict[str, str] = {}
    for override in overrides:
        table = merged
        for depth, part in enumerate(override.key[:-1]):
            table = table.setdefault(part, {})
            if not isinstance(table, dict):
                inner = ".".join(override.key[: depth + 1])
                problem = Problem(override.origin, inner, repr(table), "a section (a table of keys)")
                raise UsageError("an override does not fit the recipe", problems=[problem])
        table[override.key[-1]] = override.value
        for depth in range(min(2, len(override.key)), len(override.key) + 1):
            origins[".".join(override.key[:depth])] = override.origin
        # A range or list is judged as one key; problems inside a table value are its own keys'.
        if isinstance(override.value, dict):
            for key in override.value:
                origins[".".join((*override.key, str(key)))] = override.origin
    return merged, origins
