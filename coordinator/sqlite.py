"""SQLite: one file on a local disk (WAL, synchronous=FULL), or a database in memory for tests."""

import fcntl
import itertools
import os
import socket
import sqlite3
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import psutil
from sqlalchemy import Connection, Engine, create_engine, event
from sqlalchemy.exc import DBAPIError
from sqlalchemy.pool import QueuePool

from coordinator.store_errors import Explained, StoreError

_PRAGMAS: Final = (
    "synchronous=FULL",
    "fullfsync=1",  # macOS: a plain fsync leaves the bytes in the drive's cache
    "checkpoint_fullfsync=1",
    "foreign_keys=1",
    "busy_timeout=30000",
    "journal_size_limit=67108864",  # bytes; the log shrinks again after a burst
)
_CONNECTIONS: Final = 128
"""At most: every RPC thread may read at the same moment."""
_NETWORK: Final = (
    *("9p", "afs", "beegfs", "ceph", "cifs", "davfs", "fuse", "glusterfs", "gpfs", "lustre"),
    *("ncpfs", "nfs", "nfs4", "orangefs", "prl_fs", "pvfs2", "smb2", "smb3", "smbfs"),
    *("vboxsf", "virtiofs", "vmhgfs"),
)
"""File systems that machines share: their locks and shared memory do not hold SQLite's log."""
_SICK: Final = ("SQLITE_IOERR", "SQLITE_CORRUPT", "SQLITE_NOTADB", "SQLITE_CANTOPEN")
_NO_ROOM: Final = ("SQLITE_FULL", "SQLITE_IOERR_SHMSIZE")
"""The second: the log's shared memory could not grow, which nothing durable depends on."""
_memory_numbers = itertools.count()


class Sqlite:
    """The dialect of a file, or of a memory of this process when `path` is None."""

    def __init__(self, path: Path | None) -> None:
        self.folder = path.resolve().parent if path else None
        self.name = str(path) if path else "memory"
        self._path = path
        self._lead: int | None = None

    def open(self) -> Engine:
        """Raises: StoreError on a network file system, without a WAL, or where it cannot open."""
        if self._path is None:
            return self._open_memory()
        kind = file_system(self._path, psutil.disk_partitions(all=True))
        if is_network(kind):
            raise StoreError(
                f"{self._path} lies on {kind}, a network file system, where SQLite loses data; "
                "wanted a local disk. Set data_dir to one, or `store` to a PostgreSQL URL"
            )
        engine = _engine(f"file:{_quoted(self._path.absolute())}")
        with _refusing(self._path), engine.connect() as connection:
            # Kept in the file's header, so every later connection has it.
            mode = connection.exec_driver_sql("PRAGMA journal_mode=WAL").scalar()
        if mode != "wal":
            raise StoreError(
                f"{self._path}: found journal_mode={mode}, wanted wal: this file system cannot "
                "share memory. Set data_dir to a local disk, or `store` to a PostgreSQL URL"
            )
        return engine

    def _open_memory(self) -> Engine:
        uri = f"file:/cofuse-{next(_memory_numbers)}?vfs=memdb"
        anchor = _connect(uri)  # the database lives as long as one connection does
        engine = _engine(uri)
        event.listen(engine, "engine_disposed", lambda _: anchor.close())
        return engine

    def begin(self, connection: Connection) -> None:
        """Take the write lock at once: a plain BEGIN fails when another writer came in between."""
        connection.exec_driver_sql("BEGIN IMMEDIATE")

    def snapshot(self, engine: Engine) -> Connection:
        """The first read fixes the moment."""
        connection = engine.connect()
        connection.exec_driver_sql("BEGIN")
        return connection

    def read(self, engine: Engine) -> Connection:
        """Each statement sees what is committed when it starts."""
        return engine.connect()

    def damage(self, connection: Connection) -> str:
        """SQLite's own check of every page; takes about a second a gigabyte."""
        try:
            rows = [str(row[0]) for row in connection.exec_driver_sql("PRAGMA quick_check(3)")]
        except DBAPIError as error:
            return str(error.orig)
        return "" if rows == ["ok"] else "; ".join(rows)

    def take_lead(self, writer: Connection) -> None:
        """Hold a lock file beside the database; the kernel frees it when the process dies."""
        if self._path is None or self._lead is not None:
            return
        lock = self._path.with_name(self._path.name + ".lead")
        handle = os.open(lock, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            who = os.read(handle, 200).decode("utf-8", "replace").strip() or "unknown"
            os.close(handle)
            raise StoreError(
                f"{self.name} is led by another coordinator ({who}); wanted to be the only one. "
                "Stop it first"
            ) from None
        os.ftruncate(handle, 0)
        os.pwrite(handle, f"pid {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
        self._lead = handle

    def drop_lead(self) -> None:
        """Unlock."""
        if self._lead is not None:
            os.close(self._lead)
            self._lead = None

    def explain(self, error: DBAPIError) -> Explained | None:
        """Sort by SQLite's result code."""
        code = str(getattr(error.orig, "sqlite_errorname", ""))
        if code in _NO_ROOM:
            return Explained(f"no space is left for {self.name}", "storage_full")
        if code.startswith(_SICK):
            # After a failed fsync the kernel may call the lost pages clean: no retry is honest.
            return Explained(f"{self.name} cannot be read or written ({code})", fatal=True)
        if code.startswith(("SQLITE_BUSY", "SQLITE_LOCKED", "SQLITE_READONLY")):
            return Explained(f"{self.name} is held by another program ({code})")
        return None


def _connect(uri: str) -> sqlite3.Connection:
    # The writing connection goes from thread to thread, one at a time; transactions are ours.
    return sqlite3.connect(uri, uri=True, check_same_thread=False, isolation_level=None)


def _engine(uri: str) -> Engine:
    engine = create_engine(
        "sqlite://",
        creator=lambda: _connect(uri),
        poolclass=QueuePool,
        pool_size=8,
        max_overflow=_CONNECTIONS - 8,
    )

    @event.listens_for(engine, "connect")
    def _durable(connection: Any, _record: Any) -> None:
        for pragma in _PRAGMAS:
            connection.execute(f"PRAGMA {pragma}")

    return engine


@contextmanager
def _refusing(path: Path) -> Iterator[None]:
    try:
        yield
    except DBAPIError as error:
        raise StoreError(
            f"{path} cannot be opened: {error.orig}. Check that its folder exists and is "
            "writable, and that the file is a coordinator's database; else restore a backup"
        ) from error


def _quoted(path: Path) -> str:
    """A path inside a file: URI, where three characters mean something."""
    return str(path).replace("%", "%25").replace("?", "%3f").replace("#", "%23")


def file_system(path: Path, mounts: Iterable[Any]) -> str:
    """The type of the file system that holds `path`; `mounts` have mountpoint and fstype."""
    folders = {path.resolve(), *path.resolve().parents}
    holding = [m for m in mounts if Path(m.mountpoint) in folders]
    # Of two at one place, the later hides the earlier.
    deepest = max(enumerate(holding), key=lambda m: (len(m[1].mountpoint), m[0]), default=None)
    return str(deepest[1].fstype) if deepest else "unknown"


def is_network(kind: str) -> bool:
    """Whether other machines may write to a file system of this type. `fuseblk` is a local disk."""
    return kind.split(".")[0] in _NETWORK
