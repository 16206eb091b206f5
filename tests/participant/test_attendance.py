"""The participant's end of the stream: it comes back by itself, and ends when told for good."""

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest

from participant import attendance
from participant.attendance import Attendance
from protos.errors import CofuseError, abort
from protos.tls import TlsFiles, server_credentials
from protos.v1 import fleet_pb2 as pb
from protos.v1 import fleet_pb2_grpc
from trust.ca import create_authority, new_identity, sign_request

WAIT_S = 20.0


class Hub(fleet_pb2_grpc.FleetServicer):
    """A coordinator that does as the test says."""

    def __init__(self) -> None:
        self.refusal: CofuseError | None = None
        self.attended = 0
        self.beats: list[pb.Beat] = []
        self.beaten = threading.Semaphore(0)
        self.hang_up = threading.Event()

    def Join(self, request: pb.JoinRequest, context: Any) -> pb.JoinReply:
        if self.refusal is not None:
            abort(context, self.refusal)
        return pb.JoinReply(engine_address="engine:1")

    def Attend(self, requests: Any, context: Any) -> Any:
        self.attended += 1
        yield pb.Summons(summoned=True, beat_interval_s=60)
        for beat in requests:
            self.beats.append(beat)
            self.beaten.release()
            if self.hang_up.is_set():
                self.hang_up.clear()
                return


class Daemon:
    """What the attendance calls back."""

    def __init__(self) -> None:
        self.joined: list[str] = []
        self.heard = threading.Semaphore(0)
        self.version = "1"


@pytest.fixture
def tls(tmp_path: Path) -> dict[str, TlsFiles]:
    create_authority(tmp_path / "ca", "x")
    made = {}
    for role, name in (("coordinator", "hub"), ("participant", "a")):
        request = new_identity(tmp_path / name, role, name)  # type: ignore[arg-type]
        pem = sign_request(tmp_path / "ca", request, role=role, name=name)  # type: ignore[arg-type]
        (tmp_path / name / "cert.pem").write_bytes(pem)
        made[name] = TlsFiles(
            ca=tmp_path / "ca" / "ca.pem",
            certificate=tmp_path / name / "cert.pem",
            key=tmp_path / name / "key.pem",
        )
    return made


def serve(hub: Hub, tls: TlsFiles, port: int = 0) -> tuple[grpc.Server, int]:
    server = grpc.server(ThreadPoolExecutor(8))
    fleet_pb2_grpc.add_FleetServicer_to_server(hub, server)
    bound = server.add_secure_port(f"127.0.0.1:{port}", server_credentials(tls))
    server.start()
    return server, bound


def attend(daemon: Daemon, port: int, tls: TlsFiles) -> Attendance:
    made = Attendance(
        f"127.0.0.1:{port}",
        tls,
        version="1",
        beat=lambda: pb.Beat(software_version=daemon.version),
        on_joined=daemon.joined.append,
        on_summons=lambda _: daemon.heard.release(),
    )
    made.start()
    return made


def test_it_beats_at_once_and_on_change_and_attends_again_after_a_loss(
    tls: dict[str, TlsFiles], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attendance, "FIRST_PAUSE_S", 0.1)
    hub, daemon = Hub(), Daemon()
    server, port = serve(hub, tls["hub"])
    one = attend(daemon, port, tls["a"])
    assert daemon.heard.acquire(timeout=WAIT_S)
    assert hub.beaten.acquire(timeout=WAIT_S)
    assert one.attending
    daemon.version = "2"
    one.beat_now()  # the next regular beat is a minute away
    assert hub.beaten.acquire(timeout=WAIT_S)
    assert [beat.software_version for beat in hub.beats] == ["1", "2"]
    hub.hang_up.set()
    one.beat_now()
    assert daemon.heard.acquire(timeout=WAIT_S)
    assert hub.attended == 2
    server.stop(None).wait()
    server, _ = serve(hub, tls["hub"], port)
    assert daemon.heard.acquire(timeout=WAIT_S)
    assert daemon.joined == ["engine:1"] * 3
    one.stop()
    server.stop(None)


def test_a_refusal_that_no_waiting_cures_ends_it_and_another_does_not(
    tls: dict[str, TlsFiles], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attendance, "FIRST_PAUSE_S", 0.05)
    hub, daemon = Hub(), Daemon()
    hub.refusal = CofuseError("internal", "the database is away")
    server, port = serve(hub, tls["hub"])
    one = attend(daemon, port, tls["a"])
    hub.refusal = None
    assert daemon.heard.acquire(timeout=WAIT_S)
    assert one.refusal is None
    hub.refusal = CofuseError("not_allowed", "you are a researcher")
    hub.hang_up.set()
    one.beat_now()
    one._thread.join(WAIT_S)
    assert one.refusal is not None
    assert one.refusal.error_id == "not_allowed"
    one.stop()
    server.stop(None)
