"""An explanation: sections of plain lines for people, each with the figures behind them for programs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

SCHEMA = "autotune.explain/1"


@dataclass(frozen=True)
class Section:
    """`key` names it in JSON, `title` on the terminal; `facts` are JSON values in seconds, bytes and shares."""

    key: str
    title: str
    text: tuple[str, ...]
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Explanation:
    subject: str
    sections: tuple[Section, ...]

    def lines(self) -> list[str]:
        """Plain text: the subject, then each section with its lines indented; no colour, no markup."""
        result = [self.subject]
        for section in self.sections:
            result += ["", section.title, *(f"  {line}" for line in section.text)]
        return result

    def to_dict(self) -> dict[str, Any]:
        """`{"schema", "subject", <section key>: facts, ...}`."""
        return {"schema": SCHEMA, "subject": self.subject, **{s.key: dict(s.facts) for s in self.sections}}


def table(rows: Sequence[tuple[str, ...]]) -> tuple[str, ...]:
    """Rows in columns: the first to the left, the others to the right."""
    if not rows:
        return ()
    widths = [max(len(row[k]) for row in rows) for k in range(len(rows[0]))]
    return tuple(
        "  ".join(
            cell.ljust(w) if k == 0 else cell.rjust(w) for k, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    )
