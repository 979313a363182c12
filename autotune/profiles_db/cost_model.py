"""The versions of the cost model and of the executor: digests of the source that predicts and of that which runs.

Nobody has to remember to raise a number: whatever changes a prediction changes a file of `spec` or `planners`, so a
stored prediction is reused by exactly the code that made it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

import autotune
from autotune.profiles_db.basis import Versions

FOLDERS = ("spec", "planners")
EXECUTOR = ("runners", "kernels")  # what a plan is measured with


@cache
def cost_model_version() -> str:
    """The version of what predicts."""
    return _version(FOLDERS)


@cache
def executor_version() -> str:
    """The version of what runs a plan."""
    return _version(EXECUTOR)


def _version(folders: Sequence[str]) -> str:
    """The first 12 digits of the sha256 over the names and contents of those folders' Python files."""
    root = Path(autotune.__file__).parent
    sum_ = hashlib.sha256()
    for file in sorted(path for folder in folders for path in (root / folder).rglob("*.py")):
        sum_.update(f"{file.relative_to(root).as_posix()}\0".encode())
        sum_.update(file.read_bytes())
        sum_.update(b"\0")
    return sum_.hexdigest()[:12]


def installed(libraries: Mapping[str, str] | None = None) -> Versions:
    """The versions that an answer of this source depends on; `libraries` are those of a machine at hand, None: of one
    that is not."""
    own = {"executor": executor_version()} if libraries is not None else {}
    others = {key: value for key, value in (libraries or {}).items() if key != "autotune"}
    return Versions(autotune.__version__, cost_model_version(), others | own)
