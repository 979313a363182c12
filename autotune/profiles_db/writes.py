"""Everything that adds to the plan database, as functions of a session whose transaction the caller owns."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import Table, func, insert, select, update
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.orm import Session

from autotune.profiles_db import tables as t
from autotune.profiles_db.basis import Versions
from autotune.profiles_db.profile_file import profile_digest, to_dict
from autotune.profiles_db.records import plain, prediction_body
from autotune.spec.digest import digest
from autotune.spec.errors import UsageError
from autotune.spec.lock import Launch
from autotune.spec.machine import Profile
from autotune.spec.model import ModelSpec
from autotune.spec.plan import Plan
from autotune.spec.prediction import Found, Prediction, Question
from autotune.spec.workload import Acceptance, Workload

STATES = ("running", "finished", "failed", "interrupted")


def now() -> str:
    """This moment as ISO-8601 UTC text with microseconds, so that text order is time order."""
    return datetime.now(UTC).isoformat(timespec="microseconds")


def clean(text: str) -> str:
    """Text that every database can hold: undecodable bytes of file names and NULs become `?`."""
    return text.encode("utf-8", "replace").decode("utf-8").replace("\0", "?")


def put(session: Session, cls: type[t.Base], rows: Sequence[Mapping[str, Any]], overwrite: Sequence[str] = ()) -> None:
    """Insert the rows whose primary key is new; of those that exist, set the columns `overwrite`."""
    if not rows:
        return
    table = cls.__table__
    assert isinstance(table, Table)
    keys = [column.name for column in table.primary_key]
    connection = session.connection()
    if connection.dialect.name in ("sqlite", "postgresql"):
        upsert = (sqlite.insert if connection.dialect.name == "sqlite" else postgresql.insert)(table)
        if overwrite:
            upsert = upsert.on_conflict_do_update(
                index_elements=keys, set_={name: upsert.excluded[name] for name in overwrite}
            )
        else:
            upsert = upsert.on_conflict_do_nothing(index_elements=keys)
        connection.execute(upsert, list(rows))
        return
    for row in rows:  # other servers spell this differently: ask first
        match = [table.c[name] == row[name] for name in keys]
        if connection.execute(select(func.count()).select_from(table).where(*match)).scalar_one() == 0:
            connection.execute(insert(table), dict(row))
        elif overwrite:
            connection.execute(update(table).where(*match).values({name: row[name] for name in overwrite}))


def save_machine(session: Session, fingerprint: str, name: str, facts: Mapping[str, Any]) -> None:
    """Remember a machine; new facts replace old ones, and no facts leave what is known."""
    row = {"fingerprint": clean(fingerprint), "name": clean(name), "facts": dict(facts), "created": now()}
    put(session, t.Machine, [row], ("name", "facts") if facts else ())


def save_profile(session: Session, profile: Profile) -> str:
    body = to_dict(profile)
    name = profile_digest(profile)
    # A profile of no machine at hand, as those of datasheets, may have no fingerprint: its name stands for it.
    machine = profile.fingerprint or f"profile:{profile.name}"
    save_machine(session, machine, profile.device.name, {k: body[k] for k in ("device", "host", "links", "software")})
    row = {
        "digest": name,
        "machine": clean(machine),
        "name": clean(profile.name),
        "grade": profile.grade,
        "created": profile.created,
        "saved": now(),
        "body": body,
    }
    put(session, t.ProfileRow, [row], ("saved",))
    return name


def save_model(session: Session, model: ModelSpec) -> str:
    put(session, t.Model, [{"digest": model.digest, "name": clean(model.name), "spec": plain(model)}])
    return model.digest


def save_acceptance(
    session: Session, conditions: str, model: ModelSpec, found: Acceptance, facts: Mapping[str, Any]
) -> None:
    row: dict[str, Any] = {"conditions": conditions, "strategy": found.key, "model": save_model(session, model)}
    row |= {
        "rates": list(found.rates),
        "traces": [list(trace) for trace in found.traces],
        "ranks": list(found.ranks),
        "facts": dict(facts),
        "created": now(),
    }
    put(session, t.AcceptanceRow, [row], ("rates", "traces", "ranks", "facts", "created"))


def save_workload(session: Session, workload: Workload) -> str:
    put(session, t.WorkloadRow, [{"digest": workload.digest, "kind": workload.kind, "spec": plain(workload)}])
    return workload.digest


def save_recipe(session: Session, path: str, merged: Mapping[str, Any]) -> str:
    name = digest(dict(merged))
    put(session, t.Recipe, [{"digest": name, "path": clean(path), "merged": dict(merged)}], ("path",))
    return name


def save_plans(session: Session, plans: Sequence[Plan]) -> list[str]:
    """Remember the plans; their full digests, in order."""
    moment = now()
    rows = [{"digest": plan.digest, "axes": plan.to_dict(), "created": moment} for plan in plans]
    put(session, t.PlanRow, [row | {"id": str(row["digest"])[:10]} for row in rows])
    return [str(row["digest"]) for row in rows]


def summary(question: Question, profile: str) -> dict[str, Any]:
    """What a question asks of which model, workload, profile (its digest) and devices: no budget."""
    return {
        "model": question.model.digest,
        "workload": question.workload.digest,
        "profile": profile,
        "devices": question.devices,
        "axes": {axis: list(values) for axis, values in question.axes.items()},
        "minimize": question.minimize,
        "memory_fraction": question.memory_fraction,
        "seed": question.seed,
    }


def named(question: Question, profile: str, versions: Versions) -> dict[str, Any]:
    """What names a search: everything that its answers depend on."""
    return summary(question, profile) | versions.to_dict()


def start_search(session: Session, question: Question, versions: Versions) -> str:
    """Begin or resume the search that `question` names under these versions; its digest."""
    profile = save_profile(session, question.profile)
    asked = named(question, profile, versions)
    name, moment = digest(asked), now()
    row = {
        "digest": name,
        "model": save_model(session, question.model),
        "workload": save_workload(session, question.workload),
        "profile": profile,
        "devices": question.devices,
        "question": asked,
        "state": "running",
        "started": moment,
        "updated": moment,
        "result": None,
    }
    put(session, t.Search, [row], ("state", "updated"))
    return name


def finish_search(
    session: Session, search: str, found: Found | None, recipe: str = "", launches: Sequence[Launch] = ()
) -> str:
    """Close a search with its answer; None: it was interrupted before it had one. When it was."""
    row = searched(session, search)
    row.updated = now()
    row.state = "finished" if found and found.finished and found.whole else "interrupted"
    if found:
        row.result = {
            "ranking": [{"plan": p.plan.id, "step_s": p.step_s} for p in found.ranking[:20]],
            "bound": plain(found.bound),
            "space": {
                "structures": found.space.structures,
                "feasible": found.space.feasible,
                "unseen": found.space.unseen,
                "infeasible": dict(found.space.infeasible),
            },
            "bounded": found.bounded,
            "simulated": found.simulated,
            "measured": dict(found.measured),
            "measure": found.question.measure_budget,
            "launches": [launch.to_dict() for launch in launches],
            "recipe": clean(recipe),
        }
    return row.updated


def searched(session: Session, search: str) -> t.Search:
    """The row of a search that start_search named."""
    row = session.get(t.Search, search)
    if row is None:
        raise UsageError(f"{search}: no such search in this plan database", hint="start_search gives its digest")
    return row


def context(search: t.Search, cost_model: str) -> dict[str, Any]:
    """The row of the context that this search's predictions hold for under `cost_model`."""
    parts = {
        "model": search.model,
        "workload": search.workload,
        "profile": search.profile,
        "devices": search.devices,
        "cost_model": cost_model,
    }
    return parts | {"digest": digest(parts), "updated": now()}


def remember_predictions(session: Session, search: str, predictions: Sequence[Prediction], cost_model: str) -> None:
    """Add a batch of predictions to a search; one of the same plan under the same cost model replaces the old one."""
    row = searched(session, search)
    where = context(row, cost_model)
    put(session, t.Context, [where], ("updated",))
    names = save_plans(session, [p.plan for p in predictions])
    moment = now()
    stored = [
        {
            "context": where["digest"],
            "plan": name,
            "step_s": p.step_s,
            "created": moment,
            "peak_bytes": list(p.peak_bytes),
            "body": prediction_body(p),
        }
        for name, p in zip(names, predictions, strict=True)
    ]
    put(session, t.PredictionRow, stored, ("step_s", "created", "peak_bytes", "body"))
    trials = [
        {"search": search, "plan": name, "kind": "predicted", "number": 0, "value": p.step_s, "created": moment}
        for name, p in zip(names, predictions, strict=True)
    ]
    put(session, t.Trial, trials, ("value", "created"))
    row.updated = moment


def remember_measured(session: Session, search: str, plan: Plan, seconds: float) -> int:
    """Add one measurement; its number among this plan's, from 1."""
    row = searched(session, search)
    (name,) = save_plans(session, [plan])
    mine = (t.Trial.search == search, t.Trial.plan == name, t.Trial.kind == "measured")
    number = (session.scalar(select(func.max(t.Trial.number)).where(*mine)) or 0) + 1
    moment = now()
    session.add(t.Trial(search=search, plan=name, kind="measured", number=number, value=seconds, created=moment))
    row.updated = moment
    return number


def start_run(session: Session, row: Mapping[str, Any]) -> str:
    """Add a run with status running under a new random id of ten hexadecimal digits."""
    name = secrets.token_hex(5)
    session.add(t.Run(id=name, status="running", started=now(), **row))
    return name


def running(session: Session, run: str) -> t.Run:
    """The row of a run that start_run named."""
    row = session.get(t.Run, run)
    if row is None:
        raise UsageError(f"{run}: no such run in this plan database", hint="start_run gives its id")
    return row


def add_launch(session: Session, run: str, steps: Sequence[float], log_dir: str, started: str) -> int:
    """Add a launch with all its step seconds; its number, from 0."""
    running(session, run)
    last = session.scalar(select(func.max(t.Launch.number)).where(t.Launch.run == run))
    number = 0 if last is None else last + 1
    session.add(t.Launch(run=run, number=number, started=started or now(), log_dir=clean(log_dir)))
    session.flush()  # steps refer to it
    put(
        session,
        t.Step,
        [{"run": run, "launch": number, "number": i, "seconds": float(s)} for i, s in enumerate(steps)],
    )
    return number
