"""The rows of a suite, kept after each of them: what ends a process costs the row at hand and no other."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Row = dict[str, Any]
ENDED = "its processes ended"


@dataclass
class Ledger:
    """`rows` in the order in which they were begun. They go to a file, or to whatever `keep` is (the plan database);
    without either they are kept in memory alone."""

    file: Path | None = None
    rows: list[Row] = field(default_factory=list)
    keep: Callable[[Sequence[Row]], None] | None = None

    @classmethod
    def resume(cls, file: Path) -> Ledger:
        """The ledger that an earlier attempt left in `file`, or an empty one."""
        return cls(file, json.loads(file.read_text()) if file.exists() else [])

    def row(self, plan: str) -> Row | None:
        """What is known of `plan`, finished or not."""
        return next((row for row in self.rows if row["plan"] == plan), None)

    def begin(self, plan: str) -> Row:
        """The row of `plan`, a new one at its first visit, that says so should nothing more come."""
        row = self.row(plan)
        if row is None:
            row = {"plan": plan, "predictions": [], "steps": [], "medians": []}
            self.rows.append(row)
        row["failed"] = ENDED
        self.save()
        return row

    def unfinished(self) -> Row | None:
        """The row that was at hand where its processes ended before it was known."""
        return next((row for row in self.rows if row.get("failed") == ENDED), None)

    def again(self) -> None:
        """Forget that the row at hand was not ended: whoever interrupted it wants it visited once more."""
        for row in self.rows:
            if row.get("failed") == ENDED:
                del row["failed"]

    def save(self) -> None:
        if self.keep is not None:
            self.keep(self.rows)
        if self.file is None:
            return
        part = self.file.with_name(self.file.name + ".part")
        part.write_text(json.dumps(self.rows, indent=1))
        part.replace(self.file)
