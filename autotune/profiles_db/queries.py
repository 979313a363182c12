"""Everything that is asked of the plan database, as functions of a session; answers are records, never rows."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from statistics import median
from typing import Any

from sqlalchemy import Select, func, select
from sqlalchemy.orm import InstrumentedAttribute, Session

from autotune.profiles_db import tables as t
from autotune.profiles_db.profile_file import from_dict
from autotune.profiles_db.records import (
    Asked,
    LaunchEntry,
    Origin,
    PlanEntry,
    ProfileEntry,
    RunEntry,
    SearchEntry,
    model_from,
    plan_from,
    prediction_from,
    workload_from,
)
from autotune.profiles_db.writes import context, searched
from autotune.spec.errors import UsageError, nearest_name
from autotune.spec.machine import Profile
from autotune.spec.plan import Plan
from autotune.spec.prediction import Prediction
from autotune.spec.workload import Acceptance

CHUNK = 500  # values in one IN list: every database takes that many


def profiles(session: Session) -> list[ProfileEntry]:
    """Stored profiles, newest first."""
    rows = session.execute(
        select(
            t.ProfileRow.digest,
            t.ProfileRow.name,
            t.ProfileRow.grade,
            t.ProfileRow.machine,
            t.ProfileRow.created,
            t.ProfileRow.saved,
        ).order_by(t.ProfileRow.saved.desc())
    )
    return [ProfileEntry(*row) for row in rows]


def profile(session: Session, name: str, shown: str) -> Profile | None:
    """The newest profile with this name, machine fingerprint or digest (or at least 6 digits of it)."""
    same = (t.ProfileRow.name == name) | (t.ProfileRow.machine == name) | (t.ProfileRow.digest == name)
    if re.fullmatch(r"[0-9a-f]{6,64}", name):
        same |= t.ProfileRow.digest.between(name, name + "g")
    row = session.scalars(select(t.ProfileRow).where(same).order_by(t.ProfileRow.saved.desc()).limit(1)).first()
    return from_dict(row.body, f"{shown}: profile {row.name}") if row else None


def refined(session: Session, base: Profile, shown: str) -> Profile:
    """The newest stored profile that is `base` with further works measured, or `base`."""
    rows = session.scalars(
        select(t.ProfileRow)
        .where(t.ProfileRow.machine == base.fingerprint, t.ProfileRow.name == base.name)
        .where(t.ProfileRow.created == base.created)
        .order_by(t.ProfileRow.saved.desc())
    )
    found = (from_dict(row.body, f"{shown}: profile {row.name}") for row in rows)
    return next((profile for profile in found if profile.refines(base)), base)


def resolve(session: Session, column: InstrumentedAttribute[str], prefix: str, what: str, shown: str) -> str:
    """The one value of `column` that begins with `prefix`; UsageError with the nearest when none or several do."""
    wanted = prefix.strip().lower()
    some = select(column).order_by(column).limit(6)
    found = list(session.scalars(some.where(column.between(wanted, wanted + "g")))) if _hexadecimal(wanted) else []
    found = [value for value in found if value.startswith(wanted)]
    if len(found) == 1 or wanted in found:
        return wanted if wanted in found else found[0]
    if found:
        listed = ", ".join(value[:10] for value in found[:5]) + (", ..." if len(found) > 5 else "")
        raise UsageError(f"{prefix}: found several {what}s in {shown}: {listed}; expected one", hint="type more of it")
    near = _nearest(session, column, wanted)
    raise UsageError(
        f"{prefix}: found no such {what} in {shown}; expected the beginning of a {what}'s id",
        hint=f"nearest: {near[:10]}" if near else f"there is no {what} in it yet",
    )


def _hexadecimal(text: str) -> bool:
    return re.fullmatch(r"[0-9a-f]{1,64}", text) is not None


def _nearest(session: Session, column: InstrumentedAttribute[str], wanted: str) -> str | None:
    """The closest id by spelling among those beside `wanted` in order, or else any."""
    after = session.scalars(select(column).where(column >= wanted).order_by(column).limit(200))
    before = session.scalars(select(column).where(column < wanted).order_by(column.desc()).limit(200))
    ids = [value[: max(10, len(wanted))] for value in (*after, *before)]
    return nearest_name(wanted, ids) or (ids[0] if ids else None)


def acceptances(session: Session, conditions: str) -> tuple[Acceptance, ...]:
    rows = session.scalars(select(t.AcceptanceRow).where(t.AcceptanceRow.conditions == conditions))
    return tuple(
        Acceptance(row.strategy, tuple(row.rates), "measured", tuple(map(tuple, row.traces)), tuple(row.ranks or ()))
        for row in rows
    )


def plan(session: Session, prefix: str, shown: str) -> Plan:
    row = session.get_one(t.PlanRow, resolve(session, t.PlanRow.digest, prefix, "plan", shown))
    return plan_from(row.axes)


def origin(session: Session, prefix: str, shown: str) -> Origin:
    """The question that a plan was last predicted for, or else run for."""
    name = resolve(session, t.PlanRow.digest, prefix, "plan", shown)
    this = plan_from(session.get_one(t.PlanRow, name).axes)
    last = session.scalars(
        select(t.Context)
        .join(t.PredictionRow, t.PredictionRow.context == t.Context.digest)
        .where(t.PredictionRow.plan == name)
        .order_by(t.Context.updated.desc())
        .limit(1)
    ).first()
    run = session.scalars(select(t.Run).where(t.Run.plan == name).order_by(t.Run.started.desc()).limit(1)).first()
    source = last or run
    if source is None:
        raise UsageError(
            f"{prefix}: plan {name[:10]} of {shown} was neither predicted nor run, so it has no model and workload",
            hint="name a recipe or a lock",
        )
    model = model_from(session.get_one(t.Model, source.model).spec)
    workload = workload_from(session.get_one(t.WorkloadRow, source.workload).spec)
    return Origin(this, model, workload, last.profile if last else None, last.devices if last else this.world)


def plans(session: Session, limit: int, asked: Asked) -> list[PlanEntry]:
    """Plans by model and workload, those last predicted for first, then by predicted seconds: see Store.plans."""
    rows = session.execute(
        _listed(session, asked)
        .order_by(t.Context.updated.desc(), t.PredictionRow.step_s, t.PlanRow.digest)
        .limit(limit)
    ).all()
    seconds = _measured_seconds(session, [row[0].digest for row in rows])
    runs = _run_counts(session, [row[0].digest for row in rows])
    return [
        PlanEntry(
            plan=plan_from(stored.axes),
            id=stored.id,
            digest=stored.digest,
            created=stored.created,
            model=name,
            workload=workload.kind,
            devices=where.devices,
            predicted_s=step_s,
            peak_bytes=tuple(peak),
            measured_s=seconds.get((where.model, where.workload, stored.digest)),
            runs=runs.get((where.model, where.workload, stored.digest), 0),
        )
        for stored, step_s, peak, where, name, workload in rows
    ]


def count_plans(session: Session, asked: Asked) -> int:
    """How many entries `plans` has without a limit."""
    return session.scalars(select(func.count()).select_from(_listed(session, asked).subquery())).one()


def _listed(session: Session, asked: Asked) -> Select[Any]:
    """Plan, its prediction and what it was predicted for, for every entry that is asked for."""
    place = func.row_number().over(partition_by=t.PredictionRow.context, order_by=t.PredictionRow.step_s)
    wanted = select(t.PredictionRow.context, t.PredictionRow.plan, place.label("place"))
    if asked.search:
        mine = select(t.Trial.plan).where(t.Trial.search == asked.search)
        its = session.get_one(t.Search, asked.search)
        same = select(t.Context.digest).where(
            t.Context.model == its.model,
            t.Context.workload == its.workload,
            t.Context.profile == its.profile,
            t.Context.devices == its.devices,
        )
        wanted = wanted.where(t.PredictionRow.plan.in_(mine), t.PredictionRow.context.in_(same))
    if asked.measured:
        trials = select(t.Trial.plan).where(t.Trial.kind == "measured")
        wanted = wanted.where(t.PredictionRow.plan.in_(trials.union(select(t.Run.plan))))
    ranked = wanted.subquery()
    query = (
        select(t.PlanRow, t.PredictionRow.step_s, t.PredictionRow.peak_bytes, t.Context, t.Model.name, t.WorkloadRow)
        .select_from(ranked)
        .join(t.PlanRow, t.PlanRow.digest == ranked.c.plan)
        .join(
            t.PredictionRow,
            (t.PredictionRow.context == ranked.c.context) & (t.PredictionRow.plan == ranked.c.plan),
        )
        .join(t.Context, t.Context.digest == ranked.c.context)
        .join(t.Model, t.Model.digest == t.Context.model)
        .join(t.WorkloadRow, t.WorkloadRow.digest == t.Context.workload)
    )
    if asked.top:
        query = query.where(ranked.c.place <= asked.top)
    if asked.model:
        query = query.where((t.Model.name == asked.model) | (t.Model.digest == asked.model))
    if asked.kind:
        query = query.where(t.WorkloadRow.kind == asked.kind)
    return query


Trio = tuple[str, str, str]  # digests of model, workload and plan


def _measured_seconds(session: Session, names: Sequence[str]) -> dict[Trio, float]:
    values: dict[Trio, list[float]] = defaultdict(list)
    for part in _chunks(names):
        for model, workload, name, value in session.execute(
            select(t.Search.model, t.Search.workload, t.Trial.plan, t.Trial.value)
            .join(t.Search, t.Search.digest == t.Trial.search)
            .where(t.Trial.kind == "measured", t.Trial.plan.in_(part))
        ):
            values[model, workload, name].append(value)
    return {key: median(seconds) for key, seconds in values.items()}


def _run_counts(session: Session, names: Sequence[str]) -> dict[Trio, int]:
    counts: dict[Trio, int] = {}
    for part in _chunks(names):
        for model, workload, name, count in session.execute(
            select(t.Run.model, t.Run.workload, t.Run.plan, func.count())
            .where(t.Run.plan.in_(part))
            .group_by(t.Run.model, t.Run.workload, t.Run.plan)
        ):
            counts[model, workload, name] = count
    return counts


def _chunks(names: Sequence[str]) -> Iterable[Sequence[str]]:
    unique = list(dict.fromkeys(names))
    return (unique[i : i + CHUNK] for i in range(0, len(unique), CHUNK))


def known(session: Session, search: str, cost_model: str) -> dict[str, float]:
    """Plan id to predicted seconds for this search's context, whichever search asked."""
    where = context(searched(session, search), cost_model)["digest"]
    rows = session.execute(
        select(t.PlanRow.id, t.PredictionRow.step_s)
        .join(t.PlanRow, t.PlanRow.digest == t.PredictionRow.plan)
        .where(t.PredictionRow.context == where)
    )
    return {row[0]: row[1] for row in rows}


def predictions(session: Session, search: str, cost_model: str, limit: int) -> list[Prediction]:
    """The predictions of this search's context, fastest first."""
    where = context(searched(session, search), cost_model)["digest"]
    query = (
        select(t.PredictionRow, t.PlanRow.axes)
        .join(t.PlanRow, t.PlanRow.digest == t.PredictionRow.plan)
        .where(t.PredictionRow.context == where)
        .order_by(t.PredictionRow.step_s, t.PredictionRow.plan)
    )
    rows = session.execute(query.limit(limit) if limit else query)
    return [prediction_from(plan_from(axes), row.step_s, row.peak_bytes, row.body) for row, axes in rows]


def measured(session: Session, search: str) -> dict[str, float]:
    """Plan id to the median of the search's measured seconds."""
    searched(session, search)
    values: dict[str, list[float]] = defaultdict(list)
    for name, value in session.execute(
        select(t.PlanRow.id, t.Trial.value)
        .join(t.PlanRow, t.PlanRow.digest == t.Trial.plan)
        .where(t.Trial.search == search, t.Trial.kind == "measured")
    ):
        values[name].append(value)
    return {name: median(seconds) for name, seconds in values.items()}


def measured_alike(session: Session, search: str) -> dict[str, float]:
    """As `measured`, of every search for the same model and workload on a profile of the same machine, with the same
    libraries where this search measures with any."""
    row = searched(session, search)
    same = (t.Search.model == row.model, t.Search.workload == row.workload)
    asked = session.execute(select(t.Search.digest, t.Search.question).where(*same))
    libraries = row.question.get("libraries")
    alike = {name for name, question in asked if not libraries or question.get("libraries") == libraries}
    machine = select(t.ProfileRow.machine).where(t.ProfileRow.digest == row.profile).scalar_subquery()
    values: dict[str, list[float]] = defaultdict(list)
    for name, value, of in session.execute(
        select(t.PlanRow.id, t.Trial.value, t.Trial.search)
        .join(t.PlanRow, t.PlanRow.digest == t.Trial.plan)
        .join(t.Search, t.Search.digest == t.Trial.search)
        .join(t.ProfileRow, t.ProfileRow.digest == t.Search.profile)
        .where(t.Trial.kind == "measured", *same)
        .where(t.ProfileRow.machine == machine)
    ):
        if of in alike:
            values[name].append(value)
    return {name: median(seconds) for name, seconds in values.items()}


def searches(session: Session, limit: int, prefix: str, shown: str) -> list[SearchEntry]:
    """Searches, last touched first; `prefix` picks one."""
    query = (
        select(t.Search, t.Model.name, t.WorkloadRow.kind)
        .join(t.Model, t.Model.digest == t.Search.model)
        .join(t.WorkloadRow, t.WorkloadRow.digest == t.Search.workload)
        .order_by(t.Search.updated.desc())
        .limit(limit)
    )
    if prefix:
        query = query.where(t.Search.digest == resolve(session, t.Search.digest, prefix, "search", shown))
    rows = session.execute(query).all()
    counts: dict[tuple[str, str], int] = {}
    for part in _chunks([row[0].digest for row in rows]):
        for search, kind, count in session.execute(
            select(t.Trial.search, t.Trial.kind, func.count())
            .where(t.Trial.search.in_(part))
            .group_by(t.Trial.search, t.Trial.kind)
        ):
            counts[search, kind] = count
    return [
        SearchEntry(
            digest=row.digest,
            model=model,
            workload=kind,
            devices=row.devices,
            question=row.question,
            state=row.state,
            started=row.started,
            updated=row.updated,
            result=row.result,
            predicted=counts.get((row.digest, "predicted"), 0),
            measured=counts.get((row.digest, "measured"), 0),
        )
        for row, model, kind in rows
    ]


def runs(session: Session, limit: int, plan: str) -> list[RunEntry]:
    """Runs, newest first; `plan` keeps those of one plan, by full digest."""
    query = select(t.Run).order_by(t.Run.started.desc()).limit(limit)
    rows = session.scalars(query.where(t.Run.plan == plan) if plan else query).all()
    return _runs(session, rows)


def marked_runs(session: Session, plan: str, mark: str) -> list[RunEntry]:
    """Finished runs of a plan, by full digest, whose facts say that `mark` is true, newest first."""
    query = select(t.Run).where(t.Run.plan == plan, t.Run.status == "finished").order_by(t.Run.started.desc())
    return _runs(session, [row for row in session.scalars(query) if (row.facts or {}).get(mark) is True])


def run(session: Session, prefix: str, shown: str) -> RunEntry:
    row = session.get_one(t.Run, resolve(session, t.Run.id, prefix, "run", shown))
    return _runs(session, [row])[0]


def _runs(session: Session, rows: Sequence[t.Run]) -> list[RunEntry]:
    launches = _launches(session, [row.id for row in rows])
    return [_run(session, row, launches.get(row.id, ())) for row in rows]


def _launches(session: Session, ids: Sequence[str]) -> dict[str, tuple[LaunchEntry, ...]]:
    seconds: dict[tuple[str, int], list[float]] = defaultdict(list)
    entries: dict[str, list[LaunchEntry]] = defaultdict(list)
    for part in _chunks(ids):
        steps = select(t.Step).where(t.Step.run.in_(part)).order_by(t.Step.run, t.Step.launch, t.Step.number)
        for step in session.scalars(steps):
            seconds[step.run, step.launch].append(step.seconds)
        starts = select(t.Launch).where(t.Launch.run.in_(part)).order_by(t.Launch.run, t.Launch.number)
        for row in session.scalars(starts):
            timed = tuple(seconds[row.run, row.number])
            entries[row.run].append(LaunchEntry(row.number, row.started, row.log_dir, timed))
    return {name: tuple(listed) for name, listed in entries.items()}


def _run(session: Session, row: t.Run, launches: tuple[LaunchEntry, ...]) -> RunEntry:
    this = plan_from(session.get_one(t.PlanRow, row.plan).axes)
    return RunEntry(
        id=row.id,
        plan=this,
        model=model_from(session.get_one(t.Model, row.model).spec),
        workload=workload_from(session.get_one(t.WorkloadRow, row.workload).spec),
        machine=row.machine,
        recipe=row.recipe,
        git_sha=row.git_sha,
        environment=row.environment,
        prediction=_predicted(this, row.prediction),
        status=row.status,
        started=row.started,
        finished=row.finished,
        losses=tuple(row.losses or ()),
        peak_bytes=tuple(row.peak_bytes or ()),
        mfu=row.mfu,
        tokens_per_s=row.tokens_per_s,
        equal=None if row.equal is None else bool(row.equal),
        max_difference=row.max_difference,
        error=row.error,
        facts=row.facts or {},
        timeline=row.timeline,
        launches=launches,
    )


def _predicted(plan: Plan, raw: Mapping[str, Any] | None) -> Prediction | None:
    if raw is None:
        return None
    body = {key: value for key, value in raw.items() if key not in ("step_s", "peak_bytes")}
    return prediction_from(plan, raw["step_s"], raw["peak_bytes"], body)


def counts(session: Session) -> dict[str, int]:
    """Rows of each table, by name."""
    return {
        table.name: session.scalar(select(func.count()).select_from(table)) or 0
        for table in t.Base.metadata.sorted_tables
    }
