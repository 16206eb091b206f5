"""Which schema a database has, and how it gets another: by coordinator/migrations/."""

import threading
from pathlib import Path
from typing import Final

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, inspect

SCRIPTS: Final = Path(__file__).parent / "migrations"
_FIRST: Final = "0001"
ALEMBIC: Final = threading.Lock()
"""Its context is the whole process's; the engine brings its own database up beside ours."""


def noted_schema(connection: Connection) -> str | None:
    """The revision a database says it has; release 0.1 made no note."""
    return MigrationContext.configure(connection).get_current_revision()


def schema_of(connection: Connection) -> str | None:
    """The revision of a database's schema; None when it holds nothing of ours."""
    noted = noted_schema(connection)
    if noted is None and inspect(connection).has_table("rounds"):
        return _FIRST
    return noted


def known_schemas(scripts: Path = SCRIPTS) -> list[str]:
    """Every revision this release knows, newest first."""
    return [script.revision for script in ScriptDirectory(str(scripts)).walk_revisions()]


def bring_to(connection: Connection, revision: str, scripts: Path = SCRIPTS) -> None:
    """Run the revisions up to `revision` inside the caller's transaction, and note it."""
    config = Config()
    config.set_main_option("script_location", str(scripts).replace("%", "%%"))
    config.set_main_option("path_separator", "os")
    config.attributes["connection"] = connection
    with ALEMBIC:
        if noted_schema(connection) is None and (found := schema_of(connection)):
            command.stamp(config, found)
        command.upgrade(config, revision)
