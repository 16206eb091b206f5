"""The participant: three processes, and this one, which starts them and carries their lines.

`python -m participant.daemon participant.toml`. The trainer computes, the guard decides, the
courier dials; each is behind its wall (participant/sandbox.py). One that dies is started again, and
they end with this one. It does no work, so that nothing but a signal ends it: little is imported.
"""

import logging
import os
import selectors
import signal
import socket
import subprocess
import sys
import time
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from participant.durable import only_one
from participant.switchboard import Switchboard
from protos import logs
from protos.process import PARENT_VARIABLE, die_with_parent, give_way

FIRST_PAUSE_S: Final = 0.5
LONGEST_PAUSE_S: Final = 30.0
# A process that lived this long was healthy: its successor starts without a longer pause.
HEALTHY_S: Final = 60.0
_STARTED: Final = ("guard", "trainer", "courier")
_STOPPED: Final = ((("guard", "trainer"), 90.0), (("courier",), 15.0))
"""In this order, as the last answers of the guard still go out; each within so many seconds: the
first is for a checkpoint of the training. systemd's TimeoutStopSec is longer than both."""
_FINAL: Final = {("guard", 2): 2, ("guard", 3): 1, ("trainer", 3): 1, ("courier", 3): 1}
"""Whose exit status means that no new start would help, and ours then (participant/child.py). Of a
bad configuration the guard speaks for all, so it is waited for."""
_LOG = logging.getLogger(__name__)


@dataclass(slots=True)
class _Child:
    """One of the three."""

    role: str
    process: "subprocess.Popen[bytes] | None" = None
    born_s: float = 0.0
    pause_s: float = FIRST_PAUSE_S
    due_s: float = field(default_factory=time.monotonic)


class Supervisor:
    """Keeps three processes alive until it is told to stop, or one says that it is hopeless."""

    def __init__(self, participant_toml: Path) -> None:
        self._toml = participant_toml
        self._selector = selectors.DefaultSelector()
        self._board = Switchboard(self._selector)
        self._children = {role: _Child(role) for role in _STARTED}
        self._status: int | None = None  # the exit status, once we are to end

    def run(self) -> int:
        """Supervise; return the exit status."""
        wake, wakes = socket.socketpair()
        for end in (wake, wakes):
            end.setblocking(False)
        signal.set_wakeup_fd(wakes.fileno())
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGCHLD):
            signal.signal(number, _nothing)  # the byte on the socket is what counts
        self._selector.register(wake, selectors.EVENT_READ, wake)
        while self._status is None:
            for child in self._children.values():
                if child.process is None and child.due_s <= time.monotonic():
                    self._start(child)
            self._turn(self._next_s())
        for roles, grace_s in _STOPPED:
            self._end(roles, grace_s)
        return self._status

    def _start(self, child: _Child) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            words = (child.role, str(self._toml), str(theirs.fileno()))
            child.process = subprocess.Popen(
                [sys.executable, "-m", "participant.child", *words],
                stdin=subprocess.DEVNULL,
                # Events are the guard's to tell, and nobody else prints among them.
                stdout=None if child.role == "guard" else sys.stderr.fileno(),
                pass_fds=(theirs.fileno(),),
                env={**os.environ, PARENT_VARIABLE: str(os.getpid())},
            )
        if child.role == "trainer":
            give_way(child.process)
        child.born_s = time.monotonic()
        self._board.plug(child.role, ours)

    def _turn(self, timeout_s: float | None) -> None:
        """Wait for something to happen, and do what it asks for."""
        for key, events in self._selector.select(timeout_s):
            if not isinstance(key.data, str):
                self._heed(key.data.recv(4096))
            elif not self._board.turn(key.data, events):
                self._board.pull(key.data)
        for child in self._children.values():
            if child.process is not None and child.process.poll() is not None:
                self._bury(child, child.process.returncode)

    def _heed(self, numbers: bytes) -> None:
        if {signal.SIGTERM, signal.SIGINT} & set(numbers) and self._status is None:
            self._status = 0

    def _bury(self, child: _Child, code: int) -> None:
        self._board.pull(child.role)
        child.process = None
        if self._status is not None:
            return
        if (child.role, code) in _FINAL:
            self._status = _FINAL[child.role, code]
            return
        now = time.monotonic()
        if now - child.born_s > HEALTHY_S:
            child.pause_s = FIRST_PAUSE_S
        _LOG.warning("the %s ended with %d, the next in %.1f s", child.role, code, child.pause_s)
        child.due_s = now + child.pause_s
        child.pause_s = min(LONGEST_PAUSE_S, child.pause_s * 2)

    def _next_s(self) -> float | None:
        """Seconds until a start is due; None: none is."""
        due = [child.due_s for child in self._children.values() if child.process is None]
        return max(0.0, min(due) - time.monotonic()) if due else None

    def _end(self, roles: tuple[str, ...], grace_s: float) -> None:
        """Ask some to end, and wait; whoever takes too long is killed."""
        ends_s = time.monotonic() + grace_s
        mine = [self._children[role] for role in roles]
        for child in mine:
            if child.process is not None:
                child.process.terminate()
        while any(child.process is not None for child in mine):
            self._turn(max(0.0, ends_s - time.monotonic()))
            if time.monotonic() >= ends_s:
                for child in mine:
                    if child.process is not None:
                        child.process.kill()


def main(argv: list[str]) -> int:
    """Run the participant of one participant.toml."""
    die_with_parent()
    logs.configure("participant")
    if len(argv) != 1:
        sys.stderr.write("usage: python -m participant.daemon participant.toml\n")
        return 2
    try:
        folder = _data_dir(Path(argv[0]))
        folder.mkdir(parents=True, exist_ok=True)
        with only_one(folder):
            return Supervisor(Path(argv[0])).run()
    except (ValueError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 2 if isinstance(error, ValueError) else 1


def _data_dir(participant_toml: Path) -> Path:
    """Where the data lie; read by hand, as the whole configuration takes grpc and pydantic.

    Raises: ConfigError.
    """
    try:
        values = tomllib.loads(participant_toml.read_text(encoding="utf-8"))
        return participant_toml.resolve().parent / str(values["data_dir"])
    except (OSError, ValueError, KeyError):
        from participant.config import load_config

        return load_config(participant_toml).data_dir  # it says what is wrong


def _nothing(_number: int, _frame: object) -> None:
    pass


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
