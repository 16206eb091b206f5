"""Trainer and courier as the guard sees them: what they are asked, how far they are believed."""

import base64
import hashlib
import os
import queue
import shutil
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from participant.engine import Task, TaskLostError
from participant.line import Body, Line, PeerLostError
from protos.chunks import sha256_of
from protos.errors import RemoteError
from protos.files import flush
from protos.messages import Assignment, FileRef, Scores
from protos.retry import Stopped
from protos.v1 import fleet_pb2 as pb

_PIECE_BYTES: Final = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What the trainer says of the expert."""

    ready: bool = False
    """Whether there is a finished one to ask."""
    version: int = 0
    steps: int = 0
    finished_unix_ms: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """What is told of a model beside its contribution."""

    scores: Scores
    facts: dict[str, Any]
    """parameters, architecture, vocabulary."""


class TrainerLine:
    """The process that has the expert."""

    def __init__(self, line: Line, data_dir: Path) -> None:
        self._line = line
        self._outbox = data_dir / "outbox"
        self._busy = threading.Event()
        self.expert = data_dir / "expert" / "model"
        """Folder of the finished expert."""
        self.facts = Facts()

    def heard(self, body: Body) -> None:
        """Take its word for how the expert is."""
        self.facts = Facts(**body)

    def came(self) -> None:
        """A trainer has started: it trains nothing until it is told that it may."""
        if not self._busy.is_set():
            self._line.say("trainer", "free")

    def hold(self, should_stop: Callable[[], bool]) -> None:
        """Have it train no more, so that the expert stays as it is. Raises: as Line.call."""
        self._busy.set()
        self._line.call("trainer", "hold", should_stop=should_stop)

    def free(self) -> None:
        """Let it train."""
        self._busy.clear()
        self._line.say("trainer", "free")

    def make(self, assignment: Assignment, should_stop: Callable[[], bool]) -> Path:
        """Have a contribution computed; return its file in the outbox. Raises: as Line.call."""
        asked = {"assignment": assignment.model_dump(mode="json")}
        answer = self._line.call("trainer", "make", asked, should_stop)
        return self._outbox / Path(answer["file"]).name

    def asked(self, assignment: Assignment) -> Path:
        """The folder of the model that a round asks: the expert, or what was grown for it."""
        if assignment.spec.grow is None:
            return self.expert
        return self._outbox / f"grown-{assignment.round_id}-{assignment.pivot_sha256[:16]}"

    def tell(
        self, assignment: Assignment, *, score: bool, should_stop: Callable[[], bool]
    ) -> Model:
        """Have it describe that model, and measure it on the evaluation set where that may leave.

        Raises: as Line.call; ValueError when it says something else.
        """
        asked = {"assignment": assignment.model_dump(mode="json"), "score": score}
        answer = self._line.call("trainer", "tell", asked, should_stop)
        scores = Scores.model_validate(answer["scores"]) if score else Scores()
        return Model(scores=scores, facts=answer["model"])


class Errands:
    """What the courier does for one piece of work; every call repeats safely."""

    def __init__(self, line: Line, inbox: Path, should_stop: Callable[[], bool]) -> None:
        self._line = line
        self._inbox = inbox
        self._should_stop = should_stop

    def fetch(self, reference: FileRef, folder: Path) -> Path:
        """Bring a public file into a folder that the courier cannot reach, as the digest says.

        Raises: as Line.call; RemoteError (unreachable: try again) when it brought something else.
        """
        final = folder / reference.name
        if final.exists() and sha256_of(final) == reference.sha256:
            return final
        self._call("fetch", reference.model_dump())
        brought = self._inbox / reference.sha256
        take_over(brought / reference.name, final, reference)
        shutil.rmtree(brought, ignore_errors=True)
        return final

    def missing_bytes(self, path: Path, sha256: str) -> int:
        """Count the bytes of a file that the coordinator does not have from us yet."""
        return int(self._call("missing", {"file": path.name, "sha256": sha256})["bytes"])

    def put(self, path: Path, sha256: str) -> None:
        """Upload a file of the sealed folder; what is there already is not sent again."""
        self._call("put", {"file": path.name, "sha256": sha256})

    def commit(self, round_id: str, sha256: str, size_bytes: int) -> pb.Receipt:
        """Make the uploaded file our contribution; return the coordinator's receipt."""
        asked = {"round_id": round_id, "sha256": sha256, "size_bytes": size_bytes}
        return pb.Receipt.FromString(base64.b64decode(self._call("commit", asked)["receipt"]))

    def _call(self, what: str, body: Body) -> Body:
        return self._line.call("courier", what, body, self._should_stop)


class Counter:
    """Where the courier lays the engine's tasks down; participant/desk.py takes them up."""

    def __init__(self, line: Line) -> None:
        self._line = line
        self._tasks: queue.Queue[Task] = queue.Queue()
        self._couriers = 0

    def laid(self, body: Body) -> None:
        """Take a task from the courier."""
        number, courier = str(body["task"]), self._couriers

        def answer(content: dict[str, str]) -> None:
            try:
                self._line.call("courier", "answer", {"task": number, **content}, lost)
            except (PeerLostError, Stopped):
                raise TaskLostError(f"the courier that brought task {number} has ended") from None

        def lost() -> bool:
            return courier != self._couriers

        self._tasks.put(Task(number, str(body["payload"]), answer, lost))

    def courier_lost(self) -> None:
        """Nobody waits for an answer to what an earlier courier brought."""
        self._couriers += 1

    def next_task(self, timeout_s: float) -> Task | None:
        """The next task, or None when timeout_s has passed."""
        with suppress(queue.Empty):
            while True:
                task = self._tasks.get(timeout=timeout_s) if timeout_s else self._tasks.get_nowait()
                if not task.lost:
                    return task
        return None


def take_over(brought: Path, final: Path, reference: FileRef) -> None:
    """Copy what the courier brought to where it cannot change it any more, and check the copy.

    Raises: RemoteError (unreachable: try again), OSError.
    """
    final.parent.mkdir(parents=True, exist_ok=True)
    draft, digest, left = (
        final.with_name(f".{final.name}.new"),
        hashlib.sha256(),
        reference.size_bytes,
    )
    # It may be anything: no link is followed, and no pipe is waited for.
    handle = os.open(brought, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    with os.fdopen(handle, "rb") as source, draft.open("wb") as copy:
        while piece := source.read(min(_PIECE_BYTES, left + 1)):
            left -= len(piece)
            digest.update(piece)
            copy.write(piece)
            if left < 0:
                break
        copy.flush()
        os.fsync(copy.fileno())
    if left != 0 or digest.hexdigest() != reference.sha256:
        draft.unlink()
        words = f"{reference.name}: the courier brought something else; it is asked for again"
        raise RemoteError("unreachable", words)
    draft.rename(final)
    flush(final.parent)
