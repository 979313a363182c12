"""A connection to the plan database: opened, configured, and begun as a reader or as the one writer."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from sqlalchemy import URL, Connection, Engine, create_engine, event, exc, make_url
from sqlalchemy.orm import Session

from autotune.profiles_db import sqlite_file
from autotune.profiles_db.location import Place
from autotune.spec.errors import EnvironmentFault, UsageError

WRITES = "autotune_writes"  # execution option: this connection's transactions take the write lock as they begin

log = logging.getLogger(__name__)


def connect(place: Place, tell: Callable[[str], None]) -> Engine:
    """An engine for `place`; `tell` hears about fallbacks once. Nothing is opened before the first use."""
    try:
        url = make_url(place.url) if place.url else URL.create("sqlite", database=str(place.path))
        engine = create_engine(url)
    except (exc.ArgumentError, exc.NoSuchModuleError) as error:
        raise UsageError(
            f"{place.shown}: not a database address: {error}",
            hint="expected a file path or a SQLAlchemy URL such as postgresql+psycopg://user@host/name",
        ) from None
    except ImportError as error:
        raise EnvironmentFault(
            f"{place.shown}: the driver is not installed: {error}", hint="install it in this environment"
        ) from None
    if engine.dialect.name == "sqlite":
        told: set[str] = set()

        def once(sentence: str) -> None:
            if sentence not in told:
                told.add(sentence)
                log.warning("%s: %s", place.shown, sentence)
                tell(sentence)

        event.listen(engine, "connect", lambda connection, record: sqlite_file.configure(connection, once))
        event.listen(engine, "begin", _begin_sqlite)
    return engine


def _begin_sqlite(connection: Connection) -> None:
    """A writer takes the lock at once: a reader that turns writer half-way cannot wait for it and fails instead."""
    writes = connection.get_execution_options().get(WRITES)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")


@contextmanager
def faults(shown: str) -> Iterator[None]:
    """Turn what the driver says about the database itself into one EnvironmentFault. Broken constraints stay bugs."""
    try:
        yield
    except (exc.IntegrityError, exc.ProgrammingError, exc.DataError):
        raise
    except exc.DBAPIError as error:
        raise sqlite_file.unusable(shown, error.orig or error) from error


@contextmanager
def reading(engine: Engine, shown: str) -> Iterator[Session]:
    """A session over one consistent view; nothing that is done in it is kept."""
    with faults(shown), engine.connect() as connection, Session(connection) as session:
        yield session


@contextmanager
def writing(engine: Engine, shown: str) -> Iterator[Session]:
    """A session in one transaction: all of it is kept when the block ends, nothing when it raises."""
    options: dict[str, Any] = {WRITES: True}
    with (
        faults(shown),
        engine.connect().execution_options(**options) as connection,
        connection.begin(),
        Session(connection) as session,
    ):
        yield session
        session.flush()
