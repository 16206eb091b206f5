"""Flower's database, migrated once for all the coordinators of a test process.

A new one takes Flower's migrations a second of a core each time; a copy of an empty, migrated one
is the same file. Programs that a test starts make their own, as always.
"""

import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="session", autouse=True)
def ready_made_flower_state(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Fill every new database of Flower's from one that its own migrations made."""
    from flwr.supercore import sql_mixin

    template = tmp_path_factory.mktemp("flower") / "empty.sqlite"
    migrate = sql_mixin.run_migrations
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sql_mixin, "run_migrations", _copying(template, migrate))
        yield


def _copying(template: Path, migrate: Callable[[Any], None]) -> Callable[[Any], None]:
    def run(engine: Any) -> None:
        database = Path(engine.url.database)
        if database.exists() and database.stat().st_size:
            migrate(engine)
        elif template.exists():
            _copy(template, database)
        else:
            migrate(engine)
            _copy(database, template)

    return run


def _copy(source: Path, target: Path) -> None:
    with sqlite3.connect(source) as one, sqlite3.connect(target) as other:
        one.backup(other)
    one.close()
    other.close()
