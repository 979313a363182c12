"""The techniques from the literature that plans use or will use: which paper, which group, what state, where here.

The table is techniques.json beside this file. Equality says what running a technique must equal: E the serial
reference; E/D greedy equal, sampled equal in distribution; E/S an exact mode and a lossy one; S changes results by
design; N no numeric equality applies. Tier A is a plan axis or an ability of the executor, B a natural axis, kernel,
family or workload, C a small workload or decoding mode, D nothing to run but what may honestly be taken.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path

from autotune.spec.errors import UsageError, nearest_name

STATES = ("works", "planned")
TABLE = Path(__file__).with_name("techniques.json")


@dataclass(frozen=True)
class Technique:
    """One paper's technique. `where` names the axis and the files that it is in; "" while it is planned."""

    id: str  # S001 to S170
    name: str
    group: str
    tier: str  # A | B | C | D
    equality: str
    state: str
    where: str

    def to_dict(self) -> dict[str, str]:
        return asdict(self)


@lru_cache(maxsize=1)
def techniques() -> tuple[Technique, ...]:
    """Every technique, by id."""
    return tuple(Technique(**row) for row in json.loads(TABLE.read_text(encoding="utf-8")))


def listed(group: str = "", state: str = "") -> Sequence[Technique]:
    """Those of a group and in a state ("": any). Raises UsageError for a group or state that there is not."""
    groups = sorted({row.group for row in techniques()})
    for flag, value, known in (("--group", group, groups), ("--state", state, STATES)):
        if value and value not in known:
            near = nearest_name(value, known)
            hint = f"did you mean {near}?" if near else "one of " + "; ".join(known)
            raise UsageError(f"{flag}: found {value!r}, which there is not", hint=hint)
    return [row for row in techniques() if group in ("", row.group) and state in ("", row.state)]


def find(text: str) -> Technique:
    """The technique with this id, or whose name is or uniquely contains `text`, whatever the case.

    Raises UsageError with the nearest name, or with those that fit where several do.
    """
    wanted = text.strip().lower()
    rows = techniques()
    if re.fullmatch(r"s?\d{1,3}", wanted):
        wanted = f"s{int(wanted.lstrip('s')):03d}"
    exact = [row for row in rows if wanted in (row.id.lower(), row.name.lower())]
    within = exact or [row for row in rows if wanted and wanted in row.name.lower()]
    if len(within) == 1:
        return within[0]
    if within:
        raise UsageError(f"{text}: found several techniques", hint=", ".join(f"{r.id} {r.name}" for r in within[:8]))
    near = nearest_name(wanted, [row.name.lower() for row in rows])
    row = next((row for row in rows if row.name.lower() == near), None)
    raise UsageError(
        f"{text}: found no such technique; expected S001 to S170 or a name",
        hint=f"did you mean {row.id} {row.name}?" if row else "`autotune techniques` lists them",
    )
