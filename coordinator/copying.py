"""A whole database as one SQLite file, and back: for backups, upgrades, and moving to PostgreSQL.

The file is the same whichever database it came from, and needs no other program to be made or read.
"""

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from sqlalchemy import Connection, MetaData, create_engine, func, insert, inspect, select, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.pool import NullPool

from coordinator.database import Database, open_database
from coordinator.schema import NOTE, bring_to, known_schemas, schema_of
from coordinator.store_errors import StoreError
from protos.files import flush

_ROWS: Final = 1000


def save_copy(source: Database, target: Path) -> None:
    """Write what `source` holds at one moment to the new file `target`; writers go on meanwhile.

    The file appears whole or not at all, and is durable then.
    Raises: StoreError or OSError when it cannot be written.
    """
    with source.snapshot() as rows:
        driver: Any = rows.connection.driver_connection
        if isinstance(driver, sqlite3.Connection):
            _save_file(driver, target)
            return
        memory = open_database("sqlite://")
        try:
            with memory.write() as connection:
                _copy_rows(rows, connection)
            with memory.read() as connection:
                driver = connection.connection.driver_connection
                _save_file(driver, target)
        finally:
            memory.close()


def load_copy(copy: Path, target: Database) -> None:
    """Fill the empty database `target` with what is in the file, in one transaction.

    Raises: StoreError when the target is not empty, or the file is no sound copy.
    """
    with reading_copy(copy) as rows, target.write() as connection:
        if tables := inspect(connection).get_table_names():
            raise StoreError(
                f"{target.dialect.name} holds {len(tables)} tables; wanted an empty database: "
                "nothing is ever overwritten. Move it away, or name another one"
            )
        _copy_rows(rows, connection)


@contextmanager
def reading_copy(copy: Path) -> Iterator[Connection]:
    """A saved file for reading; nothing is written beside it, so it may lie anywhere.

    Raises: StoreError when it is no sound copy of a coordinator's database.
    """
    if not copy.is_file():
        raise StoreError(f"{copy}: no such file; wanted a copy of a coordinator's database")
    uri = f"{copy.resolve().as_uri()}?mode=ro&immutable=1"
    engine = create_engine(
        "sqlite://", creator=lambda: sqlite3.connect(uri, uri=True), poolclass=NullPool
    )
    try:
        with engine.connect() as rows:
            found = str(rows.exec_driver_sql("PRAGMA quick_check(1)").scalar())
            if found != "ok":
                raise StoreError(f"{copy} is damaged: {found}; take an older copy")
            if (schema := schema_of(rows)) not in known_schemas():
                raise StoreError(
                    f"{copy} has schema {schema}; this release knows {', '.join(known_schemas())}. "
                    "Take a copy of a coordinator's database, and the release that made it"
                )
            yield rows
    except DBAPIError as error:
        raise StoreError(f"{copy} is damaged: {error.orig}; take an older copy") from error
    finally:
        engine.dispose()


def _save_file(driver: sqlite3.Connection, target: Path) -> None:
    partial = target.with_name(target.name + ".partial")
    partial.unlink(missing_ok=True)
    try:
        _write_file(driver, partial)
    except sqlite3.Error as error:
        raise StoreError(
            f"{target} cannot be written: {error}; wanted a folder with room for a copy of the "
            "database. Free space or name another one, and run it again"
        ) from error
    flush(partial)
    partial.rename(target)
    flush(target.parent)


def _write_file(driver: sqlite3.Connection, path: Path) -> None:
    # Nobody else knows the file yet: without locks it may lie on a network disk, too.
    copy = sqlite3.connect(f"{path.resolve().as_uri()}?vfs=unix-none", uri=True)
    try:
        copy.execute("PRAGMA locking_mode=EXCLUSIVE")
        driver.backup(copy)
        copy.execute("PRAGMA journal_mode=DELETE")  # one file, without a log beside it
    finally:
        copy.close()


def _copy_rows(rows: Connection, target: Connection) -> None:
    """Make the same schema in `target`, then copy every table."""
    schema = schema_of(rows)
    assert schema is not None
    bring_to(target, schema)
    tables = MetaData()
    tables.reflect(target)
    for table in tables.sorted_tables:
        if table.name == NOTE:
            continue
        for part in rows.execute(select(table)).mappings().partitions(_ROWS):
            target.execute(insert(table), [dict(row) for row in part])
        if target.dialect.name == "postgresql":
            _set_sequence(target, table)


def _set_sequence(target: Connection, table: Any) -> None:
    """Let PostgreSQL number new rows after the highest: copied numbers do not move its counter."""
    for column in table.primary_key:
        query = text("SELECT pg_get_serial_sequence(:table, :column)")
        names = {"table": table.name, "column": column.name}
        sequence = target.execute(query, names).scalar()
        highest = target.scalar(select(func.max(column))) if sequence else None
        if highest is not None:
            target.execute(select(func.setval(sequence, highest)))
