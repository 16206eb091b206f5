"""Backups while the coordinator serves, and the way back.

A backup folder holds, for each backup, `TIME.sqlite` (the database) and `TIME.json` (what belongs
to it, with digests), and for all of them together `objects/ab/abcd...`: files named by their
sha256, which never change, so the next backup copies only new ones. Keys are not in it, on
purpose: keep ca/ and tls/ of the coordinator's folder in a safe.
"""

import os
import re
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from pydantic import BaseModel, ConfigDict, ValidationError

from coordinator.artifacts import Artifacts, open_artifacts
from coordinator.clock import now_unix_ms
from coordinator.copying import load_copy, reading_copy, save_copy
from coordinator.database import Database, open_database
from coordinator.fsck import Verdict, fsck
from coordinator.migrate import migrate
from coordinator.records import read_records
from coordinator.schema import schema_of
from coordinator.store_errors import StoreError
from protos.chunks import sha256_of
from protos.files import flush, make_folder, settle
from protos.messages import Sha256

_TIME: Final = re.compile(r"[0-9]{8}T[0-9]{6}Z")


class Contents(BaseModel):
    """TIME.json: what a backup consists of."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    made: str
    """UTC, as in the file's name."""
    schema_revision: str
    database: str
    """Where the rows came from, for people."""
    database_sha256: Sha256
    objects: dict[Sha256, int]
    """Size in bytes by digest."""


@dataclass(frozen=True, slots=True)
class Made:
    """What a backup wrote."""

    contents: Path
    objects: int
    copied_bytes: int
    """Of objects that were not in the folder yet."""


def back_up(database: Database, artifacts: Artifacts, folder: Path) -> Made:
    """Save everything that receipts, pivots and rounds need; it is durable when this returns.

    The database is read at one moment, and the files it names are there already (bytes come
    before rows) and never change: so no writer has to wait, and an interrupted backup is only
    files without a TIME.json. Run it again.
    Raises: StoreError when a file is missing or damaged, naming it; that or OSError when the
        folder takes no more.
    """
    made = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
    final, rows = folder / f"{made}.json", folder / f"{made}.sqlite"
    if final.exists():
        raise StoreError(f"{final} was made this very second; wait one, and run it again")
    settle(folder / "objects")
    save_copy(database, rows)
    with reading_copy(rows) as connection:
        records, schema = read_records(connection), schema_of(connection)
    sizes: dict[str, int] = {}
    copied = 0
    for needed in records.needed():
        if needed.sha256 in sizes:
            continue
        if not artifacts.has(needed.sha256):
            raise StoreError(
                f"{needed.sha256} ({needed.what}) is missing: a backup without it would be one "
                "in name only. See what else is with: cofuse coordinator fsck HOME"
            )
        source = artifacts.path(needed.sha256)
        sizes[needed.sha256] = source.stat().st_size
        copied += _copy_object(source, needed.sha256, folder)
    contents = Contents(
        made=made,
        schema_revision=str(schema),
        database=database.dialect.name,
        database_sha256=sha256_of(rows),
        objects=sizes,
    )
    partial = folder / f"{made}.json.partial"
    partial.write_text(contents.model_dump_json(indent=1) + "\n", encoding="utf-8")
    flush(partial)
    partial.rename(final)
    flush(folder)
    return Made(final, len(sizes), copied)


def restore(source: Path, url: str, data_dir: Path, artifacts_url: str | None = None) -> Verdict:
    """Fill an empty data folder and database from a backup, check all of it, and upgrade it.

    Args: source: a backup folder (its newest backup is taken), a TIME.json of one, or the .sqlite
        copy alone, for files that are still in data_dir.
    Returns: what fsck says of the result.
    Raises: StoreError when something is there already, or the backup is not whole; what was
        copied before that does no harm, and is used by the next try.
    """
    contents, rows, objects = _find(source)
    make_folder(data_dir)
    artifacts = open_artifacts(data_dir, artifacts_url)
    if contents is not None:
        _must_be_there(rows)
        if (found := sha256_of(rows)) != contents.database_sha256:
            raise StoreError(
                f"{rows} has sha256 {found}, wanted {contents.database_sha256}: it was changed or "
                "damaged. Take an older backup"
            )
        for sha256 in contents.objects:
            _restore_object(objects / sha256[:2] / sha256, sha256, artifacts)
    database = open_database(url)
    try:
        with database.leading():
            load_copy(rows, database)
        migrate(database, data_dir)
        return fsck(database, artifacts, now_unix_ms())
    finally:
        database.close()


def _find(source: Path) -> tuple[Contents | None, Path, Path]:
    """The list, the database and the objects' folder that `source` means."""
    if source.suffix == ".sqlite":
        return None, source, source.parent
    if source.is_dir():
        lists = [path for path in source.glob("*.json") if _TIME.fullmatch(path.stem)]
        if not lists:
            raise StoreError(
                f"{source} holds no backup; wanted a folder with TIME.json. Was it interrupted?"
            )
        source = max(lists)  # names are times
    try:
        contents = Contents.model_validate_json(source.read_bytes())
    except (OSError, ValidationError) as error:
        raise StoreError(f"{source} cannot be read: {error}. Take another backup") from error
    return contents, source.with_suffix(".sqlite"), source.parent / "objects"


def _copy_object(source: Path, sha256: str, folder: Path) -> int:
    """Copy a file into the backup unless it is there; return the bytes copied."""
    final = folder / "objects" / sha256[:2] / sha256
    if final.exists() and final.stat().st_size == source.stat().st_size:
        return 0
    make_folder(final.parent)
    partial = final.with_name(f"{sha256}.partial")
    shutil.copyfile(source, partial)
    if (found := sha256_of(partial)) != sha256:
        partial.unlink()
        raise StoreError(
            f"{source} has sha256 {found}: it is damaged on disk. Replace it from an older backup"
        )
    flush(partial)
    os.replace(partial, final)
    flush(final.parent)
    return final.stat().st_size


def _restore_object(source: Path, sha256: str, artifacts: Artifacts) -> None:
    _must_be_there(source)
    if (found := sha256_of(source)) != sha256:
        raise StoreError(f"{source} has sha256 {found}: it is damaged. Take another backup")
    artifacts.add(source, sha256)


def _must_be_there(path: Path) -> None:
    if not path.is_file():
        raise StoreError(f"{path} is missing; the backup is not whole. Take another one")
