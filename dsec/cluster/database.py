"""Two databases behind one short interface: a transaction hands out a function that runs a statement."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, Protocol

from dsec.cluster.errors import StoreUnavailable

Execute = Callable[..., list[Any]]
"""execute(statement with ? for each parameter, parameters=()) -> the rows it returned"""


class Database(Protocol):
    def transaction(self, durable: bool = False) -> AbstractContextManager[Execute]:
        """Commits on leaving, rolls back on an exception. ``durable``: on disk before it returns, whatever the
        database's own setting (leases, keys and projects must survive a power cut; the rest may lose its last moment,
        because the host that ran it lost power too)."""

    def close(self) -> None: ...


class Sqlite:
    """One file in WAL mode, one connection behind a lock: enough for the API server and the Edge of one host."""

    def __init__(self, path: str) -> None:
        if path != ":memory:":
            Path(path).parent.mkdir(parents=True, exist_ok=True)
        self._connection = sqlite3.connect(path, timeout=10, isolation_level=None, check_same_thread=False)
        self._lock = threading.Lock()
        self._connection.execute("pragma journal_mode = wal")
        self._connection.execute("pragma synchronous = normal")

    @contextmanager
    def transaction(self, durable: bool = False) -> Iterator[Execute]:
        with self._lock:
            try:
                if durable:
                    self._connection.execute("pragma synchronous = full")
                self._connection.execute("begin immediate")
                try:
                    yield self._run
                except BaseException:
                    self._connection.execute("rollback")
                    raise
                self._connection.execute("commit")
            except sqlite3.OperationalError as error:
                raise StoreUnavailable(str(error)) from error
            finally:
                if durable:
                    self._connection.execute("pragma synchronous = normal")

    def _run(self, statement: str, parameters: tuple[Any, ...] = ()) -> list[Any]:
        return self._connection.execute(statement, parameters).fetchall()

    def close(self) -> None:
        with self._lock:
            self._connection.close()


class Postgres:
    """One connection for each thread that asks, made again after a failure. Needs the extra ``postgres`` (psycopg).

    Behind a failover the standby must be synchronous: a lease that was granted must not be forgotten.
    """

    def __init__(self, url: str) -> None:
        import psycopg

        self._psycopg, self._url = psycopg, url
        self._local = threading.local()
        self._all: list[Any] = []

    @contextmanager
    def transaction(self, durable: bool = False) -> Iterator[Execute]:
        try:
            connection = getattr(self._local, "connection", None)
            if connection is None or connection.closed:
                connection = self._psycopg.connect(
                    self._url, autocommit=True, connect_timeout=5, client_encoding="utf8"
                )
                self._local.connection = connection
                self._all.append(connection)
            with connection.transaction():
                yield lambda statement, parameters=(): self._run(connection, statement, parameters)
        except (self._psycopg.OperationalError, self._psycopg.InterfaceError) as error:
            if connection := getattr(self._local, "connection", None):
                connection.close()
                self._all.remove(connection)
                self._local.connection = None
            raise StoreUnavailable(str(error)) from error

    def _run(self, connection: Any, statement: str, parameters: tuple[Any, ...]) -> list[Any]:
        cursor = connection.execute(statement.replace("?", "%s"), parameters)
        return list(cursor.fetchall()) if cursor.description else []

    def close(self) -> None:
        for connection in self._all:
            connection.close()


def open_database(url: str) -> Database:
    kind, _, rest = url.partition(":")
    if kind == "sqlite":
        return Sqlite(rest)
    if kind in ("postgres", "postgresql"):
        return Postgres(url)
    raise ValueError(f"a store is sqlite:PATH or postgresql://..., not {url!r}")
