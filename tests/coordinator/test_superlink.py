"""Both sides of the engine, real: processes, TLS on loopback, Flower's own state on disk."""

import base64
import datetime
import hashlib
import io
import json
import os
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from flwr.proto.fleet_pb2 import PushMessagesRequest
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest
from hypothesis import given
from hypothesis import strategies as st

from coordinator import flower_run
from coordinator.engine import EngineConfig, Reply
from coordinator.flower_run import Run, reply_of
from coordinator.superlink import FLEET_ROUTES, SuperLink
from participant.engine import Engine as ParticipantEngine
from participant.engine import Task, TaskLostError
from trust import ca

ONLINE_S = 120.0
DELIVERY_S = 90.0  # Flower may lose a message to who comes back; it goes out again


@dataclass
class Consortium:
    """A fresh authority, a coordinator's engine, and participants that are made on demand."""

    root: Path
    engine: SuperLink

    def identity(self, role: ca.Role, name: str, authority: str = "ca") -> Path:
        directory = self.root / authority / f"{role}-{name}"
        if not directory.exists():
            request = ca.new_identity(directory, role, name)
            pem = ca.sign_request(self.root / authority, request, role=role, name=name)
            (directory / "cert.pem").write_bytes(pem)
        return directory

    def config(self, port: int = 0) -> EngineConfig:
        hub = self.identity("coordinator", "hub")
        return EngineConfig(
            state_dir=self.root / "state",
            public_port=port,
            ca=self.root / "ca" / "ca.pem",
            certificate=hub / "cert.pem",
            key=hub / "key.pem",
        )

    def register(self, name: str) -> int:
        pem = (self.identity("participant", name) / "cert.pem").read_bytes()
        return self.engine.register(name, ca.public_key_bytes(pem))

    def settings(self, name: str) -> dict[str, Any]:
        holder = self.identity("participant", name)
        return {
            "state_dir": self.root / f"participant-{name}",
            "superlink_address": self.engine.public_address,
            "ca": self.root / "ca" / "ca.pem",
            "certificate": holder / "cert.pem",
            "key": holder / "key.pem",
            "poll_s": 0.2,
        }

    def deliver(self, assignments: dict[int, str], deadline_s: float = DELIVERY_S) -> Any:
        replies: dict[int, Reply] = {}
        self.engine.deliver(
            assignments,
            on_reply=replies.__setitem__,
            stop=threading.Event(),
            deadline_s=deadline_s,
        )
        return replies


class Worker:
    """Answers a participant's tasks in a thread, and remembers them."""

    def __init__(self, engine: ParticipantEngine, answer: Callable[[Task], None]) -> None:
        self.engine = engine
        self.answer = answer
        self.seen: list[str] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._stop.is_set():
            if (task := self.engine.next_task(0.2)) is not None:
                self.seen.append(task.payload)
                self.answer(task)

    def stop(self) -> None:
        self._stop.set()
        self._thread.join()
        self.engine.stop()


def echo(task: Task) -> None:
    task.reply(json.dumps({"echo": json.loads(task.payload)}))


def echoed(value: object) -> Reply:
    return Reply(json.dumps({"echo": value}))


@pytest.fixture(scope="module")
def consortium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Consortium]:
    root = tmp_path_factory.mktemp("consortium")
    ca.create_authority(root / "ca", "consortium")
    ca.create_authority(root / "other", "consortium")
    made = Consortium(root, None)  # type: ignore[arg-type]
    made.engine = SuperLink(made.config())
    made.engine.start()
    yield made
    made.engine.stop()


@pytest.fixture(scope="module")
def workers(consortium: Consortium) -> Iterator[dict[int, Worker]]:
    made = {}
    for name in ("alpha", "beta"):
        node = consortium.register(name)
        engine = ParticipantEngine(**consortium.settings(name))
        engine.start()
        made[node] = Worker(engine, echo)
    for worker in made.values():
        assert worker.engine.wait_until_online(ONLINE_S)
    yield made
    for worker in made.values():
        worker.stop()


@pytest.fixture
def answering(workers: dict[int, Worker]) -> Iterator[dict[int, Worker]]:
    """The two workers; whatever a test makes them answer ends with the test."""
    for worker in workers.values():
        worker.answer = echo
        worker.seen.clear()
    yield workers
    for worker in workers.values():
        worker.answer = echo


# --- what a delivery promises ---------------------------------------------------------------


def test_only_the_named_participant_gets_the_message(
    consortium: Consortium, answering: dict[int, Worker]
) -> None:
    named, other = answering
    assert consortium.deliver({named: '{"round": 1}'}) == {named: echoed({"round": 1})}
    assert answering[named].seen == ['{"round": 1}']
    assert answering[other].seen == []


def test_two_deliveries_at_once_do_not_mix(
    consortium: Consortium, answering: dict[int, Worker]
) -> None:
    results: dict[int, Any] = {}
    threads = [
        threading.Thread(
            target=lambda n=node: results.update(consortium.deliver({n: json.dumps(str(n))}))
        )
        for node in answering
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {node: echoed(str(node)) for node in answering}


def test_a_failure_comes_back_with_its_reason_and_the_others_are_kept(
    consortium: Consortium, answering: dict[int, Worker]
) -> None:
    failing, working = answering
    answering[failing].answer = lambda task: task.fail("the policy forbids it")
    replies = consortium.deliver(dict.fromkeys(answering, "1"))
    assert replies[failing].payload is None
    assert "the policy forbids it" in replies[failing].error
    assert replies[working] == echoed(1)


def test_a_delivery_ends_at_its_deadline_and_late_answers_disturb_nobody(
    consortium: Consortium, answering: dict[int, Worker]
) -> None:
    slow, quick = answering
    late: list[Task] = []
    answering[slow].answer = late.append
    began = time.monotonic()
    assert consortium.deliver(dict.fromkeys(answering, "1"), deadline_s=4.0) == {quick: echoed(1)}
    assert time.monotonic() - began < 20.0  # not a minute
    answering[slow].answer = echo
    late[0].reply('"too late"')
    assert consortium.deliver({slow: "2"}) == {slow: echoed(2)}


def test_stop_ends_a_delivery_at_once(consortium: Consortium, answering: dict[int, Worker]) -> None:
    node = consortium.register("absent")
    stop = threading.Event()
    threading.Timer(0.5, stop.set).start()
    began = time.monotonic()
    consortium.engine.deliver({node: "1"}, on_reply=pytest.fail, stop=stop, deadline_s=60.0)
    assert time.monotonic() - began < 20.0  # not a minute


def test_the_largest_message_passes_and_a_larger_one_is_refused_on_both_sides(
    consortium: Consortium, answering: dict[int, Worker]
) -> None:
    node, _ = answering
    errors: list[ValueError] = []

    def too_much(task: Task) -> None:
        try:
            task.reply("x" * 65_537)
        except ValueError as error:
            errors.append(error)
        task.reply("x" * 65_536)

    answering[node].answer = too_much
    assert consortium.deliver({node: "y" * 65_536}) == {node: Reply("x" * 65_536)}
    assert len(errors) == 1
    with pytest.raises(ValueError, match="65536 at most"):
        consortium.deliver({node: "y" * 65_537})


def test_registering_again_changes_nothing_and_strangers_cannot_be_addressed(
    consortium: Consortium,
) -> None:
    assert consortium.register("alpha") == consortium.register("alpha")
    with pytest.raises(ValueError, match="registered"):
        consortium.deliver({12345: "1"})


def test_messages_leave_nothing_behind(
    consortium: Consortium, answering: dict[int, Worker]
) -> None:
    consortium.deliver(dict.fromkeys(answering, "1"))
    state = consortium.engine._state
    assert (state.num_message_ins(), state.num_message_res()) == (0, 0)


@given(st.binary(max_size=200))
def test_bytes_that_are_no_reply_are_an_error_of_the_participant(content: bytes) -> None:
    object_id = hashlib.sha256(content).hexdigest()
    assert reply_of(object_id, {object_id: content}).error is not None


# --- what nobody can do ---------------------------------------------------------------------


def test_code_of_a_hostile_coordinator_never_arrives(
    consortium: Consortium, answering: dict[int, Worker], monkeypatch: pytest.MonkeyPatch
) -> None:
    node, _ = answering
    marker = consortium.root / "executed"
    bundle = hostile_bundle(marker)
    state = consortium.engine._state
    fab = type("Fab", (), {"hash_str": "", "content": bundle, "verifications": {}})
    bundle_sha256 = state.store_fab(fab)
    create_run = state.create_run
    hostile = {
        "fab_hash": bundle_sha256,
        "primary_task_type": "flwr-agentapp",
        "override_config": {"a-key-that": "no bundle has"},
    }
    monkeypatch.setattr(state, "create_run", lambda **run: create_run(**(run | hostile)))
    assert consortium.deliver({node: "1"}) == {node: echoed(1)}
    assert not marker.exists()
    home = consortium.root / "participant-alpha"
    files = {path.name for path in home.rglob("*") if path.is_file()}
    assert files <= {"node_id", "supernode.lock", "source"}
    assert bundle_sha256 == hashlib.sha256(bundle).hexdigest()


def hostile_bundle(marker: Path) -> bytes:
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as bundle:
        bundle.writestr(
            "pyproject.toml",
            '[project]\nname = "hostile"\nversion = "1"\n'
            '[tool.flwr.app]\npublisher = "x"\n[tool.flwr.app.components]\n'
            'serverapp = "hostile:app"\nclientapp = "hostile:app"\n',
        )
        bundle.writestr("hostile.py", f"open({str(marker)!r}, 'w').close()\n")
    return archive.getvalue()


def test_a_participant_listens_on_nothing(answering: dict[int, Worker]) -> None:
    children = psutil.Process().children(recursive=True)
    assert len(children) >= len(answering)
    for child in children:
        assert [c for c in child.net_connections() if c.status == psutil.CONN_LISTEN] == []


def test_the_coordinator_listens_on_the_public_port_only(consortium: Consortium) -> None:
    listening = [c for c in psutil.Process().net_connections() if c.status == psutil.CONN_LISTEN]
    ports = [connection.laddr.port for connection in listening]
    assert ports == [int(consortium.engine.public_address.split(":")[1])]


def client_tls(consortium: Consortium, holder: Path | None) -> ssl.SSLContext:
    tls = ssl.create_default_context(cafile=str(consortium.root / "ca" / "ca.pem"))
    if holder is not None:
        tls.load_cert_chain(holder / "cert.pem", holder / "key.pem")
    return tls


def dial(consortium: Consortium, holder: Path) -> httpx.Client:
    url = f"https://{consortium.engine.public_address}"
    return httpx.Client(base_url=url, verify=client_tls(consortium, holder), trust_env=False)


def signed(holder: Path) -> dict[str, str]:
    """The headers of Flower's node authentication, made here from the holder's own key."""
    key = load_pem_private_key((holder / "key.pem").read_bytes(), None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    stamp = datetime.datetime.now(datetime.UTC).isoformat()
    public = ca.public_key_bytes((holder / "cert.pem").read_bytes())
    return {
        "flwr-public-key": base64.b64encode(public).decode(),
        "flwr-timestamp": stamp,
        "flwr-signature": base64.b64encode(
            key.sign(stamp.encode(), ec.ECDSA(hashes.SHA256()))
        ).decode(),
        "content-type": "application/protobuf",
        "accept": "application/protobuf",
    }


def test_without_a_certificate_of_the_authority_there_is_no_connection(
    consortium: Consortium,
) -> None:
    a_server = consortium.identity("coordinator", "hub")
    strangers = (None, consortium.identity("participant", "alpha", authority="other"), a_server)
    host, port = consortium.engine.public_address.split(":")
    for holder in strangers:
        # Nothing is asked yet: a server that took the handshake would wait, and this time out.
        with (
            socket.create_connection((host, int(port)), timeout=3) as plain,
            client_tls(consortium, holder).wrap_socket(plain, server_hostname=host) as secured,
            suppress(ssl.SSLError, ConnectionError),
        ):
            assert secured.recv(1) == b""
    assert consortium.engine._port is not None
    server = consortium.engine._port._server
    assert server.config.ssl is not None
    assert server.config.ssl.verify_mode == ssl.CERT_REQUIRED
    assert server.config.ssl.minimum_version == ssl.TLSVersion.TLSv1_3


@pytest.mark.parametrize(
    "path",
    [
        "/v1/control/start-run",
        "/v1/control/register-node",
        "/v1/control/list-runs",
        "/v1/runtime/acquire-task",
        "/v1/runtime/push-messages",
        "/v1/fleet/register-node",
        "/v1/fleet/unregister-node",
        "/v1/fleet/get-fab",
        "/v1/fleet/../control/start-run",
        "/v1/fleet/%2e%2e/control/start-run",
        "//v1/control/start-run",
        "/docs",
        "/openapi.json",
        "/health",
    ],
)
def test_a_member_finds_only_the_fleet_routes(consortium: Consortium, path: str) -> None:
    holder = consortium.identity("participant", "alpha")
    with dial(consortium, holder) as client:
        for method in ("GET", "POST"):
            assert client.request(method, path, headers=signed(holder)).status_code == 404


def test_another_role_or_another_key_is_refused_on_every_fleet_route(
    consortium: Consortium,
) -> None:
    alpha = consortium.identity("participant", "alpha")
    researcher = consortium.identity("researcher", "rita")
    for holder, headers in (
        (researcher, signed(researcher)),
        (alpha, signed(consortium.identity("participant", "beta"))),
        (alpha, {}),
    ):
        with dial(consortium, holder) as client:
            for route in FLEET_ROUTES:
                assert client.post(route, headers=headers).status_code == 403


def test_a_participant_cannot_reply_in_the_name_of_another(
    consortium: Consortium, answering: dict[int, Worker]
) -> None:
    mine, other = answering
    forged = PushMessagesRequest()
    forged.node.node_id = mine
    forged.messages_list.add().metadata.src_node_id = other
    holder = consortium.identity("participant", "alpha")
    with dial(consortium, holder) as client:
        answer = client.post(
            "/v1/fleet/push-messages", content=forged.SerializeToString(), headers=signed(holder)
        )
        assert answer.status_code == 403
        answer = client.post("/v1/fleet/push-messages", content=b"\xff", headers=signed(holder))
        assert answer.status_code == 403


def test_a_member_with_its_own_key_is_let_through(
    consortium: Consortium, answering: dict[int, Worker]
) -> None:
    """Without this one, the refusals above could come from a port that refuses everybody."""
    node, other = answering
    holder = consortium.identity("participant", "alpha")
    with dial(consortium, holder) as client:
        for claimed, status in ((node, 200), (other, 401)):
            request = SendNodeHeartbeatRequest(heartbeat_interval=30)
            request.node.node_id = claimed
            answer = client.post(
                "/v1/fleet/send-node-heartbeat",
                content=request.SerializeToString(),
                headers=signed(holder),
            )
            assert answer.status_code == status


# --- what restarts do -----------------------------------------------------------------------


def test_a_supernode_that_is_killed_is_back_within_seconds(
    consortium: Consortium, answering: dict[int, Worker]
) -> None:
    node, _ = answering
    engine = answering[node].engine
    held: list[Task] = []
    taken = threading.Event()

    def hold(task: Task) -> None:
        held.append(task)
        taken.set()

    answering[node].answer = hold
    consortium.engine.deliver({node: "1"}, on_reply=pytest.fail, stop=taken, deadline_s=DELIVERY_S)
    assert engine._child is not None
    engine._child.kill()
    engine._child.wait()
    assert held[0].lost
    with pytest.raises(TaskLostError):
        held[0].reply("1")
    answering[node].answer = echo
    time.sleep(1.0)  # the supervisor has noticed
    assert engine.wait_until_online(ONLINE_S)
    assert consortium.deliver({node: "2"}) == {node: echoed(2)}


class HeldPoll(threading.Event):
    """A delivery's stop event, whose first wait ends only when the test lets it."""

    def __init__(self) -> None:
        super().__init__()
        self.go = threading.Event()

    def wait(self, timeout: float | None = None) -> bool:
        self.go.wait(DELIVERY_S)
        return super().wait(timeout)


def test_a_message_lost_between_two_polls_is_noticed_and_goes_out_again(
    consortium: Consortium, answering: dict[int, Worker], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Flower says nothing here: the node is online before and after, and has the message."""
    monkeypatch.setattr(flower_run, "LOST_S", 0.5)
    node, _ = answering
    engine = answering[node].engine
    poll, taken, back = HeldPoll(), threading.Event(), threading.Event()
    replies: dict[int, Reply] = {}
    answering[node].answer = lambda _task: taken.set()
    delivery = threading.Thread(
        target=consortium.engine.deliver,
        args=({node: "1"},),
        kwargs={
            "on_reply": replies.__setitem__,
            "stop": poll,
            "deadline_s": DELIVERY_S,
            "idle_s": lambda _node: 60.0 if back.is_set() else 0.0,
        },
    )
    delivery.start()
    assert taken.wait(DELIVERY_S)
    assert engine._child is not None
    first = engine._child
    first.kill()
    first.wait()
    answering[node].answer = echo
    ends = time.monotonic() + ONLINE_S
    while engine._child in (first, None) or not engine.wait_until_online(0.1):
        assert time.monotonic() < ends
    poll.go.set()
    delivery.join(2.0)
    assert replies == {}  # it is lost, and without another witness nobody would ever know
    back.set()
    delivery.join()
    assert replies == {node: echoed(1)}


@pytest.mark.slow
def test_a_dismissed_supernode_leaves_and_a_summoned_one_comes(
    consortium: Consortium, answering: dict[int, Worker]
) -> None:
    node, _ = answering
    engine = answering[node].engine
    engine.summon(None)
    ends = time.monotonic() + ONLINE_S
    while node in consortium.engine.online():
        assert time.monotonic() < ends
        time.sleep(0.05)
    assert engine._child is None
    engine.summon(consortium.engine.public_address)
    assert engine.wait_until_online(ONLINE_S)
    assert consortium.deliver({node: "1"}) == {node: echoed(1)}


PARTICIPANT = """
import json, sys
from pathlib import Path
from participant.engine import Engine
settings = json.loads(sys.argv[1])
plain = {"superlink_address", "poll_s"}
engine = Engine(**{k: v if k in plain else Path(v) for k, v in settings.items()})
engine.start()
assert "flwr" not in sys.modules and "torch" not in sys.modules
print("started", flush=True)
while True:
    if task := engine.next_task(1.0):
        task.reply(task.payload)
"""


@pytest.mark.slow
def test_a_participant_that_is_killed_leaves_no_process_and_starts_again(
    consortium: Consortium,
) -> None:
    """Each delivery begins while the participant is absent, and waits for it."""
    node = consortium.register("delta")
    settings = json.dumps(consortium.settings("delta"), default=str)
    for value in ("1", "2"):
        program = subprocess.Popen(
            [sys.executable, "-c", PARTICIPANT, settings], stdout=subprocess.PIPE
        )
        assert program.stdout is not None
        assert consortium.deliver({node: value}) == {node: Reply(value)}
        (child,) = psutil.Process(program.pid).children()
        assert not any("torch" in path.path for path in child.memory_maps())
        os.kill(program.pid, signal.SIGKILL)
        printed, _ = program.communicate()
        assert printed == b"started\n"
        child.wait(timeout=10)
        assert node not in consortium.engine.online()  # it said goodbye all the same


def test_a_coordinator_restarts_on_its_state_and_participants_come_back(
    consortium: Consortium,
    answering: dict[int, Worker],
    capfd: pytest.CaptureFixture[str],
) -> None:
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    node, other = answering
    port = int(consortium.engine.public_address.split(":")[1])
    consortium.engine.stop()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port), timeout=5)
    consortium.engine = SuperLink(consortium.config(port))
    consortium.engine.start()
    assert consortium.register("alpha") == node
    assert consortium.deliver({node: "1", other: "2"}) == {node: echoed(1), other: echoed(2)}
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert capfd.readouterr().out == ""


def test_runs_that_a_dead_coordinator_left_are_ended_at_the_next_start(
    consortium: Consortium, answering: dict[int, Worker]
) -> None:
    orphan = Run(consortium.engine._state)
    port = int(consortium.engine.public_address.split(":")[1])
    consortium.engine.stop()
    consortium.engine = SuperLink(consortium.config(port))
    consortium.engine.start()
    (run,) = consortium.engine._state.get_run_info(run_ids=[orphan.run_id])
    assert (run.status.status, run.status.sub_status) == ("finished", "stopped")


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_participant_without_memory_of_its_node_is_back_once_flower_gives_the_old_one_up(
    consortium: Consortium,
) -> None:
    """Flower refuses a node that it takes for alive; the supervisor keeps trying."""
    node = consortium.register("epsilon")
    engine = ParticipantEngine(**consortium.settings("epsilon"))
    engine.start()
    assert engine.wait_until_online(ONLINE_S)
    (consortium.root / "participant-epsilon" / "node_id").unlink()
    assert engine._child is not None
    engine._child.kill()
    while engine._online.is_set():  # the supervisor has not seen it yet
        time.sleep(0.05)
    worker = Worker(engine, echo)
    replies = consortium.deliver({node: "1"}, deadline_s=5.0)
    assert node not in replies or replies[node].error is not None
    assert engine.wait_until_online(2 * ONLINE_S)
    assert consortium.deliver({node: "2"}) == {node: echoed(2)}
    worker.stop()
