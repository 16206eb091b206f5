"""Promises of an upgrade: a copy first, then all of it or nothing; never a schema unknown here."""

import shutil
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import text

from coordinator.database import Database, open_database
from coordinator.migrate import migrate
from coordinator.rounds import State
from coordinator.schema import SCRIPTS, known_schemas, schema_of
from coordinator.store import Store
from coordinator.store_errors import StoreError
from coordinator.tables import META

OLD = Path(__file__).parents[1] / "data" / "coordinator-0.1.sql"
"""A database as release 0.1 wrote it: two participants, three rounds, two pivots."""


def old_database(folder: Path) -> Path:
    path = folder / "coordinator.sqlite"
    with sqlite3.connect(path) as connection:
        connection.executescript(OLD.read_text(encoding="utf-8"))
    connection.close()
    return path


def rows_of(path: Path) -> dict[str, list[Any]]:
    """All rows of the tables that release 0.1 had, with the columns it had."""
    old = sqlite3.connect(":memory:")
    old.executescript(OLD.read_text(encoding="utf-8"))
    connection = sqlite3.connect(path)
    rows = {}
    for (table,) in old.execute("SELECT name FROM sqlite_master WHERE type = 'table'"):
        columns = ", ".join(c[1] for c in old.execute(f"PRAGMA table_info({table})"))
        rows[table] = connection.execute(f"SELECT {columns} FROM {table} ORDER BY 1, 2").fetchall()
    old.close()
    connection.close()
    return rows


def next_release(folder: Path, *lines: str) -> Path:
    """The revisions of this release and one more, whose upgrade() has these lines."""
    scripts = folder / "migrations"
    shutil.copytree(SCRIPTS, scripts)
    body = "".join(f"    {line}\n" for line in lines)
    (scripts / "versions" / "9999_next.py").write_text(
        f"from alembic import op\nrevision = '9999'\ndown_revision = {known_schemas()[0]!r}\n"
        f"def upgrade():\n{body}"
    )
    return scripts


def schema(database: Database) -> str | None:
    with database.read() as connection:
        return schema_of(connection)


@pytest.mark.parametrize("kind", ["sqlite", "postgres"])
def test_the_revisions_make_the_tables_that_the_program_has(
    kind: str, request: pytest.FixtureRequest
) -> None:
    """When this fails, coordinator/tables.py was changed without a revision: add one."""
    url = request.getfixturevalue("new_postgres")() if kind == "postgres" else "sqlite://"
    store = Store(url)
    with store.database.snapshot() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, META) == []
    store.close()


def test_the_names_of_the_files_tell_every_revision_in_order() -> None:
    """The program reads these names alone; alembic follows what the files say of each other."""
    revisions = ScriptDirectory(str(SCRIPTS)).walk_revisions()
    assert known_schemas() == [each.revision for each in revisions]


def test_a_database_of_the_first_release_goes_on(tmp_path: Path) -> None:
    path = old_database(tmp_path)
    before = rows_of(path)
    store = Store.at(path)
    assert [row.state for row in store.rounds()] == [
        State.PUBLISHED,
        State.COLLECTING,
        State.SUBMITTED,
    ]
    assert store.participants()["st-mary"].node_id == 2**64 - 5
    assert schema(store.database) == known_schemas()[0]
    store.close()
    assert rows_of(path) == before
    copies = list(tmp_path.glob("coordinator.before-*.sqlite"))
    assert len(copies) == 1
    assert rows_of(copies[0]) == before
    Store.at(path).close()
    assert list(tmp_path.glob("coordinator.before-*.sqlite")) == copies, "nothing was left to do"


def test_a_new_database_needs_no_copy(tmp_path: Path) -> None:
    Store.at(tmp_path / "coordinator.sqlite").close()
    assert not list(tmp_path.glob("*before*"))


def test_a_newer_schema_is_refused_and_left_alone(tmp_path: Path) -> None:
    store = Store.at(tmp_path / "coordinator.sqlite")
    with store.database.write() as db:
        db.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    store.close()
    with pytest.raises(StoreError, match=r"has schema 9999; this release knows 0001 to .* newer"):
        Store.at(tmp_path / "coordinator.sqlite")
    database = open_database(f"sqlite:///{tmp_path}/coordinator.sqlite")
    assert schema(database) == "9999"
    database.close()
    assert not list(tmp_path.glob("*before*"))


@pytest.mark.parametrize("kind", ["sqlite", "postgres"])
def test_an_upgrade_that_breaks_leaves_the_old_schema_and_a_copy(
    kind: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    new_postgres: Callable[[], str] | None = None
    if kind == "postgres":
        new_postgres = request.getfixturevalue("new_postgres")
    url = new_postgres() if new_postgres else f"sqlite:///{tmp_path}/coordinator.sqlite"
    store = Store(url)
    store.upsert_participant("st-mary", 1, b"key")
    add = "op.execute('ALTER TABLE participants ADD COLUMN ward VARCHAR(9)')"
    broken = next_release(tmp_path, add, "raise OSError('the power went')")
    with pytest.raises(OSError, match="power"):
        migrate(store.database, tmp_path, scripts=broken)
    assert schema(store.database) == known_schemas()[0]
    assert list(store.participants()) == ["st-mary"]
    with store.database.read() as connection, pytest.raises(Exception, match="ward"):
        connection.execute(text("SELECT ward FROM participants"))
    [copy] = tmp_path.glob("coordinator.before-9999-*.sqlite")
    assert sqlite3.connect(copy).execute("SELECT name FROM participants").fetchall() == [
        ("st-mary",)
    ]
    shutil.rmtree(broken)
    migrate(store.database, tmp_path, scripts=next_release(tmp_path, add))
    assert schema(store.database) == "9999"
    store.close()


def test_an_upgrade_waits_for_nobody_who_still_serves(tmp_path: Path) -> None:
    serving = Store(f"sqlite:///{tmp_path}/coordinator.sqlite", lead=True)
    other = open_database(f"sqlite:///{tmp_path}/coordinator.sqlite")
    with pytest.raises(StoreError, match="led by another coordinator"):
        migrate(other, tmp_path, scripts=next_release(tmp_path, "pass"))
    assert not list(tmp_path.glob("*before*"))
    other.close()
    serving.close()
