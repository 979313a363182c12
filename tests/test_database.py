"""The database as a file: killed and concurrent writers, locks, read-only places, addresses, journals."""

from __future__ import annotations

import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from autotune.profiles_db.location import data_folder, locate, place
from autotune.profiles_db.store import Store
from autotune.spec.errors import EnvironmentFault, UsageError
from autotune.spec.plan import Plan
from tests.stored import batch, question


def write_forever(path: str, start: int) -> None:
    """What a child process does: batches of 50 until killed, saying after each that it was kept."""
    with Store(path) as store:
        search = store.start_search(question())
        while True:
            store.remember_predictions(search, batch(50, start))
            start += 50
            print(start, flush=True)


def child(*arguments: object) -> subprocess.Popen[str]:
    code = f"from tests.test_database import *; {arguments[0]}({', '.join(map(repr, arguments[1:]))})"
    root = str(Path(__file__).parent.parent)
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=root)


def test_kill_9_in_a_write_leaves_whole_batches_only(tmp_path: Path) -> None:
    path = tmp_path / "plans.db"
    said = 0
    for round_ in range(3):
        writer = child("write_forever", str(path), 1 + round_ * 100_000)
        assert writer.stdout is not None
        for _ in range(3 + round_):
            assert writer.stdout.readline()
            said += 50
        time.sleep(0.003 * round_)  # somewhere inside the next batch
        writer.send_signal(signal.SIGKILL)
        said += 50 * len(writer.stdout.readlines())
        assert writer.wait(10) == -signal.SIGKILL
        writer.stdout.close()
    with Store(path) as store:
        info = store.info(check=True)
        kept = info.counts["predictions"]
        assert kept % 50 == 0 and said <= kept <= said + 150, "a batch is there whole or not at all, none is lost"
        assert info.counts["trials"] == info.counts["plans"] == kept
        assert len(store.known(store.start_search(question()))) == kept


def write_some(path: str, start: int) -> None:
    with Store(path) as store:
        search = store.start_search(question())
        for i in range(20):
            store.remember_predictions(search, batch(10, start + 10 * i))
            store.remember_measured(search, Plan(), 1.0)


def test_two_processes_write_at_once(tmp_path: Path) -> None:
    """Both start on a file that does not exist, so that they meet in the migration too."""
    path = tmp_path / "plans.db"
    writers = [child("write_some", str(path), 1 + 10_000 * i) for i in range(2)]
    assert [writer.wait(60) for writer in writers] == [0, 0]
    for writer in writers:
        assert writer.stdout is not None
        writer.stdout.close()
    with Store(path) as store:
        search = store.start_search(question())
        assert len(store.known(search)) == 400
        assert store.search(search).measured == 40
        assert store.info(check=True).notices == ()


def test_a_lock_that_stays_is_reported_not_waited_for_forever(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    store.save_plan(Plan())
    other = sqlite3.connect(store.info().path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    monkeypatch.setattr("autotune.profiles_db.sqlite_file.BUSY_MS", 50)
    try:
        with Store(store.place.path) as second, pytest.raises(EnvironmentFault, match="locked"):
            second.save_plan(Plan(micro_batch=2))
        assert store.plan(Plan().id) == Plan(), "readers go on"
    finally:
        other.close()
    store.save_plan(Plan(micro_batch=2))


def as_nobody(action: Callable[[], str]) -> str:
    """What `action` returns in a child process without root's right to write everywhere."""
    if os.geteuid() != 0:
        return action()
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.setgid(65534)
            os.setuid(65534)
            os.write(write, action().encode())
        except BaseException as error:
            os.write(write, f"unexpected {error!r}".encode())
        finally:
            os._exit(0)
    os.close(write)
    with os.fdopen(read, encoding="utf-8") as pipe:
        said = pipe.read()
    os.waitpid(pid, 0)
    return said


def test_read_only_places_are_refused_with_one_message(tmp_path: Path) -> None:
    folder = Path(tempfile.mkdtemp())  # pytest's own folder is closed to other users

    def open_there(name: str) -> str:
        try:
            with Store(folder / name):
                return "opened"
        except EnvironmentFault as error:
            return f"{error} | {error.hint}"

    try:
        with Store(folder / "plans.db") as store:
            store.save_plan(Plan())
        (folder / "plans.db").chmod(0o444)
        folder.chmod(0o555)
        before = sorted(folder.iterdir())
        for name in ("plans.db", "fresh.db"):
            said = as_nobody(lambda name=name: open_there(name))  # type: ignore[misc]
            assert "must be writable" in said and name in said and "--db" in said and "\n" not in said, said
        said = as_nobody(lambda: open_there("below/plans.db"))
        assert "its folder cannot be made" in said and "--db" in said
        assert sorted(folder.iterdir()) == before
    finally:
        folder.chmod(0o755)
        shutil.rmtree(folder)


def test_without_write_ahead_logging_it_falls_back_and_says_so(tmp_path: Path) -> None:
    """SQLite's dot-file locking has no shared memory, as a network file system has none."""
    address = f"sqlite:///file:{tmp_path / 'plans.db'}?vfs=unix-dotfile&uri=true"
    with Store(address) as store:
        store.save_plan(Plan())
        assert store.plan(Plan().id) == Plan()
        info = store.info()
    assert info.journal_mode == "delete" and info.path == str(tmp_path / "plans.db")
    (notice,) = info.notices
    assert "write-ahead logging does not work" in notice


def test_addresses(tmp_path: Path) -> None:
    with Store("sqlite://") as store:
        store.save_plan(Plan())
        assert store.info().counts["plans"] == 1 and store.info().path == ""
    with Store(f"sqlite:///{tmp_path}/by-url.db") as store:
        assert store.info().path == f"{tmp_path}/by-url.db"
    odd = tmp_path / "a?b#c%20d e.db"
    with Store(odd) as store:
        store.save_plan(Plan())
    assert odd.exists()
    for wrong in ("nonsense://x/y", "://"):
        with pytest.raises(UsageError, match="not a database address"), Store(wrong):
            pass
    secret = place("postgresql+psycopg://me:se:cret@host/db")
    assert secret.shown == "postgresql+psycopg://me:***@host/db" and secret.path is None
    with (
        pytest.raises(EnvironmentFault, match="there is no plan database yet"),
        Store(tmp_path / "no.db", create=False),
    ):
        pass
    with pytest.raises(EnvironmentFault, match="folder cannot be made"), Store(odd / "below" / "plans.db"):
        pass
    assert not (tmp_path / "no.db").exists()


def test_where_the_database_is(tmp_path: Path) -> None:
    environ = {"XDG_DATA_HOME": str(tmp_path / "data")}
    assert locate(None, environ, tmp_path) == str(tmp_path / "data" / "autotune" / "plans.db")
    (tmp_path / ".autotune").mkdir()
    assert locate(None, environ, tmp_path) == str(tmp_path / ".autotune" / "plans.db")
    assert locate(None, environ | {"AUTOTUNE_DB": "here.db"}, tmp_path) == "here.db"
    assert locate("flag.db", environ | {"AUTOTUNE_DB": "here.db"}, tmp_path) == "flag.db"
    assert data_folder({"XDG_DATA_HOME": "relative"}) == Path.home() / ".local" / "share" / "autotune"


def test_opening_imports_sqlalchemy_importing_does_not() -> None:
    code = (
        "import sys, autotune.profiles_db.store; "
        "print([name for name in ('sqlalchemy', 'optuna', 'torch', 'numpy') if name in sys.modules])"
    )
    root = str(Path(__file__).parent.parent)
    assert subprocess.check_output([sys.executable, "-c", code], text=True, cwd=root).strip() == "[]"
