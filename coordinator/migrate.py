"""Bring a database to this release's schema: all of it or nothing, and a copy first.

A new database gets the schema; one of release 0.1, which took no note of its schema, is taken as
revision 0001; one of a newer release is refused, because this program would not understand it.
"""

import time
from pathlib import Path

from coordinator.copying import save_copy
from coordinator.database import Database
from coordinator.schema import SCRIPTS, bring_to, known_schemas, noted_schema, schema_of
from coordinator.store_errors import StoreError


def migrate(database: Database, backups: Path | None = None, scripts: Path = SCRIPTS) -> None:
    """Upgrade where needed; a crash in between leaves the old schema.

    Args: backups: folder for the copy made first, default the one of the SQLite file.
    Raises: StoreError when the schema is newer than this program, when another coordinator leads
        the database, or when there is no place for the copy.
    """
    known = known_schemas(scripts)
    with database.read() as connection:
        if noted_schema(connection) == known[0]:
            return
    with database.leading():
        with database.read() as connection:
            found = schema_of(connection)
        if found is not None:
            _refuse_newer(database, found, known)
            _keep_copy(database, backups, known[0])
        with database.write() as connection:
            bring_to(connection, known[0], scripts)


def _refuse_newer(database: Database, found: str, known: list[str]) -> None:
    if found not in known:
        raise StoreError(
            f"{database.dialect.name} has schema {found}; this release knows {known[-1]} to "
            f"{known[0]}: a newer release wrote it. Install that release again, or restore the "
            "copy its upgrade made first: cofuse coordinator restore HOME coordinator.before-*"
        )


def _keep_copy(database: Database, backups: Path | None, wanted: str) -> None:
    """Save what the upgrade is going to change. A copy of an earlier, failed try stays too."""
    folder = backups or database.dialect.folder
    if folder is None:
        raise StoreError(
            f"{database.dialect.name} needs an upgrade, and there is no folder for the copy that "
            "is made first. Set data_dir in coordinator.toml"
        )
    stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
    save_copy(database, folder / f"coordinator.before-{wanted}-{stamp}.sqlite")
