"""What anybody outside can see of the promises: receipts in the participants' spools, whole pivots.

Receipts are compared with the store once all is at rest. Pivots are read from the first moment
on, through the same door as a researcher's.
"""

import json
import sqlite3
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Final, TypeVar

import grpc

from cofuse.sdk import Coordinator, Pivot
from protos.chunks import sha256_of
from protos.errors import RemoteError
from trust.pivot_manifest import MANIFEST_FILE

LOOK_S: Final = 0.1
AWAY_S: Final = 120.0
"""For how long a coordinator may be away before that is an error."""
_T = TypeVar("_T")
Promise = tuple[str, str, str]
"""(round, participant, sha256)."""


def promises(work: Path, participants: Iterable[str]) -> set[Promise]:
    """Every receipt that is in a spool now: it is written there after it was given."""
    found = set()
    for name in participants:
        for path in (work / name / "data" / "spool").glob("*.json"):
            with suppress(FileNotFoundError):  # forgotten meanwhile
                report = json.loads(path.read_text(encoding="utf-8"))["report"]
                if report is not None and report["status"] == "committed":
                    found.add((report["round_id"], name, report["sha256"]))
    return found


def lost(database: sqlite3.Connection, promised: Iterable[Promise]) -> list[str]:
    """Promises that the store does not keep."""
    kept = _committed(database)
    return [
        f"{round_id}: {participant} was promised {digest[:12]}, the store has "
        f"{(kept.get((round_id, participant)) or 'nothing')[:12]}"
        for round_id, participant, digest in sorted(promised)
        if kept.get((round_id, participant)) != digest
    ]


def double_fused(
    database: sqlite3.Connection, lineages: Mapping[str, Mapping[str, Any]]
) -> list[str]:
    """Contributions that two pivots are made of, or that none of the round's receipts covers."""
    kept, pivot_of, broken = _committed(database), {}, []
    for pivot, lineage in lineages.items():
        round_id = str(lineage["round_id"])
        other = pivot_of.setdefault(round_id, pivot)
        if other != pivot:
            broken.append(f"{round_id} is fused into {other} and {pivot}")
        for participant, part in lineage["contributions"].items():
            if kept.get((round_id, participant)) != part["sha256"]:
                broken.append(f"{pivot} holds {part['sha256'][:12]} of {participant}, uncounted")
    return broken


def _committed(database: sqlite3.Connection) -> dict[tuple[str, str], str]:
    query = "SELECT round_id, participant, sha256 FROM contributions WHERE status = 'committed'"
    return {(row[0], row[1]): row[2] for row in database.execute(query)}


def patiently(call: Callable[[], _T]) -> _T:
    """Repeat while the coordinator is away: it is being started again."""
    ends = time.monotonic() + AWAY_S
    while True:
        try:
            return call()
        except grpc.RpcError as error:
            if error.code() is not grpc.StatusCode.UNAVAILABLE or time.monotonic() > ends:
                raise
        except RemoteError as error:
            if error.error_id != "unreachable" or time.monotonic() > ends:
                raise
        threading.Event().wait(0.2)


class Witness:
    """Reads every pivot that can be seen, whole, and says which are not."""

    def __init__(self, coordinator: Coordinator, folder: Path) -> None:
        """Args: folder: where pivots are written to. The coordinator is closed by stop()."""
        self._coordinator = coordinator
        self._folder = folder
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="witness", daemon=True)
        self.lineages: dict[str, dict[str, Any]] = {}
        """By pivot that was found whole; the imported one has none."""
        self.halves: list[str] = []
        """What was wrong with the others, in words."""
        self._seen: set[str] = set()

    def start(self) -> None:
        """Look again and again, in the background."""
        self._thread.start()

    def stop(self) -> None:
        """Look no more."""
        self._stop.set()
        self._thread.join()
        self._coordinator.close()

    def look_again(self) -> None:
        """Read all pivots once more: what was whole must have stayed whole."""
        for pivot in self._coordinator.pivots():
            self._read(pivot, self._folder / "again" / pivot.name)

    def _run(self) -> None:
        while not self._stop.is_set():
            with suppress(grpc.RpcError):  # the coordinator is being started again
                for pivot in self._coordinator.pivots():
                    if pivot.name not in self._seen and self._read(
                        pivot, self._folder / pivot.name
                    ):
                        self._seen.add(pivot.name)
            self._stop.wait(LOOK_S)

    def _read(self, pivot: Pivot, folder: Path) -> bool:
        """Whether the pivot could be looked at; what is wrong with it is noted."""
        try:
            self._coordinator.download_pivot(pivot.name, folder, older=True)
        except RemoteError as error:
            if error.error_id in ("unreachable", "stalled"):
                return False
            self.halves.append(f"{pivot.name}: {error}")
            return True
        if pivot.round_id:
            self.halves += [f"{pivot.name}: {words}" for words in _unlike_its_sums(folder)]
            lineage = json.loads((folder / "lineage.json").read_text(encoding="utf-8"))
            self.lineages[pivot.name] = lineage
        return True


def _unlike_its_sums(folder: Path) -> list[str]:
    """Files that SHA256SUMS names and that are not so, and files that it does not name."""
    lines = (folder / "SHA256SUMS").read_text(encoding="utf-8").splitlines()
    told = {name: digest for digest, _, name in (line.partition("  ") for line in lines)}
    here = {path.name for path in folder.iterdir()} - {"SHA256SUMS", MANIFEST_FILE}
    wrong = [
        name for name in sorted(told) if name in here and sha256_of(folder / name) != told[name]
    ]
    return [*(f"{name} is not its sum" for name in wrong), *sorted(here ^ set(told))]
