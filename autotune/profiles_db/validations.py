"""What the plan database remembers of validations: rows as they come, and the answer of those that are whole."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from autotune.profiles_db.database import Database
from autotune.spec.errors import UsageError

if TYPE_CHECKING:
    from autotune.profiles_db.tables import ValidationRow

RUNNING, FINISHED = "running", "finished"


@dataclass(frozen=True)
class ValidationEntry:
    """A validation as it is kept. Times are ISO-8601 UTC; `visits` is what an interrupted one goes on from."""

    id: str
    suite: str
    machine: str
    profile: str
    cost_model: str
    state: str
    started: str
    updated: str
    visits: tuple[Mapping[str, Any], ...]
    rows: tuple[Mapping[str, Any], ...] = ()
    summary: tuple[Mapping[str, Any], ...] = ()


class Validations(Database):
    """The methods of an open database that remember validations."""

    def begin_validation(
        self, question: str, *, suite: str, machine: str, profile: str, cost_model: str
    ) -> ValidationEntry:
        """The newest unfinished validation with this question (a digest), to go on with; else a new one."""
        from sqlalchemy import select

        from autotune.profiles_db import tables, writes

        row = tables.ValidationRow
        with self._writing() as session:
            asked = select(row).where(row.question == question, row.state == RUNNING)
            found = session.scalars(asked.order_by(row.started.desc()).limit(1)).first()
            if found is None:
                moment = writes.now()
                found = tables.ValidationRow(
                    id=secrets.token_hex(5),
                    question=question,
                    suite=suite,
                    machine=writes.clean(machine),
                    profile=writes.clean(profile),
                    cost_model=cost_model,
                    state=RUNNING,
                    started=moment,
                    updated=moment,
                    visits=[],
                )
                session.add(found)
                session.flush()
            return _entry(found)

    def keep_validation(self, id: str, visits: Sequence[Mapping[str, Any]]) -> None:
        """Remember how far it is, in place of what was known."""
        self._change(id, visits=[dict(visit) for visit in visits])

    def finish_validation(
        self, id: str, rows: Sequence[Mapping[str, Any]], summary: Sequence[Mapping[str, Any]]
    ) -> None:
        """Close it with its answer."""
        self._change(
            id, rows=[dict(row) for row in rows], summary=[dict(part) for part in summary], state=FINISHED, visits=[]
        )

    def validations(self, limit: int = 20) -> list[ValidationEntry]:
        """Validations, newest first."""
        from sqlalchemy import select

        from autotune.profiles_db import tables

        row = tables.ValidationRow
        with self._reading() as session:
            return [_entry(found) for found in session.scalars(select(row).order_by(row.started.desc()).limit(limit))]

    def _change(self, id: str, **columns: Any) -> None:
        from sqlalchemy import update

        from autotune.profiles_db import tables, writes

        row = tables.ValidationRow
        with self._writing() as session:
            changed = session.execute(update(row).where(row.id == id).values(updated=writes.now(), **columns))
            if changed.rowcount != 1:  # type: ignore[attr-defined]
                raise UsageError(f"validation: found {id!r}; expected one stored in {self.place.shown}")


def _entry(row: ValidationRow) -> ValidationEntry:
    return ValidationEntry(
        row.id,
        row.suite,
        row.machine,
        row.profile,
        row.cost_model,
        row.state,
        row.started,
        row.updated,
        tuple(row.visits),
        tuple(row.rows or ()),
        tuple(row.summary or ()),
    )
