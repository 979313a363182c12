"""The database's own numbered migrations: one transaction a step, never edited once released.

SQLite counts versions in `PRAGMA user_version`; other databases in the table `schema_version`. The statements are
plain SQL with words for the four storage types, so that each step is one text for every dialect.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy import Connection, Engine, exc, inspect

from autotune.profiles_db import sqlite_file
from autotune.profiles_db.engine import WRITES, faults
from autotune.profiles_db.location import Place
from autotune.spec.errors import EnvironmentFault

# Version 1: the first tables. {key} is text that an index can hold.
FIRST = (
    """CREATE TABLE machines (fingerprint {key} PRIMARY KEY, name {text} NOT NULL, facts {text} NOT NULL,
        created {text} NOT NULL){strict}""",
    """CREATE TABLE profiles (digest {key} PRIMARY KEY, machine {key} NOT NULL REFERENCES machines (fingerprint),
        name {text} NOT NULL, grade {text} NOT NULL, created {text} NOT NULL, saved {text} NOT NULL,
        body {text} NOT NULL){strict}""",
    "CREATE TABLE models (digest {key} PRIMARY KEY, name {text} NOT NULL, spec {text} NOT NULL){strict}",
    "CREATE TABLE workloads (digest {key} PRIMARY KEY, kind {text} NOT NULL, spec {text} NOT NULL){strict}",
    "CREATE TABLE recipes (digest {key} PRIMARY KEY, path {text} NOT NULL, merged {text} NOT NULL){strict}",
    """CREATE TABLE plans (digest {key} PRIMARY KEY, id {key} NOT NULL, axes {text} NOT NULL,
        created {text} NOT NULL){strict}""",
    "CREATE INDEX ix_plans_id ON plans (id)",
    """CREATE TABLE contexts (digest {key} PRIMARY KEY, model {key} NOT NULL REFERENCES models (digest),
        workload {key} NOT NULL REFERENCES workloads (digest), profile {key} NOT NULL REFERENCES profiles (digest),
        devices {integer} NOT NULL, cost_model {text} NOT NULL, updated {text} NOT NULL){strict}""",
    """CREATE TABLE predictions (context {key} NOT NULL REFERENCES contexts (digest),
        plan {key} NOT NULL REFERENCES plans (digest), step_s {real} NOT NULL, created {text} NOT NULL,
        peak_bytes {text} NOT NULL, body {text} NOT NULL, PRIMARY KEY (context, plan)){strict}""",
    """CREATE TABLE searches (digest {key} PRIMARY KEY, model {key} NOT NULL REFERENCES models (digest),
        workload {key} NOT NULL REFERENCES workloads (digest), profile {key} NOT NULL REFERENCES profiles (digest),
        devices {integer} NOT NULL, question {text} NOT NULL, state {text} NOT NULL, started {text} NOT NULL,
        updated {text} NOT NULL, result {text}){strict}""",
    """CREATE TABLE trials (search {key} NOT NULL REFERENCES searches (digest),
        plan {key} NOT NULL REFERENCES plans (digest), kind {key} NOT NULL, number {integer} NOT NULL,
        value {real} NOT NULL, created {text} NOT NULL, PRIMARY KEY (search, plan, kind, number)){strict}""",
    """CREATE TABLE runs (id {key} PRIMARY KEY, plan {key} NOT NULL REFERENCES plans (digest),
        model {key} NOT NULL REFERENCES models (digest), workload {key} NOT NULL REFERENCES workloads (digest),
        machine {key} NOT NULL REFERENCES machines (fingerprint), recipe {key} REFERENCES recipes (digest),
        git_sha {text} NOT NULL, environment {text} NOT NULL, prediction {text}, status {text} NOT NULL,
        started {key} NOT NULL, finished {text}, losses {text}, peak_bytes {text}, mfu {real}, tokens_per_s {real},
        equal {integer}, max_difference {real}, error {text}){strict}""",
    """CREATE TABLE launches (run {key} NOT NULL REFERENCES runs (id), number {integer} NOT NULL,
        started {text} NOT NULL, log_dir {text} NOT NULL, PRIMARY KEY (run, number)){strict}""",
    """CREATE TABLE steps (run {key} NOT NULL, launch {integer} NOT NULL, number {integer} NOT NULL,
        seconds {real} NOT NULL, PRIMARY KEY (run, launch, number),
        FOREIGN KEY (run, launch) REFERENCES launches (run, number)){strict}""",
)

# Version 2: measured timelines and other large values as files beside the database, and what lists are ordered by.
FILES_AND_RANKS = (
    """CREATE TABLE artefacts (digest {key} PRIMARY KEY, kind {text} NOT NULL, size {integer} NOT NULL,
        created {text} NOT NULL){strict}""",
    "ALTER TABLE runs ADD COLUMN facts {text}",
    "ALTER TABLE runs ADD COLUMN timeline {key} REFERENCES artefacts (digest)",
    "CREATE INDEX predictions_rank ON predictions (context, step_s, plan)",
    "CREATE INDEX runs_started ON runs (started)",
)

# Version 3: how often proposed tokens are kept.
ACCEPTANCES = (
    """CREATE TABLE acceptances (conditions {key} NOT NULL, strategy {key} NOT NULL,
        model {key} NOT NULL REFERENCES models (digest), rates {text} NOT NULL, traces {text} NOT NULL,
        facts {text} NOT NULL, created {text} NOT NULL, PRIMARY KEY (conditions, strategy)){strict}""",
)

# Version 4: how likely decoding heads held what came.
RANKS = ("ALTER TABLE acceptances ADD COLUMN ranks {text}",)

# Version 5: what was predicted beside what was measured, suite by suite.
VALIDATIONS = (
    """CREATE TABLE validations (id {key} PRIMARY KEY, question {key} NOT NULL, suite {text} NOT NULL,
        machine {text} NOT NULL, profile {text} NOT NULL, cost_model {text} NOT NULL, state {text} NOT NULL,
        started {key} NOT NULL, updated {text} NOT NULL, visits {text} NOT NULL, "rows" {text},
        summary {text}){strict}""",
    "CREATE INDEX validations_question ON validations (question, started)",
)

STEPS: tuple[tuple[str, ...], ...] = (FIRST, FILES_AND_RANKS, ACCEPTANCES, RANKS, VALIDATIONS)
VERSION = len(STEPS)

# Storage words by dialect; "" serves every server that follows the SQL standard.
WORDS: Mapping[str, Mapping[str, str]] = {
    "sqlite": {"key": "TEXT", "text": "TEXT", "real": "REAL", "integer": "INTEGER", "strict": " STRICT"},
    "postgresql": {"key": "TEXT", "text": "TEXT", "real": "DOUBLE PRECISION", "integer": "BIGINT", "strict": ""},
    "": {"key": "VARCHAR(255)", "text": "TEXT", "real": "DOUBLE PRECISION", "integer": "BIGINT", "strict": ""},
}


@dataclass(frozen=True)
class Migrated:
    """From version `before` (0: a new database) to `after`; `backup` is the copy made first, where there was one."""

    before: int
    after: int
    backup: Path | None = None


def migrate(engine: Engine, place: Place, target: int = VERSION) -> Migrated:
    """Bring the database to version `target`, step by step; each step is kept whole or not at all.

    An older SQLite file is copied to `NAME.v<version>.bak` first. Raises EnvironmentFault for a newer database.
    """
    backup: Path | None = None
    with faults(place.shown):
        with engine.connect() as connection:
            first = version(connection)
        if first == target:
            return Migrated(first, first)  # the usual case takes no lock: a search may be writing for minutes
        while True:
            with engine.connect().execution_options(**{WRITES: True}) as connection, connection.begin():
                found = version(connection)
                if found > max(target, VERSION):
                    raise sqlite_file.newer(place.shown, found, VERSION)
                if found >= target:
                    return Migrated(first, found, backup)
                if first and backup is None and place.path is not None:
                    backup = _copy(place.path, found)  # under the write lock: nobody else can be half-way
                _step(connection, found)


def version(connection: Connection) -> int:
    """The version of the database behind `connection`; 0: it has no tables of ours yet."""
    if connection.dialect.name == "sqlite":
        return int(connection.exec_driver_sql("PRAGMA user_version").scalar_one())
    if not inspect(connection).has_table("schema_version"):
        return 0
    return int(connection.exec_driver_sql("SELECT version FROM schema_version").scalar_one())


def _step(connection: Connection, found: int) -> None:
    """Take the database from version `found` to the next, inside the caller's transaction."""
    words = WORDS.get(connection.dialect.name, WORDS[""])
    if connection.dialect.name == "sqlite":
        connection.exec_driver_sql(f"PRAGMA application_id={sqlite_file.APPLICATION_ID}")
        connection.exec_driver_sql(f"PRAGMA user_version={found + 1}")
    elif found:
        # Two processes may both see the old version: the second finds no row to change and its step is undone.
        changed = connection.exec_driver_sql(f"UPDATE schema_version SET version = {found + 1} WHERE version = {found}")
        if changed.rowcount != 1:
            raise EnvironmentFault("another process is migrating this database", hint="run the command again")
    else:
        try:
            connection.exec_driver_sql("CREATE TABLE schema_version (version INTEGER NOT NULL)")
        except (exc.IntegrityError, exc.ProgrammingError) as error:
            raise EnvironmentFault(
                f"the first table could not be made: {str(error.orig).splitlines()[0]}",
                hint="another process may be making it: run the command again",
            ) from None
        connection.exec_driver_sql("INSERT INTO schema_version VALUES (1)")
    for statement in STEPS[found]:
        connection.exec_driver_sql(statement.format(**words))


def _copy(path: Path, found: int) -> Path:
    """A consistent copy of the file beside it, complete before it gets its name."""
    target = path.with_name(f"{path.name}.v{found}.bak")
    part = target.with_name(f"{target.name}.{os.getpid()}.part")
    try:
        with closing(sqlite3.connect(path)) as source, closing(sqlite3.connect(part)) as copy:
            source.backup(copy)
        os.replace(part, target)
    except (OSError, sqlite3.Error) as error:
        part.unlink(missing_ok=True)
        raise EnvironmentFault(
            f"{target}: the copy before migrating failed: {error}; the database was not changed",
            hint="free space or make the folder writable",
        ) from None
    return target
