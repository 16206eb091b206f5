"""One life of a coordinator, from an empty folder to published pivots, and what it promised.

No engine, no torch: the store, the artifacts and the calls that commit and publish are the real
ones. `live` may be begun on whatever a crash left, as many times as one likes: it goes on from
there, as participants and the scheduler do.
"""

import contextlib
import hashlib
import json
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
from coordinator.artifacts import Artifacts
from coordinator.rounds import FINAL, Event, State
from coordinator.store import Store
from protos.chunks import sha256_of
from protos.errors import CofuseError
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


@contextlib.contextmanager
def started(home: Path) -> Iterator[Place]:
    """What a coordinator does with its folder when it starts, and when it ends in order."""
    data_dir = home / "data"
    data_dir.mkdir(parents=True, exist_ok=True)
    place = Place(Store.at(data_dir / "coordinator.sqlite"), Artifacts(data_dir / "artifacts"))
    try:
        yield place
    finally:
        place.store._engine.dispose()


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
    """
    for number in range(1, ROUNDS + 1):
        with started(home) as place:
            try:
                live_round(place, number)
            except CofuseError as error:
                if not patient or error.error_id != "storage_full":
                    raise
                promise("refused", says=str(error))
                heal()
                live_round(place, number)


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
    round_id = place.store.submit_round(
        request_id=str(number),
        submitted_by="ada",
        spec_json=spec.model_dump_json(),
        deadline_ms=_DEADLINE_MS,
    ).round_id
    promise("round", round_id=round_id)
    while (state := place.store.round(round_id).state) not in FINAL:
        match state:
            case State.SUBMITTED:
                place.store.advance(round_id, Event.APPROVE)
                promise("approved", round_id=round_id)
            case State.APPROVED:
                place.store.advance(round_id, Event.ISSUE)
            case State.COLLECTING:
                place.store.assign(round_id, NAMES)
                _all_contribute(place, round_id)
                place.store.advance(round_id, Event.COLLECTED)
            case State.FUSING:
                place.store.advance(round_id, Event.FUSED)
            case State.EVALUATING:
                publish(place, round_id, spec.pivot)
    promise("ended", round_id=round_id, state=state)


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
    for _ in range(2):
        if place.artifacts.has(sha256):
            break
        here = place.artifacts.received_bytes(sha256, name)
        end = len(data) if here else _CHUNK_BYTES
        place.artifacts.receive(
            sha256,
            name,
            size_bytes=len(data),
            offset_bytes=here,
            chunks=(data[at : at + _CHUNK_BYTES] for at in range(here, end, _CHUNK_BYTES)),
        )
    place.store.add_artifact(sha256, name, "CONTRIBUTION", len(data))
    place.store.commit(round_id, name, sha256, len(data))
    promise("receipt", round_id=round_id, participant=name, sha256=sha256)


def publish(place: Place, round_id: str, parent: str) -> None:
    """The files of the new pivot, then its row and the round's state."""
    name = place.store.round(round_id).pivot_name
    files = [_add(place, f"{name}/{n}") for n in ("evals.json", "model.safetensors")]
    place.store.add_pivot(name=name, parent=parent, round_id=round_id, files=files, evals_json="{}")
    place.store.advance(round_id, Event.EVALUATED)
    promise("pivot", name=name, files=[file.sha256 for file in files])


def _add(place: Place, name: str) -> FileRef:
    """Take in a file that the coordinator's own worker wrote."""
    data, sha256 = content(name), digest(name)
    with tempfile.NamedTemporaryFile() as made:
        made.write(data)
        made.flush()
        place.artifacts.add(Path(made.name), sha256)
    place.store.add_artifact(sha256, "coordinator", "PIVOT", len(data))
    return FileRef(name=name.rpartition("/")[2], sha256=sha256, size_bytes=len(data))


def broken(home: Path, promises: list[dict[str, Any]]) -> list[str]:
    """Start on what a crash left, and say what is not as it must be; then go on to the end.

    The folder is changed. Raises: whatever keeps the coordinator from starting or going on.
    """
    with started(home) as place:
        found = [*_inconsistent(place), *_unkept(place, promises)]
    live(home)
    with started(home) as place:
        found += [f"after going on: {fault}" for fault in _inconsistent(place)]
        found += [f"after going on: {fault}" for fault in _unkept(place, promises)]
        ends = [row.state for row in place.store.rounds()]
        if ends != [State.PUBLISHED] * ROUNDS:
            found.append(f"after going on: found rounds {ends}, wanted {ROUNDS} published")
    return found


def _inconsistent(place: Place) -> Iterator[str]:
    """What no crash may show, whatever was promised."""
    pivots = {row.name: row for row in place.store.pivots()}
    for row in pivots.values():
        for file in row.files:
            yield from _damaged(place, file.sha256, f"{row.name}/{file.name}")
    for round_ in place.store.rounds():
        published = round_.state is State.PUBLISHED
        if published != (round_.pivot_name in pivots):
            yield f"{round_.round_id} is {round_.state}; pivots are {sorted(pivots)}"
        for part in place.store.contributions(round_.round_id):
            if part.sha256:
                yield from _damaged(place, part.sha256, f"{round_.round_id} {part.participant}")


def _damaged(place: Place, sha256: str, what: str) -> Iterator[str]:
    if not place.artifacts.has(sha256):
        yield f"{what}: its file is missing"
    elif sha256_of(place.artifacts.path(sha256)) != sha256:
        yield f"{what}: its file has other bytes"


def _unkept(place: Place, promises: list[dict[str, Any]]) -> Iterator[str]:
    store = place.store
    rounds = {row.round_id: row for row in store.rounds()}
    parts = {
        (row.round_id, row.participant): row.sha256
        for round_id in rounds
        for row in store.contributions(round_id)
        if row.status == "committed"
    }
    pivots = {row.name: [file.sha256 for file in row.files] for row in store.pivots()}
    for made in promises:
        match made:
            case {"kind": "participant", "name": name}:
                kept = name in store.participants()
            case {"kind": "round", "round_id": round_id}:
                kept = round_id in rounds
            case {"kind": "approved", "round_id": round_id}:
                kept = round_id in rounds and rounds[round_id].state is not State.SUBMITTED
            case {"kind": "receipt", "round_id": round_id, "participant": name, "sha256": sha256}:
                kept = parts.get((round_id, name)) == sha256
            case {"kind": "pivot", "name": name, "files": files}:
                kept = pivots.get(name) == files
            case {"kind": "ended", "round_id": round_id, "state": state}:
                kept = round_id in rounds and rounds[round_id].state == state
            case {"kind": "refused"}:
                kept = True
            case _:
                raise ValueError(f"found promise {made}, which nothing checks")
        if not kept:
            yield f"promise not kept: {made}"
