"""The residuals that the plan database holds: rows of validations, and runs beside what was predicted of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from autotune.profiles_db.bands.pools import BEFORE, HERE, Bands
from autotune.profiles_db.bands.shipped import shipped
from autotune.profiles_db.cost_model import cost_model_version
from autotune.profiles_db.database import Database
from autotune.spec.band import COUNTED, LEVEL, Residual, mostly, residual
from autotune.spec.digest import digest
from autotune.spec.validation import Judgement, row_name

if TYPE_CHECKING:
    from sqlalchemy.orm import Session

    from autotune.profiles_db.records import RunEntry
    from autotune.spec.model import ModelSpec
    from autotune.spec.plan import Plan
    from autotune.spec.workload import Workload

VALIDATIONS, RUNS = 50, 300  # the newest of each that are read: older ones tell of older cost models


class Residuals(Database):
    """The methods of an open database that say what predictions were off by."""

    def residuals(self) -> list[Residual]:
        """Those of finished validations and runs, newest first; never of rows that coefficients were fitted to."""
        version = cost_model_version()
        with self._reading() as session:
            return [*_of_validations(session, version), *_of_runs(session, version)]

    def bands(self, level: float = LEVEL) -> Bands:
        """The bands that follow from the residuals here and those that ship."""
        return Bands([*self.residuals(), *shipped()], level)


def run_name(model: ModelSpec, workload: Workload, plan: Plan) -> str:
    """The row that runs of a plan for a model and workload are of: many runs of it are one observation."""
    return digest([model.digest, workload.digest, plan.digest])


def of_judgement(row: Judgement, origin: str) -> Residual | None:
    """A judged row's residual; None where coefficients were fitted to it or it has none."""
    if row.fitted or not row.relative:
        return None
    return residual(
        row.metric,
        row.predicted,
        row.measured,
        grade=row.rests_on,
        device=row.device,
        workload=row.workload,
        row=row_name(row.table, row.setup, row.name),
        origin=origin,
    )


def _of_validations(session: Session, version: str) -> Iterator[Residual]:
    from sqlalchemy import select

    from autotune.profiles_db import tables
    from autotune.profiles_db.validations import FINISHED

    row = tables.ValidationRow
    query = select(row.cost_model, row.rows).where(row.state == FINISHED).order_by(row.started.desc())
    for cost_model, rows in session.execute(query.limit(VALIDATIONS)):
        for raw in rows or ():
            found = of_judgement(Judgement.from_dict(raw), HERE if cost_model == version else BEFORE)
            if found is not None:
                yield found


def _of_runs(session: Session, version: str) -> Iterator[Residual]:
    from autotune.profiles_db import queries, tables

    for run in queries.runs(session, RUNS, ""):
        if run.status == "finished" and run.prediction is not None and run.step_s:
            machine = session.get(tables.Machine, run.machine)
            yield from _of_run(run, machine.facts if machine else {}, version)


def _of_run(run: RunEntry, machine: Mapping[str, Any], version: str) -> Iterator[Residual]:
    """A run's times and peak. What its prediction rested on is noted with it; in runs of earlier versions, its shares
    say."""
    said = run.prediction
    assert said is not None
    noted = run.facts.get("predicted", {})
    times = noted.get("rests_on") or mostly(said.grades)
    figures = (
        ("step s", said.step_s, run.step_s, times),
        ("prefill s", said.prefill_s, run.facts.get("prefill_s"), times),
        ("decoded token s", said.decode_s, run.facts.get("decode_s"), times),
        ("peak bytes", max(said.peak_bytes, default=0), max(run.peak_bytes, default=0), COUNTED),
    )
    for metric, predicted, measured, grade in figures:
        found = residual(
            metric,
            predicted,
            measured or 0.0,
            grade=grade,
            device=machine.get("kind") or machine.get("device", {}).get("kind", ""),
            workload=run.workload.kind,
            row=run_name(run.model, run.workload, run.plan),
            origin=HERE if noted.get("cost_model") == version else BEFORE,
        )
        if found is not None:
            yield found
