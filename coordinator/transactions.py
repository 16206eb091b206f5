"""Opens the coordinator's database; what a writer reports done is on disk."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Condition
from typing import Self

from sqlalchemy import Connection

from coordinator.audit import begin
from coordinator.database import Database, open_database
from coordinator.metrics import DB_COMMIT_SECONDS
from coordinator.migrate import migrate


class Transactions:
    """A database for many threads; `changed` wakes whoever waits for news."""

    def __init__(self, url: str, *, lead: bool = False, backups: Path | None = None) -> None:
        """Open the database, check it, and bring its schema up to date.

        Args: url as in open_database; lead: be the only coordinator of it until close();
            backups: folder for the copy made before an upgrade, default beside a SQLite file.
        Raises: StoreError when it cannot be used; the message says what to do.
        """
        self.database: Database = open_database(url)
        try:
            self.database.check()
            if lead:
                self.database.lead()
            migrate(self.database, backups)
            with self.database.write() as db:
                begin(db)
        except BaseException:
            self.database.close()
            raise
        self.changed = Condition()

    @classmethod
    def at(cls, path: Path) -> Self:
        """Open or make the SQLite file `path`."""
        return cls(f"sqlite:///{path}")

    def close(self) -> None:
        """Let go of the database and of the lead."""
        self.database.close()

    @contextmanager
    def _write(self) -> Iterator[Connection]:
        with DB_COMMIT_SECONDS.time(), self.database.write() as connection:
            yield connection
        with self.changed:
            self.changed.notify_all()

    def check_writable(self) -> None:
        """Take the writers' turn and give it back, changing nothing.

        Raises: CofuseError storage_full or store_unavailable when the database takes no writer.
        """
        with self._write():
            pass
