"""Promises of the database: what write() has left is on disk, failures stay alone, one leads."""

import contextlib
import os
import resource
import signal
import subprocess
import sys
import threading
from collections import namedtuple
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import psycopg
import pytest
from sqlalchemy import event, text

from coordinator import database as database_module
from coordinator.database import Database, open_database
from coordinator.sqlite import file_system, is_network
from coordinator.store_errors import StoreError
from protos.errors import CofuseError

DATABASES = ["sqlite", "postgres"]


@pytest.fixture(params=DATABASES)
def url(request: Any, tmp_path: Path) -> str:
    if request.param == "postgres":
        return str(request.getfixturevalue("new_postgres")())
    return f"sqlite:///{tmp_path}/base.sqlite"


@pytest.fixture
def base(url: str) -> Iterator[Database]:
    database = open_database(url)
    with database.write() as db:
        db.execute(text("CREATE TABLE t (n INTEGER PRIMARY KEY, body TEXT)"))
    yield database
    database.close()


def put(database: Database, number: int, body: str = "") -> None:
    with database.write() as db:
        db.execute(text("INSERT INTO t VALUES (:n, :body)"), {"n": number, "body": body})


def numbers(database: Database) -> set[int]:
    with database.read() as db:
        return set(db.scalars(text("SELECT n FROM t")))


def behind_one_writer(database: Database, writers: list[Callable[[], None]]) -> None:
    """Run the writers so that all of them wait while one works."""
    threads = [threading.Thread(target=writer) for writer in writers]
    with contextlib.suppress(CofuseError), database.write():
        for thread in threads:
            thread.start()
        while database._waiting < len(threads):
            threading.Event().wait(0.005)
    for thread in threads:
        thread.join()


def test_writers_that_wait_share_one_commit(base: Database) -> None:
    commits = []
    event.listen(base.engine, "commit", lambda _: commits.append(1))
    behind_one_writer(base, [lambda n=n: put(base, n) for n in range(12)])
    assert numbers(base) == set(range(12))
    assert len(commits) == 1


def test_the_failure_of_one_writer_touches_no_other(base: Database) -> None:
    put(base, 5)
    failed = []

    def write(number: int) -> None:
        try:
            put(base, number)
        except Exception:  # noqa: BLE001 - which one, the assertion says
            failed.append(number)

    behind_one_writer(base, [lambda n=n: write(n) for n in range(9)])
    assert failed == [5]
    assert numbers(base) == set(range(9))


def put_and_raise(database: Database, error: type[BaseException]) -> None:
    with database.write() as db:
        db.execute(text("INSERT INTO t VALUES (1, '')"))
        raise error


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_what_ends_by_an_exception_never_happened(
    base: Database, error: type[BaseException]
) -> None:
    with pytest.raises(error):
        put_and_raise(base, error)
    put(base, 2)
    assert numbers(base) == {2}


def test_a_reader_sees_nothing_half_done(base: Database) -> None:
    with base.write() as db:
        db.execute(text("INSERT INTO t VALUES (1, '')"))
        assert numbers(base) == set()
    assert numbers(base) == {1}


def test_a_snapshot_stays_at_its_moment(base: Database) -> None:
    put(base, 1)
    with base.snapshot() as db:
        before = db.scalar(text("SELECT count(*) FROM t"))
        put(base, 2)
        assert db.scalar(text("SELECT count(*) FROM t")) == before == 1


_CHILD = """
import sys, threading
from sqlalchemy import text
from coordinator.database import open_database
database = open_database(sys.argv[1])
database.lead()
def work(first):
    for n in range(first, 10**6, 4):
        with database.write() as db:
            db.execute(text("INSERT INTO t VALUES (:n, '')"), {"n": n})
        sys.stdout.write(f"{n}\\n"); sys.stdout.flush()
for first in range(4):
    threading.Thread(target=work, args=(first,)).start()
"""


def test_whatever_was_told_survives_a_kill_and_the_lead_is_free(base: Database, url: str) -> None:
    command = [sys.executable, "-c", _CHILD, url]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        told = {int(child.stdout.readline()) for _ in range(60)}
        with pytest.raises(StoreError, match=f"pid {child.pid}"):
            base.lead()
        child.send_signal(signal.SIGKILL)
        told |= {int(line) for line in child.stdout.read().split("\n")[:-1]}
    assert told <= numbers(base)
    base.lead()


def test_only_one_leads(base: Database, url: str) -> None:
    other = open_database(url)
    base.lead()
    base.lead()
    with pytest.raises(StoreError, match=f"led by another coordinator.*pid {os.getpid()}"):
        other.lead()
    base.follow()
    other.lead()
    other.close()
    base.lead()


# ------------------------------------------------------------------------------------ SQLite


@pytest.fixture
def file(tmp_path: Path) -> Iterator[Database]:
    database = open_database(f"sqlite:///{tmp_path}/base.sqlite")
    with database.write() as db:
        db.execute(text("CREATE TABLE t (n INTEGER PRIMARY KEY, body TEXT)"))
    yield database
    database.close()


def test_a_full_disk_is_said_and_passes(file: Database) -> None:
    with file.write() as db:
        pages = db.execute(text("PRAGMA page_count")).scalar_one()
        db.execute(text(f"PRAGMA max_page_count={pages + 8}"))
    told, refused = list[int](), list[str]()

    def write(number: int) -> None:
        try:
            put(file, number, "x" * 9000)
            told.append(number)
        except CofuseError as error:
            refused.append(error.error_id)

    behind_one_writer(file, [lambda n=n: write(n) for n in range(8)])
    assert set(refused) == {"storage_full"}
    assert set(told) == numbers(file)
    with file.write() as db:
        db.execute(text("PRAGMA max_page_count=100000"))
    put(file, 100, "x" * 9000)
    assert numbers(file) == {*told, 100}


def test_after_a_failed_write_to_the_disk_nothing_is_promised_any_more(file: Database) -> None:
    """A limit on file sizes makes the kernel refuse the write, as a broken disk does."""
    reasons: list[str] = []
    file.on_fatal = reasons.append
    put(file, 1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    log = Path(file.dialect.name + "-wal").stat().st_size
    resource.setrlimit(resource.RLIMIT_FSIZE, (log + 100, hard))
    try:
        with pytest.raises(CofuseError, match="SQLITE_IOERR"):
            put(file, 2, "x" * 9000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    with pytest.raises(CofuseError, match="SQLITE_IOERR"):
        put(file, 3)
    assert len(reasons) == 1
    assert numbers(file) == {1}, "reading goes on"


def test_a_damaged_file_is_refused(file: Database, tmp_path: Path) -> None:
    for number in range(50):
        put(file, number, "x" * 3000)
    file.check()
    file.close()
    path = tmp_path / "base.sqlite"
    content = bytearray(path.read_bytes())
    content[8192:12288] = os.urandom(4096)
    path.write_bytes(content)
    with pytest.raises(StoreError, match="restore"):
        open_database(f"sqlite:///{path}").check()


def test_what_is_no_database_is_refused(tmp_path: Path) -> None:
    (tmp_path / "base.sqlite").write_bytes(b"not a database, but long enough to be looked at" * 99)
    with pytest.raises(StoreError, match="cannot be opened"):
        open_database(f"sqlite:///{tmp_path}/base.sqlite")
    with pytest.raises(StoreError, match="cannot be opened"):
        open_database(f"sqlite:///{tmp_path}/no/folder/base.sqlite")


def test_a_path_with_odd_characters_is_that_file(tmp_path: Path) -> None:
    path = tmp_path / "50% #1?.sqlite"
    open_database(f"sqlite:///{path}").close()
    assert path.exists()


Mount = namedtuple("Mount", "mountpoint fstype")
MOUNTS = [
    Mount("/", "ext4"),
    Mount("/srv", "nfs4"),
    Mount("/srv/local", "xfs"),
    Mount("/srv/old", "nfs"),
    Mount("/srv/old", "btrfs"),
]


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/data/x", "ext4"),
        ("/srv/data/x", "nfs4"),
        ("/srv/local/x", "xfs"),
        ("/srv/old/x", "btrfs"),
        ("/srvx/y", "ext4"),
    ],
)
def test_the_deepest_and_latest_mount_holds_a_path(path: str, kind: str) -> None:
    assert file_system(Path(path), MOUNTS) == kind


def test_shared_file_systems_are_known() -> None:
    shared = ["nfs", "nfs4", "cifs", "smb3", "9p", "fuse.sshfs", "fuse.glusterfs", "lustre", "ceph"]
    local = ["ext4", "xfs", "btrfs", "zfs", "tmpfs", "overlay", "apfs", "fuseblk", "unknown"]
    assert all(map(is_network, shared))
    assert not any(map(is_network, local))


def test_sqlite_refuses_a_network_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mounts = [Mount("/", "ext4"), Mount(str(tmp_path), "nfs4")]
    monkeypatch.setattr(psutil, "disk_partitions", lambda all: mounts)
    with pytest.raises(StoreError, match=r"nfs4.*PostgreSQL"):
        open_database(f"sqlite:///{tmp_path}/base.sqlite")
    assert list(tmp_path.iterdir()) == []


def test_another_kind_of_database_is_refused_with_the_right_form() -> None:
    with pytest.raises(StoreError, match=r"postgresql\+psycopg://"):
        open_database("mysql://u@h/d")


# -------------------------------------------------------------------------------- PostgreSQL


@pytest.fixture
def server(new_postgres: Callable[[], str]) -> Iterator[tuple[Database, Callable[[], None]]]:
    """A database on PostgreSQL, and what cuts the connections of its writers."""
    url = new_postgres()
    database = open_database(url)
    with database.write() as db:
        db.execute(text("CREATE TABLE t (n INTEGER PRIMARY KEY, body TEXT)"))

    def cut() -> None:
        with psycopg.connect(url.replace("+psycopg", ""), autocommit=True) as admin:
            admin.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
                "WHERE application_name LIKE 'cofuse%' AND pid <> pg_backend_pid()"
            )

    yield database, cut
    database.close()


def test_a_lost_connection_costs_at_most_the_write_at_hand(server: Any) -> None:
    database, cut = server
    database.lead()
    put(database, 1)
    cut()
    put(database, 2)

    def put_with_a_cut() -> None:
        with database.write() as db:
            db.execute(text("INSERT INTO t VALUES (3, '')"))
            cut()
            db.execute(text("INSERT INTO t VALUES (4, '')"))

    with pytest.raises(CofuseError) as caught:
        put_with_a_cut()
    assert caught.value.error_id == "store_unavailable"
    put(database, 5)
    assert numbers(database) == {1, 2, 5}


def test_who_lost_the_lead_never_writes_again(server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    database, cut = server
    reasons: list[str] = []
    database.on_fatal = reasons.append
    monkeypatch.setattr(database_module, "_RECONNECT_S", 0.5)
    database.lead()
    put(database, 1)
    cut()
    other = open_database(database.engine.url.render_as_string(hide_password=False))
    other.lead()
    put(other, 2)
    for number in (3, 4):
        with pytest.raises(CofuseError, match="led by another"):
            put(database, number)
    assert len(reasons) == 1
    other.close()
    with pytest.raises(CofuseError, match="led by another"):
        put(database, 5)
    assert numbers(database) == {1, 2}


def test_two_that_do_not_lead_write_in_turn(new_postgres: Callable[[], str]) -> None:
    """As on SQLite: a read and a write of one transaction are not torn apart by another program."""
    url = new_postgres()
    bases = [open_database(url) for _ in range(2)]
    with bases[0].write() as db:
        db.execute(text("CREATE TABLE t (n INTEGER PRIMARY KEY, body TEXT)"))

    def grow(database: Database) -> None:
        for _ in range(15):
            with database.write() as db:
                highest = db.scalar(text("SELECT coalesce(max(n), 0) FROM t"))
                db.execute(text("INSERT INTO t VALUES (:n, '')"), {"n": highest + 1})

    threads = [threading.Thread(target=grow, args=(database,)) for database in bases * 2]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert numbers(bases[0]) == set(range(1, 61))
    for database in bases:
        database.close()


def test_every_connection_waits_for_the_disk(new_postgres: Callable[[], str]) -> None:
    url = new_postgres().replace("&options=", "&options=-csynchronous_commit%3Doff%20")
    database = open_database(url)
    with database.write() as db:
        assert db.scalar(text("SHOW synchronous_commit")) == "on"
    database.close()


def test_a_server_that_is_not_there_is_said_without_the_password(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="does not answer") as caught:
        open_database(f"postgresql+psycopg://ada:secret@/d?host={tmp_path}")
    assert "secret" not in str(caught.value)
