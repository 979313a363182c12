"""A model's config.json as it lies on disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from autotune.spec.errors import Problem, UsageError, nearest_name


def config_file(path: str | Path) -> Path:
    """The file itself, or the config.json in a folder."""
    return Path(path) / "config.json" if Path(path).is_dir() else Path(path)


def read_config(file: Path) -> Any:
    """The content of a config.json.

    Raises UsageError: no such file (with the nearest name beside it), or not JSON (with line and column).
    """
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        beside = sorted(p.name for p in file.parent.glob("*.json")) if file.parent.is_dir() else []
        expected = "a Hugging Face config.json" if file.parent.is_dir() else f"a folder {file.parent}"
        problem = Problem(str(file), "", "no such file", expected, nearest_name(file.name, beside))
        raise UsageError(f"{file}: no such model config", problems=[problem]) from None
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise UsageError(f"{file}: not JSON at {where}: {error.msg}") from None
    except (OSError, UnicodeDecodeError, RecursionError) as error:
        raise UsageError(f"{file}: cannot be read as a JSON file: {error}") from None
