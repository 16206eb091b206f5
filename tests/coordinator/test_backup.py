"""Promises of a backup: whole or invisible, made while others write, never put over data."""

import json
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import MetaData, select

from coordinator import backup as backup_module
from coordinator.artifacts import Artifacts
from coordinator.backup import Made, back_up, restore
from coordinator.clock import now_unix_ms
from coordinator.fsck import fsck
from coordinator.store import Store
from coordinator.store_errors import StoreError
from tests.coordinator.archive import Archive, make_archive


@pytest.fixture
def archive(tmp_path: Path) -> Iterator[Archive]:
    archive = make_archive(tmp_path / "data", "sqlite://")
    yield archive
    archive.store.close()


@pytest.fixture
def on_disk(tmp_path: Path) -> Iterator[Archive]:
    archive = make_archive(tmp_path / "data")
    yield archive
    archive.store.close()


def save(archive: Archive, folder: Path) -> Made:
    return back_up(archive.store.database, archive.artifacts, folder)


def bring_back(source: Path, folder: Path, url: str = "") -> Store:
    """A store restored from `source`; fsck has found nothing."""
    url = url or f"sqlite:///{folder}/coordinator.sqlite"
    assert restore(source, url, folder).findings == ()
    return Store(url)


def all_rows(store: Store) -> dict[str, list[Any]]:
    tables = MetaData()
    with store.database.snapshot() as db:
        tables.reflect(db)
        return {
            table.name: [tuple(r) for r in db.execute(select(table).order_by(*table.primary_key))]
            for table in tables.sorted_tables
        }


def test_what_was_saved_comes_back_elsewhere(on_disk: Archive, tmp_path: Path) -> None:
    save(on_disk, tmp_path / "backup")
    again = bring_back(tmp_path / "backup", tmp_path / "new")
    assert all_rows(again) == all_rows(on_disk.store)
    ours, theirs = (
        {p.name: p.read_bytes() for p in (f / "artifacts/objects").rglob("*") if p.is_file()}
        for f in (on_disk.folder, tmp_path / "new")
    )
    assert ours == theirs
    again.close()


def test_a_backup_under_load_has_every_receipt_given_before_it(
    on_disk: Archive, tmp_path: Path
) -> None:
    stop = threading.Event()
    given: list[str] = []

    def write() -> None:
        while not stop.is_set():
            round_id = on_disk.collecting(f"more-{len(given)}", "pivot-0")
            on_disk.contribute(round_id, "st-mary")
            given.append(round_id)

    writer = threading.Thread(target=write)
    writer.start()
    try:
        while len(given) < 3:
            stop.wait(0.01)
        before = list(given)
        save(on_disk, tmp_path / "backup")
    finally:
        stop.set()
        writer.join()
    again = bring_back(tmp_path / "backup", tmp_path / "new")
    for round_id in before:
        assert again.contributions(round_id)[1].status == "committed"
    again.close()


def test_the_next_backup_copies_only_what_is_new(archive: Archive, tmp_path: Path) -> None:
    first = save(archive, tmp_path / "backup")
    assert first.copied_bytes > 0
    archive.contribute("rnd-3", "st-luke")
    later = save_later(archive, tmp_path / "backup")
    assert later.copied_bytes == len(b"logits of st-luke for rnd-3")
    assert later.objects == first.objects + 1
    again = bring_back(first.contents, tmp_path / "new")
    assert [c.status for c in again.contributions("rnd-3")] == ["assigned", "committed"]
    again.close()
    newest = bring_back(tmp_path / "backup", tmp_path / "newest")
    assert [c.status for c in newest.contributions("rnd-3")] == ["committed", "committed"]
    newest.close()


def save_later(archive: Archive, folder: Path) -> Made:
    """Backups have names of a second: wait for the next one."""
    while True:
        try:
            return save(archive, folder)
        except StoreError as error:
            if "this very second" not in str(error):
                raise
            threading.Event().wait(0.1)


def test_an_interrupted_backup_is_none(
    archive: Archive, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "backup"

    def no_power(*_: object) -> int:
        raise OSError("the power went")

    with monkeypatch.context() as patch:
        patch.setattr(backup_module, "_copy_object", no_power)
        with pytest.raises(OSError, match="power"):
            save(archive, folder)
    with pytest.raises(StoreError, match="holds no backup"):
        restore(folder, f"sqlite:///{tmp_path}/x.sqlite", tmp_path / "new")
    save(archive, folder)
    bring_back(folder, tmp_path / "new").close()


def test_a_backup_without_all_files_is_refused(archive: Archive, tmp_path: Path) -> None:
    [part] = [c for c in archive.store.contributions("rnd-3") if c.sha256]
    archive.artifacts.path(part.sha256).unlink()
    with pytest.raises(StoreError, match=r"contribution of st-mary to rnd-3.* is missing"):
        save(archive, tmp_path / "backup")


def test_a_file_damaged_at_home_is_not_saved_as_good(archive: Archive, tmp_path: Path) -> None:
    [part] = [c for c in archive.store.contributions("rnd-3") if c.sha256]
    path = archive.artifacts.path(part.sha256)
    path.write_bytes(path.read_bytes()[::-1])
    with pytest.raises(StoreError, match="damaged on disk"):
        save(archive, tmp_path / "backup")


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-9])


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda folder: _cut(next(folder.glob("*.sqlite"))), "changed or damaged"),
        (
            lambda folder: next(folder.glob("*.sqlite")).unlink(),
            "is missing; the backup is not whole",
        ),
        (lambda folder: _cut(next(folder.glob("*.json"))), "cannot be read"),
        (lambda folder: shutil.rmtree(next((folder / "objects").iterdir())), "not whole"),
        (lambda folder: _cut(next(folder.glob("objects/*/*"))), "is damaged"),
    ],
)
def test_a_damaged_backup_is_refused_before_anything_is_believed(
    archive: Archive, tmp_path: Path, damage: Callable[[Path], object], says: str
) -> None:
    folder = tmp_path / "backup"
    save(archive, folder)
    damage(folder)
    with pytest.raises(StoreError, match=says):
        restore(folder, f"sqlite:///{tmp_path}/new/coordinator.sqlite", tmp_path / "new")
    assert not (tmp_path / "new" / "coordinator.sqlite").exists()


def test_nothing_is_overwritten(on_disk: Archive, tmp_path: Path) -> None:
    save(on_disk, tmp_path / "backup")
    rows = all_rows(on_disk.store)
    with pytest.raises(StoreError, match="nothing is ever overwritten"):
        restore(tmp_path / "backup", on_disk.url, on_disk.folder)
    assert all_rows(on_disk.store) == rows
    on_disk.store.database.lead()
    with pytest.raises(StoreError, match="led by another"):
        restore(tmp_path / "backup", on_disk.url, on_disk.folder)


def test_no_key_is_in_a_backup(archive: Archive, tmp_path: Path) -> None:
    (archive.folder.parent / "ca").mkdir()
    (archive.folder.parent / "ca" / "key.pem").write_text("PRIVATE KEY")
    save(archive, tmp_path / "backup")
    files = [path for path in (tmp_path / "backup").rglob("*") if path.is_file()]
    assert not any(b"PRIVATE KEY" in path.read_bytes() for path in files)
    [contents] = (tmp_path / "backup").glob("*.json")
    assert set(json.loads(contents.read_text())["objects"]) == {
        path.name for path in files if path.parent.parent.name == "objects"
    }


def test_the_copy_before_an_upgrade_comes_back_to_its_files(
    on_disk: Archive, tmp_path: Path
) -> None:
    """The way back after an upgrade: the database alone, into the same data folder."""
    from coordinator.copying import save_copy

    copy = on_disk.folder / "coordinator.before-0002-20260101T000000Z.sqlite"
    save_copy(on_disk.store.database, copy)
    rows = all_rows(on_disk.store)
    on_disk.store.close()
    (on_disk.folder / "coordinator.sqlite").rename(tmp_path / "aside")
    again = bring_back(copy, on_disk.folder)
    assert all_rows(again) == rows
    again.close()


def test_a_federation_moves_to_postgres_and_back(
    archive: Archive, tmp_path: Path, new_postgres: Callable[[], str]
) -> None:
    rows = all_rows(archive.store)
    save(archive, tmp_path / "one")
    moved = bring_back(tmp_path / "one", tmp_path / "on-postgres", new_postgres())
    assert all_rows(moved) == rows
    round_id = moved.submit_round(
        request_id="next", submitted_by="ada", spec_json="{}", deadline_ms=1000
    ).round_id
    assert round_id == "rnd-4", "numbers go on after those that were copied"
    artifacts = Artifacts(tmp_path / "on-postgres" / "artifacts")
    assert fsck(moved.database, artifacts, now_unix_ms()).findings == ()
    back_up(moved.database, artifacts, tmp_path / "two")
    back = bring_back(tmp_path / "two", tmp_path / "back")
    assert all_rows(back) == all_rows(moved)
    back.close()
    moved.close()
