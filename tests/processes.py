"""Other processes as a test sees them: who started whom, what still runs."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


def wait_for(condition: Callable[[], Any], seconds: float = 30.0) -> Any:
    """What `condition` says once it is true of something."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if found := condition():
            return found
        time.sleep(0.02)
    raise AssertionError(f"nothing happened in {seconds} s")


def started_by(process: int) -> dict[int, list[str]]:
    """Every process below `process`: id to command line."""
    parents: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except (OSError, IndexError):
                continue
    found, front = {}, {process}
    while front := {child for child, parent in parents.items() if parent in front}:
        for child in front:
            try:
                found[child] = Path(f"/proc/{child}/cmdline").read_text().split("\0")
            except OSError:
                continue
    return found


def gone(process: int) -> bool:
    """Whether it has ended; one that only waits to be collected has."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def threads(process: int) -> int:
    """How many it has."""
    return len(list(Path(f"/proc/{process}/task").iterdir()))
