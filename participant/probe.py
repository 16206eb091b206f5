"""Tries, from behind the wall of one of the participant's processes, what must not be possible.

`python -m participant.probe ROLE participant.toml`, attempts as JSON on stdin, outcomes as JSON on
stdout. It goes behind the wall by the same call as the process itself, and then does its worst.
"""

import json
import os
import socket
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

from participant.config import load_config
from participant.sandbox import ROLES, enter, make_folders, wall_of

_TIMEOUT_S: Final = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """One thing that must not be possible."""

    verb: str
    """One of VERBS."""
    target: str
    """A path, host:port, or the name of an abstract Unix socket."""
    says: str
    """What it would mean, for people."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How an attempt ended."""

    attempt: Attempt
    stopped_by: str
    """The system's words; empty: nothing stopped it."""


def _connect(target: str) -> None:
    host, port = target.rsplit(":", 1)
    socket.create_connection((host, int(port)), _TIMEOUT_S).close()


def _send(target: str) -> None:
    host, port = target.rsplit(":", 1)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as out:
        out.sendto(b"x", (host, int(port)))


def _abstract(target: str) -> None:
    with socket.socket(socket.AF_UNIX) as out:
        out.settimeout(_TIMEOUT_S)
        out.connect(f"\0{target}")


def _listen(target: str) -> None:
    with socket.socket() as listener:
        listener.bind((target, 0))
        listener.listen()


def _read(target: str) -> None:
    with open(target, "rb") as file:
        file.read(1)


def _list(target: str) -> None:
    os.listdir(target)


def _write(target: str) -> None:
    with open(target, "ab"):
        pass


def _make(target: str) -> None:
    path = Path(target) / ".doctor"
    path.touch()
    path.unlink()


VERBS: Final[Mapping[str, Callable[[str], None]]] = {
    "connect": _connect,
    "send": _send,
    "abstract": _abstract,
    "listen": _listen,
    "read": _read,
    "list": _list,
    "write": _write,
    "make": _make,
}


def attempt(one: Attempt) -> Outcome:
    """Try it."""
    try:
        VERBS[one.verb](one.target)
    except OSError as error:
        return Outcome(attempt=one, stopped_by=error.strerror or type(error).__name__)
    return Outcome(attempt=one, stopped_by="")


def main(argv: list[str]) -> int:
    """Go behind the wall, try everything, and tell."""
    role = next(role for role in ROLES if role == argv[0])
    config = load_config(Path(argv[1]))
    attempts = [Attempt(**one) for one in json.load(sys.stdin)]
    make_folders(config)
    held = enter(wall_of(role, config))
    outcomes = [asdict(attempt(one)) for one in attempts]
    json.dump({"held": asdict(held), "outcomes": outcomes}, sys.stdout)
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
