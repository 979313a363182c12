"""The version of the cost model: a digest of the source that predictions come from.

Nobody has to remember to raise a number: whatever changes a prediction changes a file of `spec` or `planners`, so a
stored prediction is reused by exactly the code that made it.
"""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path

import autotune

FOLDERS = ("spec", "planners")


@cache
def cost_model_version() -> str:
    """The first 12 digits of the sha256 over the names and contents of those folders' Python files."""
    root = Path(autotune.__file__).parent
    sum_ = hashlib.sha256()
    for file in sorted(path for folder in FOLDERS for path in (root / folder).rglob("*.py")):
        sum_.update(f"{file.relative_to(root).as_posix()}\0".encode())
        sum_.update(file.read_bytes())
        sum_.update(b"\0")
    return sum_.hexdigest()[:12]
