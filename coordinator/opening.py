"""The server's line to the opener: it asks whether a contribution counts, and looks at none."""

import contextlib
import json
import logging
import subprocess
import threading
from concurrent.futures import Future
from concurrent.futures import TimeoutError as NoAnswerError
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from protos.errors import CofuseError
from protos.process import end, spawn
from protos.spec import RoundSpec

READY_S: Final = 60.0
ANSWER_S: Final = 900.0
"""For a contribution of many gigabytes on a slow disk; one that is refused is refused sooner."""
_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What a round asked for, with the files that it is about."""

    spec: RoundSpec
    pivot_sha256: str
    """Of the pivot's weights."""
    weights: Path
    public_set: Path | None
    """Prompts or pairs."""


class OpenerError(RuntimeError):
    """The opener cannot be had; the message says why."""


class Opening:
    """Keeps one opener at work, and starts another when it dies. For many threads."""

    def __init__(self, folder: Path, public: Path, artifacts: Path) -> None:
        """Args: folder: of the fusion worker's key; made where it is not. public: where the public
        half is written for others to copy. artifacts: of what is asked about.
        """
        self._arguments = [str(path.resolve()) for path in (folder, public, artifacts)]
        self._public = public
        self._child: subprocess.Popen[str] | None = None
        self._ready: Future[None] = Future()
        self._asked: dict[int, Future[dict[str, Any]]] = {}
        self._number = 0
        self._stopped = False
        self._lock = threading.Lock()

    def start(self) -> None:
        """Have the key made where there is none yet; else the first contribution starts the opener.

        Raises: OpenerError when it has no key.
        """
        if self._public.exists():
            return
        with self._lock:
            self._spawn()
        try:
            self._ready.result(READY_S)
        except NoAnswerError:
            raise OpenerError(f"the opener was not ready within {READY_S:.0f} s") from None

    def check(self, path: Path, wanted: Wanted, *, round_id: str, participant: str) -> None:
        """Return when a sealed contribution counts.

        Raises: CofuseError bad_contribution; store_unavailable or storage_full when it could not
            be looked at.
        """
        question = {
            "path": str(path.resolve()),
            "round_id": round_id,
            "participant": participant,
            "spec": wanted.spec.model_dump_json(),
            "pivot_sha256": wanted.pivot_sha256,
            "weights": str(wanted.weights.resolve()),
            "public_set": str(wanted.public_set.resolve()) if wanted.public_set else "",
        }
        found = self._answer(question)
        if "refused" in found:
            raise CofuseError("bad_contribution", str(found["refused"]).rstrip("."))
        if "fault" in found:
            _LOG.error("a contribution to %s could not be opened: %s", round_id, found["fault"])
            raise CofuseError(found["error_id"], "the contribution could not be opened here")

    def stop(self) -> None:
        """End the opener; whoever still waits for an answer is told."""
        with self._lock:
            self._stopped, child = True, self._child
        if child is not None:
            assert child.stdin is not None
            with contextlib.suppress(OSError):  # it has just died
                child.stdin.close()
            end(child)

    def _answer(self, question: dict[str, Any]) -> dict[str, Any]:
        """Ask; once more when the opener died: the fault may have been another contribution's."""
        for last in (False, True):
            try:
                return self._ask(question).result(ANSWER_S)
            except (OpenerError, NoAnswerError) as error:
                if last or isinstance(error, NoAnswerError):
                    raise CofuseError("store_unavailable", f"not looked at: {error}") from error
        raise AssertionError("unreachable")

    def _ask(self, question: dict[str, Any]) -> "Future[dict[str, Any]]":
        answer: Future[dict[str, Any]] = Future()
        with self._lock:
            if self._child is None:
                self._spawn()
            assert self._child is not None
            assert self._child.stdin is not None
            self._number += 1
            self._asked[self._number] = answer
            try:
                self._child.stdin.write(json.dumps({"id": self._number, **question}) + "\n")
                self._child.stdin.flush()
            except (OSError, ValueError):  # it is dying; its reader tells everybody
                self._asked.pop(self._number, None)
                answer.set_exception(OpenerError("the opener has just ended"))
        return answer

    def _spawn(self) -> None:
        if self._stopped:
            raise OpenerError("the coordinator is stopping")
        child = self._child = spawn(
            "coordinator.opener",
            self._arguments,
            stdin=subprocess.PIPE,
            environment={"OMP_NUM_THREADS": "1"},  # a library's threads would be outside its wall
        )
        self._ready = Future()
        threading.Thread(
            target=self._read, args=(child, self._ready), name="opener", daemon=True
        ).start()

    def _read(self, child: "subprocess.Popen[str]", ready: "Future[None]") -> None:
        assert child.stdout is not None
        for line in child.stdout:
            words = json.loads(line)
            if "ready" in words:
                ready.set_result(None)
            elif "failed" in words:
                ready.set_exception(OpenerError(words["failed"]))
            else:
                with self._lock:
                    answer = self._asked.pop(words["id"], None)
                if answer is not None:
                    answer.set_result(words)
        with self._lock:
            left, self._asked = list(self._asked.values()), {}
            if self._child is child:
                self._child = None
        error = OpenerError(f"the opener ended with status {child.wait()}")
        if not ready.done():
            ready.set_exception(error)
        for answer in left:
            answer.set_exception(error)
