"""PostgreSQL: the same promises on a server of its own, for `store = "postgresql+psycopg://..."`.

Advisory locks are held per schema, so that two federations can share a database. They belong to a
session: do not put a pooler in transaction mode in between.
"""

import os
import socket
import time
from pathlib import Path
from typing import Any, Final

from sqlalchemy import URL, Connection, Engine, create_engine, event, text
from sqlalchemy.exc import DBAPIError

from coordinator.store_errors import Explained, StoreError

_LEAD: Final = 0x636F6675  # "cofu", and the next number: any two that nobody else uses
_TURN: Final = _LEAD + 1
_GONE_S: Final = 3.0
"""The server notices only after a moment that a leader has died."""
_LOOK_AGAIN_S: Final = 0.1
_SETTINGS: Final = (
    "SET synchronous_commit = on",
    "SET lock_timeout = '30s'",
    # A coordinator whose machine lost power must not keep the lead for two hours.
    "SET tcp_keepalives_idle = 10",
    "SET tcp_keepalives_interval = 5",
    "SET tcp_keepalives_count = 3",
)
_CONNECT: Final = {
    "connect_timeout": 10,
    "keepalives_idle": 10,
    "keepalives_interval": 5,
    "keepalives_count": 3,
    "tcp_user_timeout": 30_000,
}
_READ_ONLY: Final = "25006"
_LEADER: Final = """
    SELECT a.application_name, coalesce(host(a.client_addr), 'local')
    FROM pg_locks l JOIN pg_stat_activity a USING (pid)
    WHERE l.locktype = 'advisory' AND l.granted AND l.classid = :key
      AND l.database = (SELECT oid FROM pg_database WHERE datname = current_database())
      AND l.objid = (hashtext(current_schema())::bigint & 4294967295)::oid
"""


class Postgres:
    """The dialect of one server and database."""

    folder: Path | None = None

    def __init__(self, url: URL) -> None:
        self.name = url.render_as_string(hide_password=True)
        self._url = url

    def open(self) -> Engine:
        """Raises: StoreError when it does not answer, or does not write to disk (fsync=off)."""
        me = f"cofuse pid {os.getpid()} on {socket.gethostname()}"[:63]
        try:
            engine = create_engine(
                self._url,
                pool_size=8,
                max_overflow=24,
                pool_pre_ping=True,
                # The turn is taken by the first statement; the next ones must see what was
                # committed before it, so each needs a fresh view.
                isolation_level="READ COMMITTED",
                connect_args={**_CONNECT, "application_name": me},
            )
        except ModuleNotFoundError as error:
            raise StoreError(
                "PostgreSQL needs psycopg. Install it with: pip install 'cofuse[postgres]'"
            ) from error

        @event.listens_for(engine, "connect")
        def _durable(connection: Any, _record: Any) -> None:
            for setting in _SETTINGS:
                connection.execute(setting)
            connection.commit()

        try:
            with engine.connect() as connection:
                fsync = connection.exec_driver_sql("SHOW fsync").scalar()
        except DBAPIError as error:
            raise StoreError(
                f"{self.name} does not answer: {str(error.orig).strip()}. "
                "Check the address, the server and the password file"
            ) from error
        if fsync != "on":
            raise StoreError(
                f"{self.name}: found fsync={fsync}, wanted on: a receipt must survive a power "
                "loss. Set it in postgresql.conf and restart the server"
            )
        return engine

    def begin(self, connection: Connection) -> None:
        """Take the only turn to write: at the end of the transaction it is free again."""
        query = text("SELECT pg_advisory_xact_lock(:key, hashtext(current_schema()))")
        connection.execute(query, {"key": _TURN})

    def snapshot(self, engine: Engine) -> Connection:
        """The first read fixes the moment."""
        return engine.connect().execution_options(
            isolation_level="REPEATABLE READ", postgresql_readonly=True
        )

    def read(self, engine: Engine) -> Connection:
        """Without a transaction around it: one round trip instead of three."""
        return engine.connect().execution_options(isolation_level="AUTOCOMMIT")

    def damage(self, connection: Connection) -> str:
        """The server checks its pages itself where data_checksums is on."""
        return ""

    def take_lead(self, writer: Connection) -> None:
        """Lock in the very session that writes: whoever lost the lead cannot write either."""
        query = text("SELECT pg_try_advisory_lock(:key, hashtext(current_schema()))")
        end = time.monotonic() + _GONE_S
        while not (taken := writer.execute(query, {"key": _LEAD}).scalar()):
            if time.monotonic() > end:
                break
            time.sleep(_LOOK_AGAIN_S)
        who = None if taken else writer.execute(text(_LEADER), {"key": _LEAD}).first()
        writer.commit()
        if not taken:
            raise StoreError(
                f"{self.name} is led by another coordinator "
                f"({' from '.join(who) if who else 'just gone'}); wanted to be the only one. "
                "Stop it first"
            )

    def drop_lead(self) -> None:
        """Ends with the writing session."""

    def explain(self, error: DBAPIError) -> Explained | None:
        """Sort by SQLSTATE."""
        state = str(getattr(error.orig, "sqlstate", None) or "")
        if error.connection_invalidated or state.startswith(("08", "57P")) or state == _READ_ONLY:
            return Explained(f"the connection to {self.name} is lost", retry=True)
        if state.startswith("53"):
            return Explained(f"{self.name} has no space or memory left ({state})", "storage_full")
        if state.startswith(("55P03", "40")):
            return Explained(f"{self.name} is held by another program ({state})")
        if state.startswith(("58", "XX")):
            return Explained(f"{self.name} cannot be read or written ({state})", fatal=True)
        return None
