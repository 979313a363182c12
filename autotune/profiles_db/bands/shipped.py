"""The residuals that ship with the package: `residuals.json` beside the machine profiles, each set with its source.

The file holds what was predicted and measured, not the residuals, so that each row can be held against its source.
`python -m autotune.runners.residual_sets` makes it again.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from autotune.profiles_db.bands.pools import SHIPPED
from autotune.spec.band import Residual, residual
from autotune.spec.validation import row_name

SCHEMA = "autotune.residuals/1"
FILE = Path(__file__).parent / "residuals.json"


@cache
def shipped() -> tuple[Residual, ...]:
    """Every residual of the file, in its order. Raises ValueError for a file of another version."""
    raw = json.loads(FILE.read_text())
    if raw["schema"] != SCHEMA:
        raise ValueError(f"{FILE.name}: found the schema {raw['schema']!r}; expected {SCHEMA}")
    return tuple(one for group in raw["sets"] for one in of_set(group))


def of_set(group: Mapping[str, Any]) -> Iterator[Residual]:
    """The residuals of one set: rows of `[setup, name, metric, predicted, measured]`."""
    for setup, name, metric, predicted, measured in group["rows"]:
        found = residual(
            metric,
            predicted,
            measured,
            grade=group["peaks" if metric.startswith("peak") else "grade"],
            device=group["device"],
            workload=group["workload"],
            row=row_name(group["table"], setup, name),
            origin=SHIPPED,
        )
        if found is None:
            raise ValueError(f"{FILE.name}: {group['table']}, {name}: {metric} of {predicted} and {measured}")
        yield found
