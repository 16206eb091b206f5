"""The walls between the participant's processes, each tried: `cofuse doctor` tells of it.

A listener of ours stands outside, on TCP, on UDP and on an abstract Unix socket, and each process'
probe is to reach it; each is to open what it must not. A wall that the kernel agreed to keep up and
that something got through is broken; one that the platform does not offer is said to be missing.
"""

import json
import secrets
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, Literal

from participant.config import ParticipantConfig
from participant.egress import FOLDER, EgressLog
from participant.landlock import SCOPE_ABI, TCP_ABI
from participant.probe import Attempt
from participant.sandbox import ROLES, SEALED, Held, Role, make_folders

Verdict = Literal["held", "broken", "not enforceable here"]
_PROVED: Final = frozenset({"held", "broken"})
_WITHIN_S: Final = 60.0
_FILES: Final = frozenset({"read", "list", "write", "make"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One attempt, and what it says of the wall."""

    role: Role
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


def check(participant_toml: Path, config: ParticipantConfig) -> Checkup:
    """Try every wall. Raises: OSError, RuntimeError when a probe itself fails."""
    make_folders(config)
    findings: list[Finding] = []
    missing: list[str] = []
    with _outside() as (port, name):
        for role in ROLES:
            attempts = attempts_of(role, config, port, name)
            held, outcomes = _probe(role, participant_toml, attempts)
            missing += [f"{role}: {words}" for words in held.missing]
            for one, stopped_by in zip(attempts, outcomes, strict=True):
                verdict = judge(one, held, stopped_by)
                findings.append(
                    Finding(role=role, says=one.says, verdict=verdict, stopped_by=stopped_by)
                )
    return Checkup(findings=tuple(findings), missing=tuple(missing))


def attempts_of(role: Role, config: ParticipantConfig, port: int, name: str) -> list[Attempt]:
    """What a process is to try, of what there is. Args: port, name: where somebody listens."""
    everything = _network(port, name) if role != "courier" else _network(port, name)[-2:]
    for verb, path, says in _places(role, config):
        if path.exists():  # else it would be stopped by that alone
            everything.append(Attempt(verb=verb, target=str(path), says=says))
    return everything


def _network(port: int, name: str) -> list[Attempt]:
    place = f"127.0.0.1:{port}"
    return [
        Attempt(verb="connect", target=place, says="reaches another program by TCP"),
        Attempt(verb="send", target=place, says="reaches another program by UDP"),
        Attempt(verb="abstract", target=name, says="reaches another program by an abstract socket"),
        Attempt(verb="listen", target="127.0.0.1", says="listens on TCP"),
    ]


def _places(role: Role, config: ParticipantConfig) -> list[tuple[str, Path, str]]:
    """Verb, place, and what it would mean."""
    data = config.data_dir
    places: dict[Role, list[tuple[str, Path, str]]] = {
        "trainer": [
            ("make", data / SEALED, "puts a file among those that may leave"),
            ("make", data / FOLDER, "puts a file into the audit chain's folder"),
            ("make", data, "writes beside its own folders"),
            ("write", config.policy, "changes the policy"),
            ("write", config.tls.key, "changes the key"),
        ],
        "guard": [],
        "courier": [
            ("read", config.corpus, "reads the corpus"),
            ("write", config.corpus, "changes the corpus"),
            ("list", data / "expert", "looks into the expert's folder"),
            ("read", data / "expert" / "model" / "model.safetensors", "reads the expert"),
            ("list", data / "outbox", "looks into the outbox"),
            ("list", data / "guard", "sees what is about to be sealed"),
            ("list", data / FOLDER, "looks into the audit chain's folder"),
            ("write", config.policy, "changes the policy"),
            ("make", data / SEALED, "puts a file among those that may leave"),
        ],
    }
    return places[role]


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


def record(config: ParticipantConfig, found: Checkup) -> None:
    """Put the outcome on the participant's chain. Raises: AuditError, KeyFileError, OSError."""
    EgressLog(config.data_dir, config.name).checked(
        broken=[f"{one.role} {one.says}" for one in found.broken],
        not_enforceable=[
            f"{one.role} {one.says}" for one in found.findings if one.verdict not in _PROVED
        ],
        tried=len(found.findings),
    )


@contextmanager
def _outside() -> Iterator[tuple[int, str]]:
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


def _probe(role: Role, participant_toml: Path, attempts: list[Attempt]) -> tuple[Held, list[str]]:
    done = subprocess.run(
        [sys.executable, "-m", "participant.probe", role, str(participant_toml)],
        input=json.dumps([asdict(one) for one in attempts]),
        capture_output=True,
        text=True,
        timeout=_WITHIN_S,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"the {role}'s probe ended with {done.returncode}: {done.stderr[-500:]}")
    told: dict[str, Any] = json.loads(done.stdout)
    return Held(**told["held"]), [str(one["stopped_by"]) for one in told["outcomes"]]
