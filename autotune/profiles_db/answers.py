"""Answers that searches left in the plan database: given again where nothing that they rest on has changed.

A search is named by a digest of all that its answer depends on (`writes.named`), so that the same question finds its
row. Where there is none, or its answer is not whole, the nearest search of the same recipe says what has changed since.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from autotune.profiles_db.basis import Basis, Change, ProfileFacts, Versions, changes
from autotune.profiles_db.database import Database
from autotune.profiles_db.profile_file import profile_digest
from autotune.profiles_db.records import plain, plan_from, prediction_from
from autotune.spec.digest import canonical, digest
from autotune.spec.lock import Launch
from autotune.spec.prediction import Bound, Found, Question, Space

if TYPE_CHECKING:
    from sqlalchemy.orm import Session

    from autotune.profiles_db.tables import Search

FINISHED = "finished"
NEAR = 10  # searches of a recipe among which the nearest is looked for


@dataclass(frozen=True)
class Stored:
    """A whole answer: what was found, when (ISO-8601 UTC), and the launches of the best plan where it was measured."""

    found: Found
    search: str
    searched: str
    launches: tuple[Launch, ...]


@dataclass(frozen=True)
class Before:
    """What the database knows of a question that is asked again.

    `answer`: the whole answer, where it still holds. Else `since` is when the search of this recipe that is nearest was
    last touched ("": there is none) and `changed` what its answer would have to be the same in; nothing changed where
    that very search ended early and goes on.
    """

    answer: Stored | None = None
    since: str = ""
    changed: tuple[Change, ...] = ()


class Answers(Database):
    """The methods of an open database that answer again what was answered before."""

    def before(self, question: Question, versions: Versions, recipe: str) -> Before:
        """What is known of `question`, asked by the recipe of this name with software of these versions."""
        from autotune.profiles_db import tables, writes

        profile = profile_digest(question.profile)
        asked = writes.named(question, profile, versions)
        new = _basis_of(question, profile, asked)
        with self._reading() as session:
            row = session.get(tables.Search, digest(asked))
            if row is not None and row.state != FINISHED:
                return Before(since=row.updated)
            rows = [row] if row is not None else _last(session, recipe, asked["model"])
            differ = [(changes(_basis(session, one), new), one) for one in rows]
            if not differ:
                return Before()
            found, nearest = min(differ, key=lambda pair: len(pair[0]))  # the newest of those that are as near
            answer = None if found else _stored(session, nearest, question, versions)
            return Before(answer, nearest.updated, found)

    def asked(self, question: Question) -> str | None:
        """The digest of the last search that asked this, with whatever versions; None: nobody has."""
        from sqlalchemy import select

        from autotune.profiles_db import tables, writes

        row = tables.Search
        wanted = _as_kept(writes.summary(question, profile_digest(question.profile)))
        with self._reading() as session:
            same = (row.model == wanted["model"], row.workload == wanted["workload"], row.profile == wanted["profile"])
            rows = session.execute(select(row.digest, row.question).where(*same).order_by(row.updated.desc()))
            return next((name for name, asked in rows if asked.items() >= wanted.items()), None)


def _last(session: Session, recipe: str, model: str) -> list[Search]:
    """The last finished searches of recipes of this name, else of this model, newest first."""
    from sqlalchemy import select

    from autotune.profiles_db import tables

    row = tables.Search
    finished = select(row.digest, row.model, row.result).where(row.state == FINISHED).order_by(row.updated.desc())
    ours, alike = list[str](), list[str]()
    for name, of, result in session.execute(finished):
        if (result or {}).get("recipe") == recipe:
            ours.append(name)
        elif of == model:
            alike.append(name)
    return [session.get_one(row, name) for name in (ours or alike)[:NEAR]]


def _basis_of(question: Question, profile: str, asked: Mapping[str, Any]) -> Basis:
    """The inputs of a question as they would be stored."""
    of = question.profile
    facts = ProfileFacts(profile, of.name, of.grade, of.created, of.fingerprint, len(of.samples), dict(of.software))
    return Basis(plain(question.model), plain(question.workload), facts, _as_kept(asked), question.measure_budget)


def _as_kept(value: Mapping[str, Any]) -> dict[str, Any]:
    """As JSON gives it back: tuples are lists."""
    import json

    kept: dict[str, Any] = json.loads(canonical(value))
    return kept


def _basis(session: Session, row: Search) -> Basis:
    """The inputs of a stored search."""
    from autotune.profiles_db import tables

    profile = session.get_one(tables.ProfileRow, row.profile)
    body = profile.body
    facts = ProfileFacts(
        row.profile,
        profile.name,
        profile.grade,
        profile.created,
        str(body.get("fingerprint", "")),
        len(body.get("samples", ())),
        dict(body.get("software", {})),
    )
    return Basis(
        session.get_one(tables.Model, row.model).spec,
        session.get_one(tables.WorkloadRow, row.workload).spec,
        facts,
        row.question,
        (row.result or {}).get("measure"),
    )


def _stored(session: Session, row: Search, question: Question, versions: Versions) -> Stored | None:
    """The answer of a finished search; None where a part of it is missing, so that it is searched for again."""
    from sqlalchemy import select

    from autotune.profiles_db import tables, writes

    result = row.result or {}
    ids = [entry["plan"] for entry in result.get("ranking", ())]
    context = writes.context(row, versions.cost_model)["digest"]
    rows = session.execute(
        select(tables.PredictionRow, tables.PlanRow)
        .join(tables.PlanRow, tables.PlanRow.digest == tables.PredictionRow.plan)
        .where(tables.PredictionRow.context == context, tables.PlanRow.id.in_(ids))
    )
    known = {
        plan.id: prediction_from(plan_from(plan.axes), said.step_s, said.peak_bytes, said.body) for said, plan in rows
    }
    if not ids or known.keys() != set(ids):
        return None
    found = Found(
        question,
        tuple(known[id] for id in ids),
        Bound(**result["bound"]),
        Space(**result["space"]),
        result["bounded"],
        result["simulated"],
        result["measured"],
        finished=True,
    )
    return Stored(found, row.digest, row.updated, tuple(map(Launch.from_dict, result["launches"])))
