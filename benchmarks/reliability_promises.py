"""What must hold on whatever a crash left of a disk: invariants, and what was promised before."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.reliability_life import ROUNDS, Place, live_round, started
from coordinator.backup import Contents
from coordinator.fsck import fsck
from coordinator.rounds import State
from coordinator.store import now_unix_ms
from protos.chunks import sha256_of


def broken(home: Path, promises: list[dict[str, Any]]) -> list[str]:
    """Start on what a crash left, and say what is not as it must be; then go on to the end.

    The folder is changed. Raises: whatever keeps the coordinator from starting or going on.
    """
    found = []
    for number in range(1, ROUNDS + 1):
        with started(home) as place:
            if number == 1:
                found += [*inconsistent(place), *unkept(place, promises)]
            live_round(place, number)
            if number == ROUNDS:
                late = [*inconsistent(place), *unkept(place, promises)]
                ends = [row.state for row in place.store.rounds()]
                if ends != [State.PUBLISHED] * ROUNDS:
                    late.append(f"found rounds {ends}, wanted {ROUNDS} published")
                found += [f"after going on: {fault}" for fault in late]
    return found


def inconsistent(place: Place) -> Iterator[str]:
    """What no crash may show, whatever was promised: fsck's word, and our own for the worst."""
    for finding in fsck(place.store.database, place.artifacts, now_unix_ms()).findings:
        yield f"{finding.invariant}: {finding.says}"
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


def unkept(place: Place, promises: list[dict[str, Any]]) -> Iterator[str]:
    """What was told, and is not so."""
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
            case {"kind": "backup", "name": name}:
                kept = _is_whole(place.backup / name)
            case _:
                raise ValueError(f"found promise {made}, which nothing checks")
        if not kept:
            yield f"promise not kept: {made}"


def _is_whole(listed: Path) -> bool:
    """Whether a backup is there with all that belongs to it."""
    if not listed.exists():
        return False
    contents = Contents.model_validate_json(listed.read_bytes())
    wanted = {listed.with_suffix(".sqlite"): contents.database_sha256}
    for sha256 in contents.objects:
        wanted[listed.parent / "objects" / sha256[:2] / sha256] = sha256
    return all(path.exists() and sha256_of(path) == sha256 for path, sha256 in wanted.items())
