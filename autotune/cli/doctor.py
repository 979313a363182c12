"""`autotune doctor`: whether everything that commands need is here."""

from __future__ import annotations

import typer

from autotune.cli import _output as out
from autotune.cli._settings import command
from autotune.spec.errors import EnvironmentFault


def add(app: typer.Typer) -> None:
    command(app)(doctor)


def doctor() -> None:
    """Check that everything is ready.

    Versions, devices, the plan database, this machine's profile, the default corpus; exit 4 if one fails.
    """
    from autotune.cli._checkup import checks

    found = list(checks())
    rows = [("ok" if c.ok else "FAIL", c.name, c.found) for c in found]
    out.data(*out.table(rows))
    for check in found:
        if check.hint:
            out.say(f"{check.name}: {check.hint}")
    out.emit("doctor", {"checks": [{"name": c.name, "ok": c.ok, "found": c.found, "hint": c.hint} for c in found]})
    failed = [check.name for check in found if not check.ok]
    if failed:
        raise EnvironmentFault(f"not ready: {', '.join(failed)}")
