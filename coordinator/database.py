"""One database for many threads: short reads, writes in turn, several of them under one commit.

A write is durable when `write()` is left: whoever is told "done" can lose power and still be right.
The dialects (sqlite.py, postgres.py) know how to open, lock and explain; this file knows when.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from sqlalchemy import Connection
from sqlalchemy.engine import make_url
from sqlalchemy.exc import DBAPIError

from coordinator.dialect import Dialect
from coordinator.postgres import Postgres
from coordinator.sqlite import Sqlite
from coordinator.store_errors import Explained, StoreError
from protos.errors import CofuseError

_GROUP_MAX: Final = 32
"""Writers under one commit: at about 0.3 ms each, nobody waits more than some 10 ms for others."""
_RECONNECT_S: Final = 10.0
"""How long a write waits for a database server that went away, before it says so."""
_PAUSE_S: Final = 0.25


class _Group:
    """Writers whose work goes to disk with one commit."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self.size = 0
        self.done = threading.Event()
        self.error: BaseException | None = None


class Database:
    """Connections to one database."""

    def __init__(self, dialect: Dialect) -> None:
        self.dialect = dialect
        self.engine = dialect.open()
        self.on_fatal: Callable[[str], None] = lambda reason: None
        """Called once when no write can be trusted any more: the program should end."""
        self._fatal = ""
        self._leads = False
        self._writer: Connection | None = None
        self._group: _Group | None = None
        self._turn = threading.Lock()
        self._counting = threading.Lock()
        self._waiting = 0
        self._closed = threading.Event()

    def check(self) -> None:
        """Let the database check itself.

        Raises: StoreError when it is damaged.
        """
        with self.read() as connection:
            found = self.dialect.damage(connection)
        if found:
            raise StoreError(
                f"{self.dialect.name} is damaged: {found}; wanted a sound database. Move it away "
                "and restore the newest backup: cofuse coordinator restore HOME BACKUP"
            )

    # reading

    @contextmanager
    def read(self) -> Iterator[Connection]:
        """A connection for a query; it sees what is committed."""
        with self._explained(), self.dialect.read(self.engine) as connection:
            yield connection

    @contextmanager
    def snapshot(self) -> Iterator[Connection]:
        """A connection for several queries that must agree with each other."""
        with self._explained(), self.dialect.snapshot(self.engine) as connection:
            yield connection

    # writing

    @contextmanager
    def write(self) -> Iterator[Connection]:
        """A transaction of one's own: on disk when left, undone when left by an exception.

        Writers that come while another works share its commit: fsync is what costs, and one is
        enough for all of them. Each has a savepoint, so the failure of one does not touch others.
        Raises: CofuseError storage_full or store_unavailable; nothing of this writer was kept then.
        """
        group = self._enter()
        finished = False
        try:
            with self._explained():
                savepoint = group.connection.begin_nested()
                try:
                    yield group.connection
                    savepoint.commit()
                except BaseException as cause:
                    try:
                        savepoint.rollback()
                    except DBAPIError as error:
                        # The whole transaction is gone, with all in it: SQLite does that when the
                        # disk is full, and a server whose connection broke.
                        group.error = cause if isinstance(cause, DBAPIError) else error
                    raise
            finished = True
        finally:
            group.size += 1
            self._pass_turn()
            if finished:
                self._wait_for(group)

    def _enter(self) -> _Group:
        with self._counting:
            self._waiting += 1
        try:
            self._turn.acquire()
        except BaseException:  # Ctrl-C: whoever went before may count on our commit
            with self._counting:
                self._waiting -= 1
            self._turn.acquire()
            self._pass_turn()
            raise
        with self._counting:
            self._waiting -= 1
        try:
            if self._group is None:
                self._group = _Group(self._begin())
            return self._group
        except BaseException:
            self._turn.release()
            raise

    def _pass_turn(self) -> None:
        """Let the next writer in. When none waits, or the group is full, commit first."""
        group = self._group
        try:
            if group and (group.error or group.size >= _GROUP_MAX or not self._waiting):
                self._commit(group)
        finally:
            self._turn.release()

    def _commit(self, group: _Group) -> None:
        self._group = None
        try:
            if group.error is None:
                group.connection.commit()
        except BaseException as error:  # noqa: BLE001 - every writer of the group must hear of it
            group.error = error
        finally:
            if group.error is not None:
                self._hang_up()
            group.done.set()

    def _wait_for(self, group: _Group) -> None:
        group.done.wait()
        if group.error is not None:
            with self._explained():
                raise group.error

    def _begin(self) -> Connection:
        """The writing connection inside a new transaction; reconnects where that is possible."""
        waited_s = 0.0
        while True:
            self._refuse_after_fatal()
            try:
                if self._writer is None:
                    self._writer = self.engine.connect()
                    if self._leads:
                        self.dialect.take_lead(self._writer)
                self.dialect.begin(self._writer)
                return self._writer
            except (DBAPIError, StoreError) as error:
                self._hang_up()
                explained = self._explain(error)
                lost = explained is not None and explained.retry
                if not lost or waited_s >= _RECONNECT_S or self._closed.wait(_PAUSE_S):
                    if self._leads and isinstance(error, StoreError):
                        self._give_up(str(error))
                    raise self._as_error(explained, error) from error
                waited_s += _PAUSE_S

    def _hang_up(self) -> None:
        """Forget the writing connection: whatever its transaction held is undone."""
        writer, self._writer = self._writer, None
        if writer is not None:
            writer.invalidate()
            writer.close()

    # leading

    def lead(self) -> None:
        """Be the only coordinator of this database until close() or death.

        Raises: StoreError naming who leads now.
        """
        with self._turn:
            if self._writer is None:
                self._writer = self.engine.connect()
            self.dialect.take_lead(self._writer)
            self._leads = True

    def follow(self) -> None:
        """Let go of the lead."""
        with self._turn:
            self._leads = False
            self.dialect.drop_lead()
            self._hang_up()

    @contextmanager
    def leading(self) -> Iterator[None]:
        """Lead for one block, or go on leading."""
        if self._leads:
            yield
            return
        self.lead()
        try:
            yield
        finally:
            self.follow()

    def close(self) -> None:
        """Let go of every connection and of the lead."""
        self._closed.set()
        self.follow()
        self.engine.dispose()

    # errors

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except DBAPIError as error:
            explained = self._explain(error)
            if explained is None:
                raise
            if explained.fatal:
                self._give_up(explained.says)
            raise self._as_error(explained, error) from error

    def _explain(self, error: Exception) -> Explained | None:
        if isinstance(error, StoreError):
            return Explained(str(error), retry=True)
        assert isinstance(error, DBAPIError)
        return self.dialect.explain(error)

    def _as_error(self, explained: Explained | None, error: Exception) -> Exception:
        if explained is None:
            return error
        return CofuseError(explained.error_id, explained.says)

    def _give_up(self, reason: str) -> None:
        if not self._fatal:
            self._fatal = reason
            self.on_fatal(reason)

    def _refuse_after_fatal(self) -> None:
        if self._fatal:
            raise CofuseError("store_unavailable", self._fatal)


def open_database(url: str) -> Database:
    """Connect to `sqlite:///path`, `sqlite://` (in memory) or `postgresql+psycopg://...`.

    Raises: StoreError when it cannot be reached, or could not keep its promises.
    """
    if url.startswith("sqlite://"):  # the rest is the path as it is, whatever is in it
        path = url.removeprefix("sqlite://").removeprefix("/")
        return Database(Sqlite(Path(path) if path else None))
    parsed = make_url(url)
    if parsed.drivername == "postgresql+psycopg":
        return Database(Postgres(parsed))
    raise StoreError(
        f"store: found {parsed.drivername!r}, wanted sqlite:///PATH or "
        "postgresql+psycopg://USER@HOST/DATABASE; correct `store` in coordinator.toml"
    )
