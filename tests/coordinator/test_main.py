"""The program: it says when it is ready, ends in order, tells in words why it won't start."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from coordinator.main import main
from coordinator.scheduler import Scheduler
from coordinator.store import Store
from protos.chunks import sha256_of
from protos.config import toml_text
from protos.process import PARENT_VARIABLE
from protos.tls import TlsFiles, dial
from protos.v1 import research_pb2, research_pb2_grpc, transfer_pb2, transfer_pb2_grpc
from tests.integration.conftest import MakeIdentity
from tests.uploads import put_requests
from trust.ca import create_authority, new_identity, sign_request

DAY_MS = 24 * 3600 * 1000
ROOT = Path(__file__).parents[2]


@pytest.fixture
def identities(tmp_path: Path) -> MakeIdentity:
    create_authority(tmp_path / "ca", "test")

    def make(role: Any, name: str) -> TlsFiles:
        home = tmp_path / role
        request = new_identity(home, role, name)
        certificate = sign_request(tmp_path / "ca", request, role=role, name=name)
        (home / "certificate.pem").write_bytes(certificate)
        return TlsFiles(
            ca=tmp_path / "ca" / "ca.pem",
            certificate=home / "certificate.pem",
            key=home / "key.pem",
        )

    return make


@pytest.fixture
def home(tmp_path: Path, identities: MakeIdentity, monkeypatch: pytest.MonkeyPatch) -> Path:
    # Who is called in process has no parent program to end with.
    monkeypatch.delenv(PARENT_VARIABLE, raising=False)
    identities("coordinator", "coordinator")
    _configure(tmp_path)
    return tmp_path


def _configure(home: Path, **changes: Any) -> None:
    tls = {
        "ca": "ca/ca.pem",
        "certificate": "coordinator/certificate.pem",
        "key": "coordinator/key.pem",
    }
    ports = {"listen": "127.0.0.1:0", "engine_listen": "127.0.0.1:0"}
    values = {**ports, "data_dir": "data", **changes, "tls": tls}
    (home / "coordinator.toml").write_text(toml_text(values), encoding="utf-8")


@dataclass(frozen=True)
class Started:
    process: "subprocess.Popen[str]"
    ready: dict[str, str]
    log: Path


@contextmanager
def _started(home: Path, **environment: str) -> Iterator[Started]:
    log = home / "log"
    with log.open("w") as stderr:
        process = subprocess.Popen(
            [sys.executable, "-m", "coordinator.main", str(home / "coordinator.toml")],
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            env={**os.environ, **environment},
        )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line, log.read_text()
        yield Started(process, json.loads(line), log)
    finally:
        process.kill()
        process.wait()


class Notified:
    """systemd's end of the notify socket."""

    def __init__(self, folder: Path) -> None:
        self.path = str(folder / "notify")
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(self.path)
        self._socket.settimeout(30)

    def next(self) -> str:
        return self._socket.recv(100).decode()


def test_a_stop_tells_first_then_drains_then_ends(
    home: Path, identities: MakeIdentity, tmp_path: Path
) -> None:
    (home / "data").mkdir()
    round_id = (
        Store.at(home / "data" / "coordinator.sqlite")
        .submit_round(request_id="r", submitted_by="a", spec_json="{}", deadline_ms=DAY_MS)
        .round_id
    )
    systemd = Notified(home)
    with _started(home, NOTIFY_SOCKET=systemd.path) as started:
        assert systemd.next() == "READY=1"
        url = f"http://{started.ready['ops_address']}"
        assert _readyz(url) == (200, {})
        channel = dial(started.ready["address"], identities("operator", "grace"))
        health = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
        assert next(health).status == health_pb2.HealthCheckResponse.SERVING
        request = research_pb2.WatchRoundRequest(round_id=round_id)
        events = research_pb2_grpc.ResearchStub(channel).WatchRound(request)
        next(events)
        upload = Upload(channel, tmp_path / "file")
        upload.begin()

        began = time.monotonic()
        started.process.send_signal(signal.SIGTERM)
        assert next(health).status == health_pb2.HealthCheckResponse.NOT_SERVING
        assert list(health) == []
        assert _readyz(url) == (503, {"stopping": "takes no new work"})
        with pytest.raises(grpc.RpcError, match="the coordinator is stopping") as caught:
            next(events)
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        with pytest.raises(grpc.RpcError) as caught:
            research_pb2_grpc.ResearchStub(channel).ListRounds(research_pb2.ListRoundsRequest())
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE

        assert upload.end().complete
        assert started.process.wait(30) == 0
        assert time.monotonic() - began < 30
        while (message := systemd.next()) == "WATCHDOG=1":
            pass
        assert message == "STOPPING=1"
        lines = [json.loads(line) for line in started.log.read_text().splitlines()]
        told = [line["event"] for line in lines if line["event"].startswith("coordinator.")]
        assert told == ["coordinator.ready", "coordinator.stopping", "coordinator.stopped"]
        channel.close()


class Upload:
    """A Put whose second half waits until it is told to go on."""

    def __init__(self, channel: grpc.Channel, path: Path) -> None:
        path.write_bytes(bytes(range(256)) * 32768)  # two chunks
        self._path, self._sha256 = path, sha256_of(path)
        self._stub = transfer_pb2_grpc.TransferStub(channel)
        self._go = threading.Event()

    def begin(self) -> None:
        self._answers = self._stub.Put(self._requests())
        while not self._stub.Stat(transfer_pb2.StatRequest(sha256=self._sha256)).received_bytes:
            assert self._answers.is_active()

    def end(self) -> transfer_pb2.StatReply:
        self._go.set()
        *_, last = self._answers
        return last

    def _requests(self) -> Iterator[transfer_pb2.PutRequest]:
        requests = put_requests(self._path, self._sha256, transfer_pb2.PIVOT, 0)
        yield next(requests)
        yield next(requests)
        assert self._go.wait(60)
        yield from requests


def _readyz(url: str) -> tuple[int, dict[str, str]]:
    try:
        with urllib.request.urlopen(f"{url}/readyz", timeout=5) as reply:
            return reply.status, json.load(reply)["problems"]
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)["problems"]


@contextmanager
def _own_signals() -> Iterator[None]:
    """main() takes the signal handlers; give them back."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@pytest.mark.parametrize("key", ["listen", "engine_listen", "ops_listen"])
def test_a_taken_port_is_told_by_its_key(
    home: Path, key: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.socket() as taken, _own_signals():
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        _configure(home, **{key: f"127.0.0.1:{taken.getsockname()[1]}"})
        assert main([str(home / "coordinator.toml")]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert f"error: {key}: " in said.err
    assert "Traceback" not in said.err


def test_a_missing_key_file_is_told_by_its_table(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (home / "coordinator" / "key.pem").unlink()
    with _own_signals():
        assert main([str(home / "coordinator.toml")]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: tls: ")
    assert "key.pem" in said
    assert "Traceback" not in said


@pytest.mark.parametrize("address", ["0.0.0.0:9090", "192.0.2.1:9090", "metrics.example:9090"])
def test_monitoring_never_listens_beyond_this_machine(
    home: Path, address: str, capsys: pytest.CaptureFixture[str]
) -> None:
    _configure(home, ops_listen=address)
    assert main([str(home / "coordinator.toml")]) == 2
    said = capsys.readouterr().err
    assert "ops_listen" in said
    assert "wanted 127.0.0.1:port" in said


def test_a_fault_of_its_loop_ends_the_program_and_is_one_line(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(_self: Scheduler) -> None:
        raise RuntimeError("found a loop that broke")

    monkeypatch.setattr(Scheduler, "run", broken)
    with _own_signals():
        assert main([str(home / "coordinator.toml")]) == 1
    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    fatal = [line for line in lines if line["level"] == "critical"]
    assert [line["event"] for line in fatal] == ["coordinator.failed"]
    assert fatal[0]["error"] == "RuntimeError: found a loop that broke"
