"""Copies of the plan database for other tools: one JSON file, a folder of CSV, a SQLite file, an Optuna study."""

from __future__ import annotations

import csv
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Engine, Table, insert, select
from sqlalchemy.orm import Session

from autotune.profiles_db import migrate
from autotune.profiles_db import tables as t
from autotune.profiles_db.engine import connect, reading, writing
from autotune.profiles_db.location import place
from autotune.profiles_db.records import plan_from
from autotune.spec.errors import EnvironmentFault, UsageError, nearest_name

SCHEMA = "autotune.export/1"
BATCH = 1000  # rows held in memory at a time


def export(engine: Engine, shown: str, files: Path, form: str, target: Path) -> Path:
    """Write the whole database to `target` in `form`, a key of FORMS. It appears complete or not at all."""
    if form not in FORMS:
        near = nearest_name(form, FORMS)
        raise UsageError(
            f"export format: found {form!r}; expected one of {', '.join(FORMS)}",
            hint=f"nearest: {near}" if near else None,
        )
    if target.exists():
        raise UsageError(f"{target}: exists already; an export never overwrites", hint="name a new file or folder")
    with _appears(target) as part, reading(engine, shown) as session:
        FORMS[form](session, files, part)
    return target


@contextmanager
def _appears(target: Path) -> Iterator[Path]:
    """A path beside `target` to write to, which takes its name when the block ends and is removed when it raises."""
    try:
        folder = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    except OSError as error:
        raise EnvironmentFault(
            f"{target}: cannot be written: {error.strerror}", hint="name a writable folder"
        ) from None
    try:
        part = folder / target.name
        yield part
        os.replace(part, target)
        for rest in folder.iterdir():  # a SQLite copy brings its folder of files
            os.replace(rest, target.with_name(rest.name))
    except OSError as error:
        raise EnvironmentFault(
            f"{target}: cannot be written: {error.strerror}", hint="free space, or name another folder"
        ) from None
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _tables() -> list[Table]:
    """Every table, those that others refer to first."""
    return list(t.Base.metadata.sorted_tables)


def _batches(session: Session, table: Table) -> Iterator[list[dict[str, Any]]]:
    """The rows of a table in the order of its primary key."""
    rows = session.execute(select(table).order_by(*table.primary_key), execution_options={"yield_per": BATCH})
    for part in rows.mappings().partitions(BATCH):
        yield [dict(row) for row in part]


def _json(session: Session, files: Path, target: Path) -> None:
    """{"schema", "version", "tables": {name: [row, ...]}}: structured columns are JSON inside the JSON."""
    with target.open("w", encoding="utf-8") as out:
        out.write(f'{{"schema": "{SCHEMA}",\n"version": {migrate.VERSION},\n"tables": {{')
        for i, table in enumerate(_tables()):
            out.write(f'{"," if i else ""}\n"{table.name}": [')
            comma = ""
            for batch in _batches(session, table):
                for row in batch:
                    out.write(f"{comma}\n{json.dumps(row, sort_keys=True)}")
                    comma = ","
            out.write("]")
        out.write("}}\n")


def _csv(session: Session, files: Path, target: Path) -> None:
    """A folder with a file for each table; structured columns are JSON text."""
    target.mkdir()
    for table in _tables():
        with (target / f"{table.name}.csv").open("w", encoding="utf-8", newline="") as out:
            writer = csv.writer(out)
            writer.writerow([column.name for column in table.columns])
            for batch in _batches(session, table):
                writer.writerows([[_cell(value) for value in row.values()] for row in batch])


def _cell(value: Any) -> Any:
    return t.dump(value) if isinstance(value, dict | list) else value


def _sqlite(session: Session, files: Path, target: Path) -> None:
    """A plan database of its own, with a copy of the folder of files, whatever server it came from."""
    there = place(target)
    engine = connect(there, lambda sentence: None)
    try:
        migrate.migrate(engine, there)
        with writing(engine, there.shown) as copy:
            for table in _tables():
                for batch in _batches(session, table):
                    _insert(copy.connection(), table, batch)
    finally:
        engine.dispose()
    if files.is_dir():
        shutil.copytree(files, there.files)


def _insert(connection: Connection, table: Table, rows: Sequence[Mapping[str, Any]]) -> None:
    connection.execute(insert(table), [dict(row) for row in rows])


FORMS: dict[str, Callable[[Session, Path, Path], None]] = {"json": _json, "csv": _csv, "sqlite": _sqlite}


def export_optuna(session: Session, target: Path, search: str, best: int) -> list[str]:
    """Write a search as Optuna studies into a new SQLite file that optuna-dashboard opens; the studies' names.

    One study holds the `best` predicted trials (0: all; Optuna writes some hundred a second), another the measured
    ones where there are any. Parameters are the axes that differ, each a choice among the values that occurred; the
    plan's id is in the user attributes. Values are seconds.
    """
    if target.exists():
        raise UsageError(f"{target}: exists already; an export never overwrites", hint="name a new file")
    row = session.get_one(t.Search, search)
    name = f"{session.get_one(t.Model, row.model).name} {search[:10]}"
    studies = {}
    for kind in ("predicted", "measured"):
        query = (
            select(t.PlanRow.axes, t.PlanRow.id, t.Trial.value, t.Trial.number)
            .join(t.PlanRow, t.PlanRow.digest == t.Trial.plan)
            .where(t.Trial.search == search, t.Trial.kind == kind)
            .order_by(t.Trial.value, t.Trial.plan, t.Trial.number)
        )
        if best and kind == "predicted":
            query = query.limit(best)
        trials = session.execute(query).all()
        if trials or kind == "predicted":
            studies[f"{name} {kind}"] = trials
    with _appears(target) as part:
        _write_studies(part, studies, row.question)
    return list(studies)


def _write_studies(path: Path, studies: Mapping[str, Sequence[Any]], question: Mapping[str, Any]) -> None:
    import optuna
    from sqlalchemy import URL

    level = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    storage = optuna.storages.RDBStorage(URL.create("sqlite", database=str(path)).render_as_string())
    try:
        for name, rows in studies.items():
            study = optuna.create_study(storage=storage, study_name=name, direction="minimize")
            study.set_user_attr("question", question)
            plans = [plan_from(row.axes).to_dict() for row in rows]
            choices = {axis: _distinct([plan[axis] for plan in plans]) for axis in (plans[0] if plans else {})}
            axes: dict[str, optuna.distributions.BaseDistribution] = {
                axis: optuna.distributions.CategoricalDistribution(values)
                for axis, values in choices.items()
                if len(values) > 1
            }
            study.add_trials(
                [
                    optuna.trial.create_trial(
                        params={axis: plan[axis] for axis in axes},
                        distributions=axes,
                        value=row.value,
                        user_attrs={"plan": row.id, "describe": plan_from(row.axes).describe(), "number": row.number},
                    )
                    for row, plan in zip(rows, plans, strict=True)
                ]
            )
    finally:
        storage.remove_session()
        storage.engine.dispose()
        optuna.logging.set_verbosity(level)


def _distinct(values: Sequence[Any]) -> list[Any]:
    """The values that occur, in order: by size where they are numbers."""
    return sorted(set(values), key=lambda value: (isinstance(value, str), value))
