"""A whole federation on this machine: one coordinator, several participants, real TLS, own CA.

Every program is a process of its own, started as an operator or a hospital would start it; they
share nothing but the loopback network. Keys are made where they are used.
"""

import json
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, Queue
from subprocess import Popen
from typing import Any, Final

from cofuse.sdk import Coordinator
from coordinator.sealed import ensure_worker_key, worker_folder
from coordinator.signing import ensure_key
from protos.config import toml_text
from protos.process import end, spawn
from trust.ca import create_authority, new_identity, sign_request
from trust.pivot_manifest import SIGNER_FILE
from trust.seal_keys import RECIPIENT_FILE

READY_S: Final = 180.0
_ONE_THREAD: Final = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}

Hear = Callable[[str, dict[str, Any]], None]
"""Told (who, message) for every line a process says."""


class FederationError(RuntimeError):
    """A process of the federation ended or did not come up; the message holds its last words."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ParticipantPlan:
    """What a participant of this federation is made of."""

    name: str
    corpus: Path
    model: Mapping[str, Any]
    training: Mapping[str, Any]
    policy: Mapping[str, Any]


class Federation:
    """Starts processes, hears what they say, and ends every one of them."""

    def __init__(
        self, folder: Path, hear: Hear, *, settings: Mapping[str, Any] | None = None
    ) -> None:
        """Args: settings: of coordinator.toml, besides or instead of the demo's own."""
        self._folder = folder
        self._settings = settings or {}
        self._hear = hear
        self._processes: dict[str, Popen[str]] = {}
        self._readers: dict[str, threading.Thread] = {}
        self._ready: Queue[dict[str, Any]] = Queue()
        self.address = ""
        self.engine_address = ""
        self.console_url = ""

    def __enter__(self) -> "Federation":
        return self

    def __exit__(self, *_error: object) -> None:
        self.stop()

    def init(self) -> None:
        """Make the authority, the coordinator's identity, and one operator and one researcher."""
        create_authority(self._folder / "coordinator" / "ca", "cofuse-demo")
        tls = self._folder / "coordinator" / "tls"
        self._identity("coordinator", "coordinator", tls)
        authority = self._folder / "coordinator" / "ca"
        ensure_key(tls / "key.pem", authority / "ca.pem")
        ensure_worker_key(worker_folder(tls / "key.pem"), authority / RECIPIENT_FILE)
        for role in ("operator", "researcher"):
            self._identity(role, f"demo-{role}", self._folder / role)

    def start_coordinator(self, *, engine_advertise: str | None = None) -> None:
        """Start the coordinator and wait until it serves; again after a stop keeps its ports."""
        self.begin_coordinator(engine_advertise=engine_advertise)
        self.await_coordinator()

    def begin_coordinator(self, *, engine_advertise: str | None = None) -> None:
        """Start the coordinator's process."""
        home = self._folder / "coordinator"
        settings = {
            "listen": self.address or "127.0.0.1:0",
            "engine_listen": self.engine_address or "127.0.0.1:0",
            "data_dir": "data",
            "approval": "auto",
            **({"engine_advertise": engine_advertise} if engine_advertise else {}),
            "tls": {
                "ca": "ca/ca.pem",
                "certificate": "tls/certificate.pem",
                "key": "tls/key.pem",
            },
            **self._settings,
        }
        (home / "coordinator.toml").write_text(toml_text(settings), encoding="utf-8")
        self._spawn("coordinator", "coordinator.main", [str(home / "coordinator.toml")])

    def await_coordinator(self) -> None:
        """Wait until the coordinator serves."""
        ready = self._wait_ready("coordinator")
        self.address, self.engine_address = ready["address"], ready["engine_address"]
        self.console_url = ready.get("console_url", "")

    def enrol(self, name: str) -> None:
        """Make a participant's key at its own folder and have its certificate signed, once."""
        if not (self._folder / name / "certificate.pem").exists():
            self._identity("participant", name, self._folder / name)

    def start_participant(self, plan: ParticipantPlan, *, coordinator: str = "") -> None:
        """Make a participant's folder if it is new, and start its daemon.

        Args: coordinator: what it dials; default: the coordinator itself.
        """
        home = self._folder / plan.name
        self.enrol(plan.name)
        if not (home / "participant.toml").exists():
            (home / "policy.toml").write_text(toml_text(plan.policy), encoding="utf-8")
            tls = {"ca": "ca.pem", "certificate": "certificate.pem", "key": "key.pem"}
            settings = {
                "name": plan.name,
                "coordinator": coordinator or self.address,
                "corpus": str(plan.corpus.resolve()),
                "data_dir": "data",
                "policy": "policy.toml",
                "model": plan.model,
                "training": plan.training,
                "tls": tls,
            }
            (home / "participant.toml").write_text(toml_text(settings), encoding="utf-8")
        self._spawn(
            plan.name, "participant.daemon", [str(home / "participant.toml")], threads=_ONE_THREAD
        )

    def run(self, who: str, module: str, arguments: Sequence[str]) -> None:
        """Start a helper process (the base pivot's training)."""
        self._spawn(who, module, arguments, threads=_ONE_THREAD)

    def wait(self, who: str) -> None:
        """Wait for a helper to end well.

        Raises: FederationError.
        """
        self._processes[who].wait()
        self._readers[who].join()
        self.check()

    def connect(self, role: str) -> Coordinator:
        """The SDK under the operator's or the researcher's identity."""
        home = self._folder / role
        return Coordinator(
            self.address,
            ca=home / "ca.pem",
            certificate=home / "certificate.pem",
            key=home / "key.pem",
        )

    def pid(self, who: str) -> int:
        """Process id of one of ours."""
        return self._processes[who].pid

    def kill(self, who: str) -> None:
        """SIGKILL one process, as a power cut would."""
        self._processes[who].kill()
        self._processes[who].wait()

    def check(self) -> None:
        """Raise FederationError when a process has ended badly."""
        for who, process in self._processes.items():
            if process.poll() not in (None, 0):
                log = (self._folder / "logs" / f"{who}.log").read_text(encoding="utf-8")
                raise FederationError(
                    f"{who} ended with status {process.returncode}: {log.strip()[-1500:]}"
                )

    def stop(self) -> None:
        """End every process, participants first."""
        for who in reversed(self._processes):
            self._processes[who].terminate()
        for who in reversed(self._processes):
            end(self._processes[who])
        for reader in self._readers.values():
            reader.join(timeout=5)
        self._processes.clear()

    def _identity(self, role: Any, name: str, home: Path) -> None:
        """Make a key and a request at `home`; the authority signs; the key stays."""
        request = new_identity(home, role, name)
        authority = self._folder / "coordinator" / "ca"
        certificate = sign_request(authority, request, role=role, name=name)
        (home / "certificate.pem").write_bytes(certificate)
        for public in ("ca.pem", SIGNER_FILE, RECIPIENT_FILE):
            if (authority / public).exists():  # the coordinator's own identity is older
                (home / public).write_bytes((authority / public).read_bytes())

    def _spawn(
        self,
        who: str,
        module: str,
        arguments: Sequence[str],
        threads: Mapping[str, str] | None = None,
    ) -> None:
        logs = self._folder / "logs"
        logs.mkdir(parents=True, exist_ok=True)
        with (logs / f"{who}.log").open("a", encoding="utf-8") as stderr:
            process = spawn(module, arguments, stderr=stderr, environment=threads)
        self._processes[who] = process
        if who == "coordinator":
            self._ready = Queue()  # what an earlier one said of itself is over
        reader = threading.Thread(target=self._relay, args=(who, process, self._ready), daemon=True)
        self._readers[who] = reader
        reader.start()

    def _relay(self, who: str, process: "Popen[str]", ready: "Queue[dict[str, Any]]") -> None:
        assert process.stdout is not None
        for line in process.stdout:
            try:
                message = json.loads(line)
            except json.JSONDecodeError:
                continue
            if message.get("kind") == "ready":
                ready.put(message)
            self._hear(who, message)

    def _wait_ready(self, who: str) -> dict[str, Any]:
        for _ in range(int(READY_S / 0.2)):
            self.check()
            with suppress(Empty):
                return self._ready.get(timeout=0.2)
        raise FederationError(f"{who} was not ready within {READY_S:.0f} s")
