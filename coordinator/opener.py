"""Holds the fusion worker's key: the server's child, behind a wall.

`python -m coordinator.opener FOLDER PUBLIC ARTIFACTS`: of the key, for its public half, of what may
be opened (coordinator/walls.py).

A line of JSON asks, a line answers, in any order: {"id": 1, "path": ...} -> {"id": 1} for a
contribution that counts, {"id": 1, "refused": words}, or {"id": 1, "fault": words, "error_id": ...}
when this machine failed. What is opened here is removed before the answer; the server never has it.
"""

import json
import logging
import os
import shutil
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

from coordinator.contribution_check import check
from coordinator.opening import Wanted
from coordinator.sealed import Worker, ensure_worker_key
from coordinator.walls import SCRATCH, opener_wall
from fusion.contribution import ContributionError
from protos import logs
from protos.files import NO_ROOM, make_folder
from protos.process import die_with_parent
from protos.spec import RoundSpec
from trust.keys import KeyFileError
from trust.safetensors_header import HeaderError
from trust.seal import SealError
from trust.walls import enter

_LOG = logging.getLogger("coordinator.opener")  # also when this file is the program
_THREADS: Final = 4
"""Contributions that are looked at side by side; each takes the room of its plain text on disk."""


def answer(worker: Worker, asked: dict[str, Any]) -> dict[str, Any]:
    """Open a contribution, read it whole, remove it; say whether it counts."""
    plain = worker.folder / SCRATCH / str(int(asked["id"]))
    try:
        wanted = Wanted(
            spec=RoundSpec.model_validate_json(asked["spec"]),
            pivot_sha256=asked["pivot_sha256"],
            weights=Path(asked["weights"]),
            public_set=Path(asked["public_set"]) if asked["public_set"] else None,
        )
        worker.open(
            Path(asked["path"]), plain, round_id=asked["round_id"], participant=asked["participant"]
        )
        check(plain, wanted)
    except SealError as error:
        return {"refused": f"sealed: {error}"}
    except ContributionError as error:
        return {"refused": f"{error.code}: {error}"}
    except (OSError, HeaderError, MemoryError) as error:
        full = isinstance(error, OSError) and error.errno in NO_ROOM
        words = f"{type(error).__name__}: {error}"
        return {"fault": words, "error_id": "storage_full" if full else "store_unavailable"}
    finally:
        plain.unlink(missing_ok=True)
    return {}


def main(argv: list[str]) -> int:
    """Answer until the server closes the pipe."""
    logs.configure("opener")
    folder, public, artifacts = map(Path, argv)
    lock = threading.Lock()

    def say(words: dict[str, Any]) -> None:
        with lock:
            os.write(1, (json.dumps(words) + "\n").encode())

    try:
        kid = ensure_worker_key(folder, public)
        shutil.rmtree(folder / SCRATCH, ignore_errors=True)
        (folder / SCRATCH).mkdir(mode=0o700)
        make_folder(artifacts)  # a rule can only name what is there
        held = enter(opener_wall(folder, artifacts))
        die_with_parent()  # after the wall: a new user namespace may forget it
        worker = Worker.at(folder)
    except (KeyFileError, OSError) as error:
        say({"failed": str(error)})
        return 1
    for words in held.missing:
        _LOG.warning("%s; cofuse coordinator doctor tells what that means", words)
    say({"ready": kid})
    with ThreadPoolExecutor(_THREADS) as pool:
        for line in sys.stdin:
            pool.submit(_take, worker, json.loads(line), say)
    return 0


def _take(worker: Worker, asked: dict[str, Any], say: Any) -> None:
    try:
        found = answer(worker, asked)
    except Exception as error:  # noqa: BLE001 - one contribution must not silence all others
        found = {"fault": f"{type(error).__name__}: {error}", "error_id": "store_unavailable"}
    say({"id": asked["id"], **found})


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
