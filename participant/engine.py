"""The federation engine at a participant: messages in, answers out, and a child process between.

The child (participant/supernode.py) is Flower's SuperNode. This module keeps it alive while the
participant is summoned, and speaks JSON lines with it over pipes, so the participant listens on
nothing, and the process that trains never imports flwr.
"""

import json
import logging
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Final

logger = logging.getLogger(__name__)

MAX_REPLY_BYTES: Final = 65_536
FIRST_PAUSE_S: Final = 1.0
LONGEST_PAUSE_S: Final = 30.0
# A child that lived this long was healthy: its successor starts without a longer pause.
HEALTHY_S: Final = 60.0
STOP_TIMEOUT_S: Final = 8.0
# As in participant/supernode.py: say goodbye to the coordinator, then end.
LEAVE: Final = signal.SIGUSR1


class TaskLostError(RuntimeError):
    """The task's connection is gone, so its answer cannot be sent; a new attempt will come."""


@dataclass(frozen=True, slots=True)
class Task:
    """One message of the coordinator, to be answered once, by reply or by fail."""

    number: str
    """Names it among those of one engine."""
    payload: str
    """JSON text; data to be checked against the site's policy, like everything from outside."""
    _answer: Callable[[dict[str, str]], None] = field(repr=False)
    _lost: Callable[[], bool] = field(repr=False)

    @property
    def lost(self) -> bool:
        """Whether nobody waits for the answer any more; work on it may stop."""
        return self._lost()

    def reply(self, payload: str) -> None:
        """Answer with JSON text of at most MAX_REPLY_BYTES.

        Raises: ValueError when it is larger. TaskLostError when nobody waits for it any more.
        """
        if (size := len(payload.encode())) > MAX_REPLY_BYTES:
            raise ValueError(
                f"found an answer of {size} bytes, wanted {MAX_REPLY_BYTES} at most: "
                "upload the bytes and answer with their sha256"
            )
        self._answer({"json": payload})

    def fail(self, reason: str) -> None:
        """Answer that the work was not done, and why; the coordinator reads the reason."""
        self._answer({"error": reason})


class Engine:
    """Receives tasks through Flower, for as long as it is started and summoned."""

    def __init__(
        self,
        *,
        state_dir: Path,
        superlink_address: str | None = None,
        ca: Path,
        certificate: Path,
        key: Path,
        poll_s: float = 1.0,
    ) -> None:
        """Args: superlink_address: None waits for a summons. key: the certificate's own; it signs
        every call too. poll_s: how often to ask.
        """
        self._settings: dict[str, str | float] = {
            "state_dir": str(state_dir),
            "ca": str(ca),
            "certificate": str(certificate),
            "key": str(key),
            "poll_s": poll_s,
        }
        self._state_dir = state_dir
        self._tasks: queue.Queue[Task] = queue.Queue()
        self._child: subprocess.Popen[str] | None = None
        self._lock = threading.Lock()
        self._address = superlink_address
        self._wanted = threading.Event()
        if superlink_address is not None:
            self._wanted.set()
        self._stopping = threading.Event()
        self._online = threading.Event()
        self._supervisor: threading.Thread | None = None

    def start(self) -> None:
        """Keep a SuperNode running in the background while summoned; returns at once."""
        self._state_dir.mkdir(parents=True, exist_ok=True)
        self._stopping.clear()
        # Not only does this thread restart the child: Linux ends the child when it ends.
        self._supervisor = threading.Thread(target=self._supervise, name="supernode", daemon=True)
        self._supervisor.start()

    def summon(self, superlink_address: str | None) -> None:
        """Have a SuperNode dial this address, or none any more; returns at once.

        Repeating it changes nothing. A task that is open when its SuperNode leaves is lost.
        """
        with self._lock:
            if superlink_address == self._address:
                return
            self._address = superlink_address
            child, self._child = self._child, None
            if superlink_address is None:
                self._wanted.clear()
            else:
                self._wanted.set()
        if child is not None:
            _leave(child)

    def wait_until_online(self, timeout_s: float) -> bool:
        """Whether the coordinator knows this participant as connected, within timeout_s."""
        return self._online.wait(timeout_s)

    def next_task(self, timeout_s: float) -> Task | None:
        """The next task, or None when timeout_s has passed.

        While a task is open, Flower is told that it is alive, and brings no other one.
        """
        ends = time.monotonic() + timeout_s
        with suppress(queue.Empty):
            while True:
                task = self._tasks.get(timeout=max(0.0, ends - time.monotonic()))
                if not task.lost:
                    return task
        return None

    def stop(self) -> None:
        """Say goodbye to the coordinator and end the child. Safe to call twice."""
        self._stopping.set()
        self._wanted.set()
        if self._supervisor is None:
            return
        with self._lock:
            child = self._child
        if child is not None:
            _leave(child)
        self._supervisor.join()
        self._supervisor = None

    def _supervise(self) -> None:
        pause_s = FIRST_PAUSE_S
        while self._wanted.wait() and not self._stopping.is_set():
            born = time.monotonic()
            child = self._spawn()
            self._listen(child)
            code = child.wait()
            self._online.clear()
            _close(child)
            with self._lock:
                dismissed = self._child is not child
                self._child = None
            if dismissed or self._stopping.is_set():
                continue
            if time.monotonic() - born > HEALTHY_S:
                pause_s = FIRST_PAUSE_S
            logger.warning("the SuperNode ended with code %s, next in %.0f s", code, pause_s)
            self._stopping.wait(pause_s)
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)

    def _spawn(self) -> "subprocess.Popen[str]":
        program = str(Path(__file__).with_name("supernode.py"))
        home = {"FLWR_HOME": str(self._state_dir / "flower"), "OPENBLAS_NUM_THREADS": "1"}
        with self._lock:
            self._child = child = subprocess.Popen(
                # -P keeps this folder, and the caller's, out of the child's module path.
                [sys.executable, "-P", program],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                encoding="utf-8",
                env=os.environ | home,
                # Ctrl-C reaches the participant, which then ends its child in good order.
                start_new_session=True,
            )
            settings = {**self._settings, "superlink_address": self._address or ""}
            if self._stopping.is_set() or not self._wanted.is_set():
                self._child = None
        if self._child is not child:
            _leave(child)
        _write_line(child, settings | {"parent": os.getpid()})
        threading.Thread(target=_log_lines, args=(child.stderr,), daemon=True).start()
        return child

    def _listen(self, child: "subprocess.Popen[str]") -> None:
        """Take the child's lines until it ends."""
        assert child.stdout is not None
        for line in child.stdout:
            event = json.loads(line)
            if "node" in event:
                logger.info("connected as node %s", event["node"])
                self._online.set()
            else:
                self._tasks.put(self._task(child, event["task"], event["payload"]))

    def _task(self, child: "subprocess.Popen[str]", task_id: str, payload: str) -> Task:
        def answer(content: dict[str, str]) -> None:
            if child.poll() is not None or not _write_line(child, {"task": task_id} | content):
                raise TaskLostError("the connection that brought this task has ended; drop it")

        number = f"{child.pid}-{task_id}"
        return Task(number, payload, answer, lambda: child.poll() is not None)


def _leave(child: "subprocess.Popen[str]") -> None:
    """Have the child say goodbye and end; one that does not is killed."""
    child.send_signal(LEAVE)
    killer = threading.Timer(STOP_TIMEOUT_S, child.kill)
    killer.daemon = True
    killer.start()


def _write_line(child: "subprocess.Popen[str]", content: Mapping[str, str | float]) -> bool:
    """Write one JSON line to the child; False when it is gone."""
    assert child.stdin is not None
    try:
        child.stdin.write(json.dumps(content) + "\n")
        child.stdin.flush()
    except (BrokenPipeError, ValueError):
        return False
    return True


def _close(child: "subprocess.Popen[str]") -> None:
    for stream in (child.stdin, child.stdout):
        with suppress(BrokenPipeError):  # a line may still wait in the buffer
            if stream is not None:
                stream.close()


def _log_lines(stream: IO[str]) -> None:
    with stream:
        for line in stream:
            if line.strip():
                logger.warning("SuperNode: %s", line.strip())
