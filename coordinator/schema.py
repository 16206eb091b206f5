"""Which schema a database has, and how it gets another: by coordinator/migrations/.

What it has is read by hand: of all starts only those that upgrade something need alembic, whose
import takes a sixth of a start.
"""

import threading
from pathlib import Path
from typing import Final

from sqlalchemy import Connection, column, inspect, select, table

SCRIPTS: Final = Path(__file__).parent / "migrations"
NOTE: Final = "alembic_version"
"""The table where a database says which schema it has."""
_FIRST: Final = "0001"
ALEMBIC: Final = threading.Lock()
"""Its context is the whole process's; the engine brings its own database up beside ours."""


def noted_schema(connection: Connection) -> str | None:
    """The revision a database says it has; release 0.1 made no note."""
    if not inspect(connection).has_table(NOTE):
        return None
    noted: str | None = connection.scalar(select(column("version_num")).select_from(table(NOTE)))
    return noted


def schema_of(connection: Connection) -> str | None:
    """The revision of a database's schema; None when it holds nothing of ours."""
    noted = noted_schema(connection)
    if noted is None and inspect(connection).has_table("rounds"):
        return _FIRST
    return noted


def known_schemas(scripts: Path = SCRIPTS) -> list[str]:
    """Every revision this release knows, newest first; their files begin with their numbers."""
    files = (scripts / "versions").glob("[0-9]*_*.py")
    return sorted((file.name.partition("_")[0] for file in files), reverse=True)


def bring_to(connection: Connection, revision: str, scripts: Path = SCRIPTS) -> None:
    """Run the revisions up to `revision` inside the caller's transaction, and note it."""
    from alembic import command
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(scripts).replace("%", "%%"))
    config.set_main_option("path_separator", "os")
    config.attributes["connection"] = connection
    with ALEMBIC:
        if noted_schema(connection) is None and (found := schema_of(connection)):
            command.stamp(config, found)
        command.upgrade(config, revision)
