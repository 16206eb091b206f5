"""What a database must know for coordinator/database.py: sqlite.py and postgres.py do."""

from pathlib import Path
from typing import Protocol

from sqlalchemy import Connection, Engine
from sqlalchemy.exc import DBAPIError

from coordinator.store_errors import Explained


class Dialect(Protocol):
    """What differs between databases."""

    name: str
    """Where it is, for people: without a password."""
    folder: Path | None
    """Where files of the database lie; None when it lies elsewhere."""

    def open(self) -> Engine:
        """The pool of connections; refuses places where promises could not be kept."""

    def begin(self, connection: Connection) -> None:
        """Start a transaction that has the only turn to write."""

    def snapshot(self, engine: Engine) -> Connection:
        """A connection whose reads all see one moment."""

    def read(self, engine: Engine) -> Connection:
        """A connection for one statement."""

    def damage(self, connection: Connection) -> str:
        """What a check of the database's own finds; empty when it is sound."""

    def take_lead(self, writer: Connection) -> None:
        """Make this the only coordinator of the database, for as long as `writer` lives."""

    def drop_lead(self) -> None:
        """Let another coordinator lead."""

    def explain(self, error: DBAPIError) -> Explained | None:
        """Sort an error of the driver; None when it is a fault of ours."""
