"""What only SQLite has: the checks of a file before it is used, and the pragmas of each connection."""

from __future__ import annotations

import logging
import sqlite3
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from autotune.spec.errors import EnvironmentFault

APPLICATION_ID = 0x4154554E  # "ATUN": SQLite's own header field that tells whose file this is
MAGIC = b"SQLite format 3\0"
OLDEST = (3, 37, 0)  # the first SQLite with STRICT tables
BUSY_MS = 5000
# quick_check reads every page, about 1 GB/s from the page cache; beyond this only `info(check=True)` pays for it.
CHECKED_BYTES = 256 << 20

log = logging.getLogger(__name__)


def check(path: Path, supported: int, whole: bool = False) -> None:
    """Refuse `path` unless it is absent, empty, or a healthy plan database not newer than version `supported`.

    Reads only. `whole` reads every page however large the file is. Raises EnvironmentFault naming the file, what was
    found and what would be right.
    """
    if sqlite3.sqlite_version_info < OLDEST:
        need = ".".join(map(str, OLDEST))
        raise EnvironmentFault(
            f"SQLite {sqlite3.sqlite_version} is too old: plan databases need {need}",
            hint="use a newer Python build, or a PostgreSQL URL",
        )
    if not path.exists():
        return
    if not path.is_file():
        raise EnvironmentFault(f"{path}: found a folder or device; expected a plan database file")
    try:
        with path.open("rb") as file:
            header = file.read(100)
    except OSError as error:
        raise EnvironmentFault(f"{path}: cannot be read: {error.strerror}", hint="name another with --db") from None
    if not header:
        return
    if len(header) < 100 or not header.startswith(MAGIC):
        raise EnvironmentFault(
            f"{path}: found {header[:16]!r}; expected a SQLite database, which begins {MAGIC!r}", hint=_elsewhere(path)
        )
    (owner,) = struct.unpack(">I", header[68:72])
    if owner not in (0, APPLICATION_ID):  # the header of a fresh file may still be in its write-ahead log: 0
        raise _foreign(path, owner)
    try:
        _check_inside(path, supported, whole or path.stat().st_size <= CHECKED_BYTES)
    except sqlite3.DatabaseError as error:
        raise unusable(str(path), error) from None


def _check_inside(path: Path, supported: int, whole: bool) -> None:
    connection = sqlite3.connect(f"{path.as_uri()}?mode=rw", uri=True, isolation_level=None, timeout=BUSY_MS / 1000)
    try:
        connection.execute("BEGIN")  # one view for all questions: another process may be making the tables now
        owner = connection.execute("PRAGMA application_id").fetchone()[0]
        version = connection.execute("PRAGMA user_version").fetchone()[0]
        tables = connection.execute("SELECT count(*) FROM sqlite_schema").fetchone()[0]
        if owner != APPLICATION_ID and (owner or tables or version):
            raise _foreign(path, owner)
        if version > supported:
            raise newer(str(path), version, supported)
        found = connection.execute("PRAGMA quick_check(1)").fetchone()[0] if whole else "ok"
        if found != "ok":
            said = str(found).splitlines()[-1]  # the first line only names the schema
            raise EnvironmentFault(f"{path}: the database is damaged: {said}", hint=_elsewhere(path))
    finally:
        connection.close()


def newer(shown: str, found: int, supported: int) -> EnvironmentFault:
    return EnvironmentFault(
        f"{shown}: found plan database version {found}; this autotune supports up to version {supported}",
        hint="upgrade autotune, or name another database with --db",
    )


def _foreign(path: Path, owner: int) -> EnvironmentFault:
    return EnvironmentFault(
        f"{path}: found a SQLite database of another program (application id {owner:#x}); "
        f"expected a plan database ({APPLICATION_ID:#x})",
        hint="name another file with --db",
    )


def _elsewhere(path: Path) -> str:
    return f"name another file with --db, or move this one away; copies made by migrations are {path.name}.v*.bak"


def unusable(shown: str, error: BaseException) -> EnvironmentFault:
    """The fault for what SQLite (or a server's driver) said: one message, with what to do about it."""
    said = str(error).strip().split("\n")[0]
    for words, message, hint in _CAUSES:
        if any(word in said.lower() for word in words):
            return EnvironmentFault(f"{shown}: {message} ({said})", hint=hint)
    return EnvironmentFault(f"{shown}: the database cannot be used: {said}", hint="name another with --db")


# Words of the driver's message -> what it means, what to do.
_CAUSES: tuple[tuple[tuple[str, ...], str, str], ...] = (
    (
        ("is locked", "is busy"),
        f"another process kept the plan database locked for {BUSY_MS // 1000} s",
        "wait for the other autotune command to end, or name another database with --db",
    ),
    (
        ("readonly", "read-only", "unable to open", "permission denied"),
        "the plan database and its folder must be writable",
        "name a file in a folder that you can write with --db or AUTOTUNE_DB",
    ),
    (("disk is full", "no space"), "no space is left for the plan database", "free some space; nothing was lost"),
    (
        ("malformed", "not a database", "corrupt"),
        "the database is damaged",
        "move the file away and start a new one, or restore a copy",
    ),
    (("connection refused", "could not translate", "connection failed"), "the server did not answer", "check the URL"),
)


def configure(connection: Any, tell: Callable[[str], None]) -> None:
    """Set a new connection's pragmas. `tell` gets one sentence when write-ahead logging is not to be had.

    busy_timeout comes first, because changing the journal mode can itself meet a lock.
    """
    connection.isolation_level = None  # transactions are begun by us: see engine.py
    cursor = connection.cursor()
    cursor.execute(f"PRAGMA busy_timeout={BUSY_MS}")
    mode = _write_ahead(cursor)
    if mode not in ("wal", "memory"):
        try:
            mode = cursor.execute("PRAGMA journal_mode=DELETE").fetchone()[0]
        except sqlite3.OperationalError as error:
            raise sqlite3.OperationalError(f"{error}") from None
        tell(f"write-ahead logging does not work on this file system: journal mode {mode} is used, which is slower")
    cursor.execute("PRAGMA foreign_keys=ON")
    cursor.execute("PRAGMA synchronous=NORMAL")
    cursor.close()


def _write_ahead(cursor: Any) -> str:
    """Try WAL; the mode in force. Network file systems refuse it, by answer or by error.

    A lock is no refusal: another process is opening the same file, and SQLite does not always wait by itself here.
    """
    until = time.monotonic() + BUSY_MS / 1000
    while True:
        try:
            return str(cursor.execute("PRAGMA journal_mode=WAL").fetchone()[0]).lower()
        except sqlite3.OperationalError as error:
            said = str(error)
            if "locked" in said and "protocol" not in said:
                if time.monotonic() > until:
                    raise
                time.sleep(0.02)
            elif "readonly" in said or "unable to open" in said:
                raise
            else:
                log.debug("WAL refused: %s", error)
                return "refused"
