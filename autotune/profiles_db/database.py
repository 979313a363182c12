"""The plan database as a thing to open and close: found, checked, migrated, and described."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Self

from autotune.profiles_db.location import locate, place
from autotune.profiles_db.records import DatabaseInfo
from autotune.spec.errors import EnvironmentFault

if TYPE_CHECKING:
    from contextlib import AbstractContextManager
    from pathlib import Path

    from sqlalchemy import Engine
    from sqlalchemy.orm import Session

    from autotune.profiles_db.migrate import Migrated


class Database:
    """The plan database at `location`: a path or SQLAlchemy URL; None: where `location.locate` finds it.

    Opening creates a missing SQLite file with its folder (unless `create` is false), migrates an older one after
    copying it, and refuses newer, damaged and foreign files with an EnvironmentFault. One process at a time writes;
    any number reads. `notices` says in sentences what a user should know, such as a missing write-ahead log.
    """

    def __init__(self, location: str | os.PathLike[str] | None = None, *, create: bool = True) -> None:
        self.place = place(location if location is not None else locate())
        self.create = create
        self.notices: list[str] = []
        self.migrated: Migrated | None = None
        self._engine: Engine | None = None

    def __enter__(self) -> Self:
        from autotune.profiles_db import sqlite_file
        from autotune.profiles_db.engine import connect
        from autotune.profiles_db.migrate import VERSION, migrate

        path = self.place.path
        if path is not None:
            if not self.create and not path.exists():
                raise EnvironmentFault(
                    f"{path}: there is no plan database yet", hint="autotune profile or search makes one"
                )
            _make_folder(path)
            sqlite_file.check(path, VERSION)
        engine = connect(self.place, self.notices.append)
        try:
            self.migrated = migrate(engine, self.place)
        except BaseException:
            engine.dispose()
            raise
        if self.migrated.backup:
            self.notices.append(
                f"migrated from version {self.migrated.before} to {self.migrated.after}; "
                f"the old file is {self.migrated.backup}"
            )
        self._engine = engine
        return self

    def __exit__(self, *exception: object) -> None:
        if self._engine is not None:
            self._engine.dispose()
            self._engine = None

    @property
    def engine(self) -> Engine:
        """The open engine; use the store in a `with` block."""
        if self._engine is None:
            raise RuntimeError("the store is not open: use it in a with block")
        return self._engine

    def _reading(self) -> AbstractContextManager[Session]:
        from autotune.profiles_db.engine import reading

        return reading(self.engine, self.place.shown)

    def _writing(self) -> AbstractContextManager[Session]:
        from autotune.profiles_db.engine import writing

        return writing(self.engine, self.place.shown)

    def info(self, *, check: bool = False) -> DatabaseInfo:
        """Where it is, its version, rows by table and sizes in bytes. `check` also reads every page of the file."""
        from autotune.profiles_db import migrate, queries, sqlite_file

        path = self.place.path
        if check and path is not None:
            sqlite_file.check(path, migrate.VERSION, whole=True)
        sqlite = self.engine.dialect.name == "sqlite"
        with self._reading() as session:
            connection = session.connection()
            mode = connection.exec_driver_sql("PRAGMA journal_mode").scalar_one() if sqlite else ""
            version, counts = migrate.version(connection), queries.counts(session)
        files = list(self.place.files.rglob("*.json.gz")) if self.place.files.is_dir() else []
        return DatabaseInfo(
            shown=self.place.shown,
            path=str(path or ""),
            version=version,
            supported=migrate.VERSION,
            dialect=self.engine.dialect.name,
            journal_mode=str(mode),
            counts=counts,
            size=path.stat().st_size if path is not None else 0,
            files=len(files),
            files_size=sum(file.stat().st_size for file in files),
            notices=tuple(self.notices),
            migrated_from=self.migrated.before if self.migrated and self.migrated.backup else None,
            backup=self.migrated.backup if self.migrated else None,
        )


def _make_folder(path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise EnvironmentFault(
            f"{path}: its folder cannot be made: {error.strerror}",
            hint="name a file in a folder that you can write with --db or AUTOTUNE_DB",
        ) from None
