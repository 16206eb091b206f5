"""How the daemon is doing, for whoever may read its folder.

A Unix socket, and no port: nothing listens that a network could reach, and the socket's mode
(0600) is the whole authentication. A reader connects and is sent one JSON object.
"""

import contextlib
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from participant.durable import write_durably

SOCKET: Final = "status.sock"
PAUSED: Final = "paused"
"""A file of this name in the data folder: no work is begun, and what runs stops at its next step.

It is a file, and no word over the socket, so that it outlives the daemon and needs none to run. It
holds the time at which the pause ends by itself, unix ms; nothing: only `resume` ends it."""
_TIMEOUT_S: Final = 2.0


@dataclass(frozen=True, slots=True)
class Pause:
    """Work stands still."""

    until_unix_ms: int
    """0: until somebody resumes."""


def pause(folder: Path, until_unix_ms: int = 0) -> None:
    """Let no work be begun in a data folder, from now on. Raises: OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    write_durably(folder / PAUSED, str(until_unix_ms) if until_unix_ms else "")


def resume(folder: Path) -> None:
    """Let work go on. Raises: OSError."""
    (folder / PAUSED).unlink(missing_ok=True)


def paused(folder: Path, now_unix_ms: int | None = None) -> Pause | None:
    """The pause that a data folder is in; None: work may go on.

    What is no time in the file is a pause without an end: stopping is the safe side.
    Args: now_unix_ms: default: the machine's clock.
    """
    try:
        text = (folder / PAUSED).read_text(encoding="ascii", errors="replace").strip()
    except FileNotFoundError:
        return None
    until = int(text) if text.isascii() and text.isdigit() else 0
    now = time.time_ns() // 1_000_000 if now_unix_ms is None else now_unix_ms
    return None if 0 < until <= now else Pause(until)


class StatusServer:
    """Answers until closed, in a thread."""

    def __init__(self, folder: Path, status: Callable[[], Mapping[str, Any]]) -> None:
        self._path = folder / SOCKET
        self._status = status
        self._listener = socket.socket(socket.AF_UNIX)
        self._thread = threading.Thread(target=self._serve, name="status", daemon=True)

    def open(self) -> None:
        """Listen; a socket that a killed daemon left is replaced."""
        self._path.unlink(missing_ok=True)
        before = os.umask(0o177)
        try:
            with _short(self._path) as path:
                self._listener.bind(path)
        finally:
            os.umask(before)
        self._listener.listen()
        self._thread.start()

    def close(self) -> None:
        """Answer no more."""
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._path.unlink(missing_ok=True)

    def _serve(self) -> None:
        while True:
            try:
                reader, _ = self._listener.accept()
            except OSError:
                return  # closed
            with reader, contextlib.suppress(OSError):
                reader.settimeout(_TIMEOUT_S)
                reader.sendall(json.dumps(self._status()).encode() + b"\n")


def read_status(folder: Path) -> dict[str, Any] | None:
    """What the daemon of a data folder says; None when none runs."""
    with socket.socket(socket.AF_UNIX) as reader:
        reader.settimeout(_TIMEOUT_S)
        try:
            with _short(folder / SOCKET) as path:
                reader.connect(path)
            with reader.makefile("rb") as file:
                text = file.read()
        except OSError:
            return None
    answer: dict[str, Any] = json.loads(text)
    return answer


@contextlib.contextmanager
def _short(path: Path) -> Iterator[str]:
    """A name for the socket that fits: the system takes about 100 bytes, and folders are deep."""
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        linux = Path(f"/proc/self/fd/{folder}")
        yield str(linux / path.name) if linux.exists() else str(path)
    finally:
        os.close(folder)
