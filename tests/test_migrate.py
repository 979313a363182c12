"""Opening database files of every kind: older ones are copied and migrated, the rest refused without a byte changed."""

from __future__ import annotations

import os
import shutil
import sqlite3
import subprocess
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from sqlalchemy import create_engine, inspect

from autotune.profiles_db import migrate as m
from autotune.profiles_db import sqlite_file
from autotune.profiles_db.database import Database
from autotune.profiles_db.engine import connect
from autotune.profiles_db.location import place
from autotune.profiles_db.store import Store
from autotune.profiles_db.tables import Base
from autotune.spec.errors import EnvironmentFault
from autotune.spec.plan import Plan
from tests.test_store import DENSE, WORK, batch, question


def version_one(path: Path) -> str:
    """A database file as the first version made and filled it; the id of the run in it."""
    there = place(path)
    engine = connect(there, lambda sentence: None)
    m.migrate(engine, there, target=1)
    engine.dispose()
    plan = Plan(tensor=2)
    with closing(sqlite3.connect(path)) as old:
        old.execute("INSERT INTO machines VALUES ('here', 'cpu', '{}', '2026-01-01')")
        old.execute("INSERT INTO models VALUES (?, 'tiny', ?)", (DENSE.digest, _json(DENSE)))
        old.execute("INSERT INTO workloads VALUES (?, 'train', ?)", (WORK.digest, _json(WORK)))
        old.execute("INSERT INTO plans VALUES (?, ?, ?, '2026-01-01')", (plan.digest, plan.id, _json(plan)))
        old.execute(
            "INSERT INTO runs (id, plan, model, workload, machine, git_sha, environment, status, started) "
            "VALUES ('0123456789', ?, ?, ?, 'here', '', '{}', 'finished', '2026-01-01')",
            (plan.digest, DENSE.digest, WORK.digest),
        )
        old.execute("INSERT INTO launches VALUES ('0123456789', 0, '2026-01-01', 'logs')")
        old.executemany("INSERT INTO steps VALUES ('0123456789', 0, ?, ?)", [(0, 1.0), (1, 2.0)])
        old.commit()
    return "0123456789"


def _json(value: object) -> str:
    from autotune.spec.digest import canonical

    return canonical(value)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def refused(path: Path) -> EnvironmentFault:
    """The fault of opening `path`, which must leave its folder exactly as it was."""
    before = contents(path.parent)
    with pytest.raises(EnvironmentFault) as error, Store(path):
        pass
    assert contents(path.parent) == before
    assert error.value.exit_code == 4
    assert str(path) in str(error.value) and "\n" not in str(error.value) and error.value.hint
    return error.value


def test_an_older_file_is_copied_then_migrated(tmp_path: Path) -> None:
    path = tmp_path / "plans.db"
    run = version_one(path)
    with Store(path) as store:
        entry = store.run(run)
        assert (entry.plan, entry.model, entry.workload) == (Plan(tensor=2), DENSE, WORK)
        assert entry.step_s == 1.5 and entry.facts == {} and entry.timeline is None
        info = store.info(check=True)
        assert (info.version, info.migrated_from) == (m.VERSION, 1)
        assert info.backup == tmp_path / "plans.db.v1.bak"
        assert "the old file is" in info.notices[0] and str(info.backup) in info.notices[0]
        store.finish_run(run, facts={"new": "column"})
    with closing(sqlite3.connect(tmp_path / "plans.db.v1.bak")) as copy:
        assert copy.execute("PRAGMA user_version").fetchone() == (1,)
        assert copy.execute("PRAGMA application_id").fetchone() == (sqlite_file.APPLICATION_ID,)
        assert copy.execute("SELECT count(*) FROM steps").fetchone() == (2,)
    with Store(path) as store:
        assert store.info().notices == () and store.run(run).facts == {"new": "column"}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["plans.db", "plans.db.v1.bak"]


def test_a_step_that_fails_leaves_the_older_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "plans.db"
    version_one(path)
    broken = (*m.FILES_AND_RANKS, "CREATE TABLE plans (twice {text}){strict}")
    monkeypatch.setattr(m, "STEPS", (m.FIRST, broken))
    with pytest.raises(EnvironmentFault, match="already exists"), Store(path):
        pass
    with closing(sqlite3.connect(path)) as file:
        assert file.execute("PRAGMA user_version").fetchone() == (1,)
        names = {row[0] for row in file.execute("SELECT name FROM sqlite_schema")}
        assert "plans" in names and "artefacts" not in names and "runs_started" not in names
    monkeypatch.undo()
    with Store(path) as store:
        assert store.info().version == m.VERSION


def test_no_migration_without_its_copy(tmp_path: Path) -> None:
    path = tmp_path / "plans.db"
    version_one(path)
    (tmp_path / "plans.db.v1.bak").mkdir()
    with pytest.raises(EnvironmentFault, match=r"the copy before migrating failed.*was not changed"), Store(path):
        pass
    with closing(sqlite3.connect(path)) as file:
        assert file.execute("PRAGMA user_version").fetchone() == (1,)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["plans.db", "plans.db.v1.bak"]


def test_a_newer_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "plans.db"
    with Store(path) as store:
        store.save_plan(Plan())
    with closing(sqlite3.connect(path)) as file:
        file.execute("PRAGMA user_version=7")
    fault = refused(path)
    assert f"found plan database version 7; this autotune supports up to version {m.VERSION}" in str(fault)
    assert "upgrade autotune" in str(fault.hint)


def test_a_file_that_is_no_database_is_refused(tmp_path: Path) -> None:
    for name, data in (("text", b"hello, I am a text file\n"), ("short", b"SQLite"), ("zeros", bytes(8192))):
        path = tmp_path / name
        path.write_bytes(data)
        assert "expected a SQLite database" in str(refused(path))
    path = tmp_path / "folder"
    path.mkdir()
    with pytest.raises(EnvironmentFault, match="found a folder"), Store(path):
        pass


def test_another_programs_database_is_refused(tmp_path: Path) -> None:
    for number, owner in enumerate((0, 0x47504B47)):
        path = tmp_path / f"other{number}.db"
        with closing(sqlite3.connect(path)) as file:
            file.execute("CREATE TABLE trials (trial_id INTEGER)")
            file.execute(f"PRAGMA application_id={owner}")
            file.commit()
        assert f"another program (application id {owner:#x})" in str(refused(path))


def test_an_empty_file_becomes_a_database(tmp_path: Path) -> None:
    path = tmp_path / "plans.db"
    path.touch()
    with Store(path) as store:
        assert store.info().version == m.VERSION


@pytest.fixture
def full(tmp_path: Path) -> Path:
    with Store(tmp_path / "plans.db") as store:
        store.remember_predictions(store.start_search(question()), batch(400))
    return tmp_path / "plans.db"


def test_a_damaged_file_is_refused(full: Path) -> None:
    data = full.read_bytes()
    middle = len(data) // 2 // 4096 * 4096
    damages = {
        "overwritten": data[:middle] + b"\xa5" * 4096 * 3 + data[middle + 4096 * 3 :],
        "cut off": data[: middle + 100],
        "header only": data[:100],
        "first page wild": data[:100] + os.urandom(3996) + data[4096:],
    }
    for name, wrong in damages.items():
        full.write_bytes(wrong)
        message = str(refused(full))
        assert "damaged" in message or "cannot be used" in message, f"{name}: {message}"
    full.write_bytes(data)
    with Store(full) as store:
        assert store.info().counts["predictions"] == 400


def test_a_cell_that_is_not_json_is_one_message(full: Path) -> None:
    with closing(sqlite3.connect(full)) as file:
        file.execute("UPDATE plans SET axes = '__import__(\"os\")'")
        file.commit()
    with Store(full) as store, pytest.raises(EnvironmentFault, match="not JSON"):
        store.plan(batch(1)[0].plan.id)


def test_a_plan_with_a_later_axis_is_one_message(full: Path) -> None:
    with closing(sqlite3.connect(full)) as file:
        file.execute("UPDATE plans SET axes = '{\"teleport\": 3}'")
        file.commit()
    with Store(full) as store, pytest.raises(EnvironmentFault, match="Plan with the field 'teleport'"):
        store.plans()


def columns(address: str, by: str) -> dict[str, object]:
    """Tables, columns, storage types, keys, references and indexes, as migrations or the ORM make them."""
    engine = create_engine(address)
    with engine.begin() as connection:
        if by == "orm":
            Base.metadata.create_all(connection)
        found = inspect(connection)
        made: dict[str, object] = {}
        for table in sorted(set(found.get_table_names()) - {"schema_version"}):
            made[table] = (
                {c["name"]: (str(c["type"]), c["nullable"]) for c in found.get_columns(table)},
                found.get_pk_constraint(table)["constrained_columns"],
                sorted(
                    (k["constrained_columns"], k["referred_table"], k["referred_columns"])
                    for k in found.get_foreign_keys(table)
                ),
                sorted((str(i["name"]), i["column_names"]) for i in found.get_indexes(table)),
            )
    engine.dispose()
    return made


def test_migrations_make_what_the_orm_expects(tmp_path: Path) -> None:
    with Database(tmp_path / "migrated.db") as database:
        path = database.place.path
    migrated = columns(f"sqlite:///{path}", "migrations")
    assert migrated == columns(f"sqlite:///{tmp_path}/orm.db", "orm")
    with closing(sqlite3.connect(str(path))) as file:
        strict = {row[1]: row[5] for row in file.execute("PRAGMA table_list") if not row[1].startswith("sqlite_")}
        assert set(strict) == set(Base.metadata.tables) and set(strict.values()) == {1}
        file.execute("PRAGMA foreign_keys=ON")
        with pytest.raises(sqlite3.IntegrityError, match="cannot store TEXT value in INTEGER column"):
            file.execute("INSERT INTO artefacts VALUES ('a', 'timeline', 'many', 'now')")
        with pytest.raises(sqlite3.IntegrityError, match="FOREIGN KEY"):
            file.execute("INSERT INTO launches VALUES ('nothing', 0, '', '')")


def test_every_connection_has_its_pragmas(tmp_path: Path) -> None:
    with Database(tmp_path / "plans.db") as database, database.engine.connect() as connection:
        pragmas = {
            name: connection.exec_driver_sql(f"PRAGMA {name}").scalar_one()
            for name in ("busy_timeout", "journal_mode", "foreign_keys", "synchronous")
        }
    assert pragmas == {"busy_timeout": 5000, "journal_mode": "wal", "foreign_keys": 1, "synchronous": 1}


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    """The URL of a PostgreSQL server of our own, on a socket in its folder."""
    pytest.importorskip("psycopg", reason="the PostgreSQL driver psycopg is not installed")
    found = [*Path("/usr/lib/postgresql").glob("*/bin/initdb"), *map(Path, filter(None, [shutil.which("initdb")]))]
    if not found:
        pytest.skip("no PostgreSQL server is installed")
    tools = found[0].parent
    user = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"] if os.geteuid() == 0 else []
    home = Path("/tmp") / f"autotune-pg-{os.getpid()}-{time.monotonic_ns()}"  # a socket's path must be short
    home.mkdir(mode=0o700)
    if user:
        os.chown(home, 65534, 65534)
    data = home / "data"
    quiet = {"check": True, "stdout": subprocess.DEVNULL, "cwd": home}
    options = f"-c listen_addresses= -c unix_socket_directories={home}"
    try:
        subprocess.run([*user, tools / "initdb", "-D", data, "-U", "tester", "-A", "trust"], **quiet)  # type: ignore[call-overload]
        start = [*user, tools / "pg_ctl", "-D", data, "-o", options, "-l", home / "log", "-w", "start"]
        subprocess.run(start, **quiet)  # type: ignore[call-overload]
        yield f"postgresql+psycopg://tester@/postgres?host={home}"
        subprocess.run([*user, tools / "pg_ctl", "-D", data, "-m", "immediate", "stop"], **quiet)  # type: ignore[call-overload]
    finally:
        shutil.rmtree(home, ignore_errors=True)


def test_postgresql_holds_the_same(server: str, tmp_path: Path) -> None:
    with Store(server) as store:
        assert store.info().version == m.VERSION and store.info().dialect == "postgresql"
        search = store.start_search(question())
        store.remember_predictions(search, batch(50))
        store.remember_predictions(search, batch(10))
        store.remember_measured(search, Plan(), 1 / 3)
        run = store.start_run(Plan(), DENSE, WORK, machine="a 'b' \N{BEAR FACE}", prediction=batch(1)[0])
        store.add_launch(run, [1.0, 3.0])
        store.finish_run(run, peak_bytes=[1 << 40], equal=False, max_difference=float("nan"))
        assert len(store.known(search)) == 50 and store.measured(search) == {Plan().id: 1 / 3}
        assert store.run(run[:5]).step_s == 2.0 and store.run(run).equal is False
        assert len(store.plans(top=3)) == 3
        copy = store.export("sqlite", tmp_path / "copy.db")
        counts = store.info().counts
    with Store(copy) as here, Store(server) as there:
        assert here.info().counts == counts
        assert here.predictions(search) == there.predictions(search)
        assert here.runs() == there.runs()
        with there.engine.begin() as connection:
            connection.exec_driver_sql("UPDATE schema_version SET version = 9")
    with pytest.raises(EnvironmentFault, match="found plan database version 9"), Store(server):
        pass
