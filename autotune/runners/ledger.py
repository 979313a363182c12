"""The rows of a suite, on disk after each of them: what ends a process costs the row at hand and no other."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Row = dict[str, Any]
ENDED = "its processes ended"


@dataclass
class Ledger:
    """`rows` in the order in which they were begun; without a file they are kept in memory alone."""

    file: Path | None = None
    rows: list[Row] = field(default_factory=list)

    @classmethod
    def resume(cls, file: Path) -> Ledger:
        """The ledger that an earlier attempt left in `file`, or an empty one."""
        return cls(file, json.loads(file.read_text()) if file.exists() else [])

    def names(self) -> set[str]:
        """The plans that have a row, finished or not."""
        return {str(row["plan"]) for row in self.rows}

    def begin(self, plan: str) -> Row:
        """A row for `plan`, that says so should nothing more come."""
        row: Row = {"plan": plan, "failed": ENDED}
        self.rows.append(row)
        self.save()
        return row

    def unfinished(self) -> Row | None:
        """The row that was begun last, where its processes ended before it was known."""
        return self.rows[-1] if self.rows and self.rows[-1].get("failed") == ENDED else None

    def save(self) -> None:
        if self.file is None:
            return
        part = self.file.with_name(self.file.name + ".part")
        part.write_text(json.dumps(self.rows, indent=1))
        part.replace(self.file)
