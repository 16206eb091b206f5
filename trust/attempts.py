"""What must not be possible behind a wall, tried: a checkup tells of it.

A probe goes behind the wall by the same call as the process itself, and then does its worst: it
opens what it must not, and it reaches for a listener of ours outside, on TCP, on UDP and on an
abstract Unix socket. What gets through a wall that the kernel agreed to keep up has broken it; a
wall that the platform does not offer is said to be missing.
"""

import json
import os
import secrets
import socket
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, Literal

from trust.landlock import SCOPE_ABI, TCP_ABI
from trust.walls import Held

Verdict = Literal["held", "broken", "not enforceable here"]
WITHIN_S: Final = 60.0
"""For all attempts of one probe."""
_FILES: Final = frozenset({"read", "list", "write", "make"})
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
class Finding:
    """One attempt, and what it says of the wall."""

    role: str
    says: str
    verdict: Verdict
    stopped_by: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkup:
    """All of it."""

    findings: tuple[Finding, ...]
    missing: tuple[str, ...]
    """What the platform does not offer, a sentence each."""

    @property
    def broken(self) -> list[Finding]:
        """What should have been stopped and was not."""
        return [one for one in self.findings if one.verdict == "broken"]


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


def attempt(one: Attempt) -> str:
    """Try it. Returns: the system's words where it was stopped; empty: nothing stopped it."""
    try:
        VERBS[one.verb](one.target)
    except OSError as error:
        return error.strerror or type(error).__name__
    return ""


def answer(held: Held, attempts: Iterable[Attempt]) -> None:
    """The probe's end: behind the wall, try all, and tell on stdout."""
    outcomes = [attempt(one) for one in attempts]
    json.dump({"held": asdict(held), "outcomes": outcomes}, sys.stdout)


def asked() -> list[Attempt]:
    """The probe's beginning: what it is to try, from stdin."""
    return [Attempt(**one) for one in json.load(sys.stdin)]


def probe(
    module: str, arguments: Sequence[str], attempts: Sequence[Attempt]
) -> tuple[Held, list[str]]:
    """Have `python -m module` try them; what holds, and what stopped each.

    Raises: RuntimeError when the probe itself fails; OSError.
    """
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments],
        input=json.dumps([asdict(one) for one in attempts]),
        capture_output=True,
        text=True,
        timeout=WITHIN_S,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"{module} ended with {done.returncode}: {done.stderr[-500:]}")
    told: dict[str, Any] = json.loads(done.stdout)
    return Held(**told["held"]), list(told["outcomes"])


def findings(
    role: str, attempts: Sequence[Attempt], held: Held, outcomes: Sequence[str]
) -> list[Finding]:
    """What each outcome says."""
    return [
        Finding(role=role, says=one.says, verdict=judge(one, held, by), stopped_by=by)
        for one, by in zip(attempts, outcomes, strict=True)
    ]


def places(those: Iterable[tuple[str, Path, str]]) -> list[Attempt]:
    """Attempts on files, by verb, place and what it would mean; of what is there.

    What is not there would be stopped by that alone.
    """
    return [
        Attempt(verb=verb, target=str(path), says=says)
        for verb, path, says in those
        if path.exists()
    ]


def network(port: int, name: str) -> list[Attempt]:
    """Ways out. Args: port, name: where outside() listens."""
    place = f"127.0.0.1:{port}"
    return [
        Attempt(verb="connect", target=place, says="reaches another program by TCP"),
        Attempt(verb="send", target=place, says="reaches another program by UDP"),
        Attempt(verb="abstract", target=name, says="reaches another program by an abstract socket"),
        Attempt(verb="listen", target="127.0.0.1", says="listens on TCP"),
    ]


def judge(one: Attempt, held: Held, stopped_by: str) -> Verdict:
    """What an outcome says, given what the kernel agreed to."""
    if stopped_by:
        return "held"
    return "broken" if _enforced(one.verb, held) else "not enforceable here"


def _enforced(verb: str, held: Held) -> bool:
    alone = not held.namespace
    needs = {"connect": alone or held.abi >= TCP_ABI, "send": alone, "listen": held.abi >= TCP_ABI}
    needs["abstract"] = held.abi >= SCOPE_ABI
    return not held.landlock if verb in _FILES else needs[verb]


@contextmanager
def outside() -> Iterator[tuple[int, str]]:
    """Listen as another program would, on TCP and UDP and on an abstract socket; say where."""
    name = f"cofuse-doctor-{secrets.token_hex(8)}"
    with (
        socket.socket() as tcp,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp,
        socket.socket(socket.AF_UNIX) as abstract,
    ):
        tcp.bind(("127.0.0.1", 0))
        tcp.listen()
        port = tcp.getsockname()[1]
        udp.bind(("127.0.0.1", port))
        abstract.bind(f"\0{name}")
        abstract.listen()
        socket.create_connection(("127.0.0.1", port)).close()  # else being stopped proves nothing
        yield port, name
