"""One life of a coordinator, from an empty folder to published pivots, and what it promised.

No engine, no torch: the store, the artifacts and the calls that commit and publish are the real
ones. `live` may be begun on whatever a crash left, as many times as one likes: it goes on from
there, as participants and the scheduler do.
"""

import contextlib
import hashlib
import json
import os
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any, Final

from sqlalchemy import event
from sqlalchemy.pool import Pool

from benchmarks.reliability_recorder import heal, mark
from coordinator.artifacts import Artifacts, open_artifacts
from coordinator.backup import back_up
from coordinator.happenings import Fused, Restarted, Tick, Worked
from coordinator.rounds import FINAL, Event, State
from coordinator.store import Store
from coordinator.store_errors import StoreError
from coordinator.upkeep import collect_garbage, references
from protos.errors import CofuseError
from protos.files import EXIT_DISK_FAILED, settle
from protos.messages import FileRef
from protos.spec import RoundSpec, TrainingSpec

ROUNDS: Final = 2
NAMES: Final = ("ada", "bob")
_CHUNK_BYTES: Final = 3000
_DEADLINE_MS: Final = 365 * 24 * 3_600_000
"""Far enough that no check of a recorded state comes too late."""


@event.listens_for(Pool, "connect")
def _checkpoint_often(connection: Any, _record: Any) -> None:
    # As in a long life, where the log has gone into the database and begun anew many times.
    connection.execute("PRAGMA wal_autocheckpoint=24")


@dataclass(frozen=True, slots=True)
class Place:
    """A coordinator that has started."""

    store: Store
    artifacts: Artifacts
    backup: Path
    """Folder of its backups."""


@contextlib.contextmanager
def started(home: Path) -> Iterator[Place]:
    """What a coordinator does with its folder when it starts, and when it ends in order."""
    data_dir = home / "data"
    settle(data_dir)
    artifacts = open_artifacts(data_dir, None)
    store = Store(f"sqlite:///{data_dir / 'coordinator.sqlite'}", lead=True, backups=data_dir)
    store.database.on_fatal = lambda reason: os._exit(EXIT_DISK_FAILED)
    try:
        for row in store.rounds(active_only=True):
            store.step(row.round_id, Restarted())
        yield Place(store, artifacts, home / "backup")
    finally:
        store.close()


def content(name: str) -> bytes:
    """The bytes of a file of this life, always the same."""
    return Random(name).randbytes(3 * _CHUNK_BYTES - 100)


def digest(name: str) -> str:
    """Their sha256."""
    return hashlib.sha256(content(name)).hexdigest()


def promise(kind: str, **what: Any) -> None:
    """Give a promise: from here on it must hold."""
    mark(json.dumps({"kind": kind, **what}))


def live(home: Path, *, patient: bool = False) -> None:
    """Bring the first and then the next rounds to their end, with a restart between them.

    Args: patient: a full disk is waited out (heal) by the same process, once.
    Raises: whatever keeps the coordinator from starting; UnsaidError when it ran, and an error on a
        full disk was not the catalogue's.
    """
    for number in range(1, ROUNDS + 1):
        with started(home) as place:
            try:
                live_round(place, number)
            except Exception as error:
                if not patient:
                    raise
                if not isinstance(error, CofuseError) or error.error_id != "storage_full":
                    raise UnsaidError(f"found {error!r}, wanted storage_full") from error
                heal()
                live_round(place, number)


class UnsaidError(Exception):
    """The caller was told of a full disk in no words of ours."""


def begin(place: Place) -> None:
    """Participants join, the first pivot comes."""
    for node, name in enumerate(NAMES):
        place.store.upsert_participant(name, node, b"key")
        promise("participant", name=name)
    files = [_add(place, f"pivot-0/{n}") for n in ("config.json", "model.safetensors")]
    place.store.add_pivot(name="pivot-0", parent="", round_id="", files=files, evals_json="{}")
    promise("pivot", name="pivot-0", files=[file.sha256 for file in files])


def live_round(place: Place, number: int) -> None:
    """Submit a round, or find it, and do what its state asks for until it is over."""
    store = place.store
    begin(place)
    spec = RoundSpec(
        name="crash",
        pivot=f"pivot-{number - 1}",
        participants=NAMES,
        kind="logits",
        method="unified",
        prompts=f"sha256:{_add(place, 'prompts').sha256}",
        evals=f"sha256:{_add(place, 'evals').sha256}",
        training=TrainingSpec(steps=1, lr=0.1),
    )
    round_id = store.submit_round(
        request_id=str(number),
        submitted_by="ada",
        spec_json=spec.model_dump_json(),
        deadline_ms=_DEADLINE_MS,
    ).round_id
    promise("round", round_id=round_id)
    while (round_ := store.core(round_id)).state not in FINAL:
        match round_.state:
            case State.SUBMITTED:
                store.advance(round_id, Event.APPROVE)
                promise("approved", round_id=round_id)
            case State.APPROVED:
                store.step(round_id, Tick())
            case State.COLLECTING:
                _all_contribute(place, round_id)
                store.step(round_id, Tick())
            case State.FUSING:
                store.step(round_id, Worked(round_.attempt))
                store.step(round_id, Fused(round_.attempt))
            case State.EVALUATING:
                publish(place, round_id, spec.pivot)
    promise("ended", round_id=round_id, state=round_.state)
    _sweep(place, number)
    if number == 1 and not list(place.backup.glob("*.json")):
        # The command tells its operator, who runs it again.
        with contextlib.suppress(StoreError, OSError):
            made = back_up(place.store.database, place.artifacts, place.backup)
            promise("backup", name=made.contents.name)


def _all_contribute(place: Place, round_id: str) -> None:
    """Both at a time, so that their commits may share one."""
    failed: list[BaseException] = []

    def work(name: str) -> None:
        try:
            contribute(place, round_id, name)
        except Exception as error:  # noqa: BLE001 - raised below, in the caller's thread
            failed.append(error)

    threads = [threading.Thread(target=work, args=(name,)) for name in NAMES]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failed:
        raise failed[0]


def contribute(place: Place, round_id: str, name: str) -> None:
    """Upload in two streams, the first of which breaks, then commit for the receipt."""
    file = f"{round_id}/{name}"
    data, sha256 = content(file), digest(file)
    for end in (_CHUNK_BYTES, len(data)):
        _upload(place.artifacts, sha256, name, data[:end], len(data))
    if not place.artifacts.has(sha256):
        place.artifacts.complete(sha256, name, len(data))
    place.store.add_artifact(sha256, name, "CONTRIBUTION", len(data))
    place.store.commit(round_id, name, sha256, len(data))
    promise("receipt", round_id=round_id, participant=name, sha256=sha256)
    place.store.report(round_id, name, "committed", "", "{}")


def _upload(artifacts: Artifacts, sha256: str, sender: str, data: bytes, size_bytes: int) -> None:
    """Go on with an upload until all of `data` is there."""
    if artifacts.has(sha256):
        return
    here = artifacts.received_bytes(sha256, sender)
    if here >= len(data):
        return
    ends = range(here + _CHUNK_BYTES, len(data) + _CHUNK_BYTES, _CHUNK_BYTES)
    pieces = [(data[end - _CHUNK_BYTES : end], hashlib.sha256(data[:end]).digest()) for end in ends]
    for _ in artifacts.receive(
        sha256,
        sender,
        size_bytes=size_bytes,
        offset_bytes=here,
        pieces=pieces,
        prefix_sha256=hashlib.sha256(data[:here]).digest(),
    ):
        pass


def publish(place: Place, round_id: str, parent: str) -> None:
    """The files of the new pivot, then its row and the round's state."""
    name = place.store.round(round_id).pivot_name
    files = [_add(place, f"{name}/{n}") for n in ("evals.json", "model.safetensors")]
    attempt = place.store.core(round_id).attempt
    place.store.publish(round_id, attempt, parent=parent, files=files, evals_json="{}")
    promise("pivot", name=name, files=[file.sha256 for file in files])


def _sweep(place: Place, number: int) -> None:
    """Leave an upload and a file that nobody needs, and let them be taken away."""
    left = content("left")
    _upload(place.artifacts, digest("left"), "cyd", left[:_CHUNK_BYTES], len(left))
    _add(place, f"unneeded/{number}")
    # As the coordinator's upkeep does: what fails now is tried again in an hour.
    with contextlib.suppress(OSError, CofuseError):
        place.artifacts.drop_partials(older_than_s=-1)
        for _ in ("into the trash", "out of it"):
            collect_garbage(
                place.artifacts,
                lambda: references(place.store),
                place.store.forget_artifact,
                grace_s=-1,
            )


def _add(place: Place, name: str) -> FileRef:
    """Take in a file that the coordinator's own worker wrote."""
    data, sha256 = content(name), digest(name)
    with tempfile.NamedTemporaryFile() as made:
        made.write(data)
        made.flush()
        place.artifacts.add(Path(made.name), sha256)
    place.store.add_artifact(sha256, "coordinator", "PIVOT", len(data))
    return FileRef(name=name.rpartition("/")[2], sha256=sha256, size_bytes=len(data))
