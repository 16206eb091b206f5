"""The stream that idle participants hold, and the server that holds a thousand of them."""

import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from queue import Queue
from typing import Any

import grpc
import pytest

from coordinator.audit import lines
from coordinator.presence import BEAT_S
from coordinator.serving import GrpcServer
from coordinator.wiring import serving
from protos.errors import CofuseError, RemoteError, abort, remote_errors
from protos.tls import dial
from protos.v1 import fleet_pb2 as pb
from protos.v1 import fleet_pb2_grpc
from tests.integration.conftest import MakeIdentity, config_at, identities_at
from trust.chain import read_record

WAIT_S = 20.0


class Attending:
    """A stream whose beats the test gives, and what was heard on it."""

    def __init__(self, channel: grpc.Channel, *, join: bool = True) -> None:
        self.beats: Queue[pb.Beat | None] = Queue()
        self.heard: Queue[Any] = Queue()
        stub = fleet_pb2_grpc.FleetStub(channel)
        if join:
            stub.Join(pb.JoinRequest(), timeout=WAIT_S)
        self.call = stub.Attend(iter(self.beats.get, None))
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        try:
            with remote_errors():
                for summons in self.call:
                    self.heard.put(summons)
        except (RemoteError, grpc.RpcError) as error:
            self.heard.put(error)
        else:
            self.heard.put(None)

    def next(self) -> Any:
        return self.heard.get(timeout=WAIT_S)


@pytest.fixture(scope="module")
def identities(tmp_path_factory: pytest.TempPathFactory) -> MakeIdentity:
    return identities_at(tmp_path_factory.mktemp("attend"))


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory, identities: MakeIdentity) -> Iterator[str]:
    with serving(config_at(tmp_path_factory.mktemp("hub"), identities)) as running:
        yield running.address


@pytest.fixture
def channel(address: str, identities: MakeIdentity, request: Any) -> Iterator[grpc.Channel]:
    """One participant a test: none has joined before."""
    made = dial(address, identities("participant", f"p{abs(hash(request.node.name))}"))
    yield made
    made.close()


def test_the_first_answer_comes_at_once_and_an_end_is_an_end(channel: grpc.Channel) -> None:
    one = Attending(channel)
    one.beats.put(pb.Beat(software_version="1"))
    said = one.next()
    assert (said.summoned, [*said.ended_rounds], said.beat_interval_s) == (False, [], BEAT_S)
    one.beats.put(None)
    assert one.next() is None


def test_who_has_not_joined_is_told_to(channel: grpc.Channel) -> None:
    error = Attending(channel, join=False).next()
    assert isinstance(error, RemoteError)
    assert error.error_id == "not_joined"
    assert "call Join first" in str(error)


@pytest.mark.parametrize(
    ("beat", "says"),
    [
        (pb.Beat(software_version="x" * 41), "40 plain characters"),
        (pb.Beat(software_version="a\nb"), "printable characters"),
        (pb.Beat(working_rounds=["../../x" * 9]), "40 plain characters"),
        (pb.Beat(working_rounds=["rnd-1"] * 17), "wanted at most 16"),
    ],
)
def test_a_beat_that_means_nothing_ends_the_stream_with_the_reason(
    channel: grpc.Channel, beat: pb.Beat, says: str
) -> None:
    one = Attending(channel)
    one.next()
    one.beats.put(beat)
    error = one.next()
    assert isinstance(error, RemoteError)
    assert error.error_id == "bad_request"
    assert says in str(error)


def test_a_flood_of_beats_ends_the_stream(channel: grpc.Channel) -> None:
    one = Attending(channel)
    for _ in range(150):
        one.beats.put(pb.Beat())
    one.next()
    error = one.next()
    assert isinstance(error, RemoteError)
    assert error.error_id == "too_many_calls"


def test_a_round_nobody_waits_for_is_told_as_soon_as_it_is_named(channel: grpc.Channel) -> None:
    one = Attending(channel)
    one.next()
    one.beats.put(pb.Beat(working_rounds=["rnd-12"]))
    assert list(one.next().ended_rounds) == ["rnd-12"]


def test_a_second_daemon_under_one_name_ends_the_first_ones_attendance(
    channel: grpc.Channel,
) -> None:
    first = Attending(channel)
    first.next()
    second = Attending(channel)
    assert second.next() is not None
    assert first.next() is None


# --- the server -----------------------------------------------------------------------------


class Service(fleet_pb2_grpc.FleetServicer):
    """Fails, refuses, waits: what a handler that blocks may do."""

    def __init__(self) -> None:
        self.handlers: dict[str, Callable[[Any], None]] = {}
        self.ended = threading.Event()

    def Join(self, request: pb.JoinRequest, context: Any) -> pb.JoinReply:
        self.handlers[request.software_version](context)
        return pb.JoinReply(engine_address="x")

    def Attend(self, requests: Iterator[pb.Beat], context: Any) -> Iterator[pb.Summons]:
        """A handler that blocks, on a stream both ways."""
        try:
            for beat in requests:
                yield pb.Summons(beat_interval_s=int(beat.clock_unix_ms))
            while context.is_active():
                time.sleep(0.02)
        finally:
            self.ended.set()


@pytest.fixture
def served(
    identities: MakeIdentity,
) -> Iterator[tuple[Service, fleet_pb2_grpc.FleetStub]]:
    before = {t.name for t in threading.enumerate()}
    service = Service()
    register = partial(fleet_pb2_grpc.add_FleetServicer_to_server, service)
    server = GrpcServer("127.0.0.1:0", identities("coordinator", "hub"), [register])
    port = server.start()
    channel = dial(f"127.0.0.1:{port}", identities("participant", "a"))
    yield service, fleet_pb2_grpc.FleetStub(channel)
    channel.close()
    server.stop()
    left = {t.name for t in threading.enumerate()} - before
    assert not [name for name in left if name.startswith(("grpc", "Fleet"))]


def test_our_own_fault_is_told_without_detail_and_logged_once(
    served: tuple[Service, fleet_pb2_grpc.FleetStub], caplog: pytest.LogCaptureFixture
) -> None:
    service, stub = served
    service.handlers["fail"] = lambda _: 1 / 0  # type: ignore[assignment, return-value]
    with pytest.raises(RemoteError) as caught, remote_errors():
        stub.Join(pb.JoinRequest(software_version="fail"), timeout=WAIT_S)
    assert caught.value.error_id == "internal"
    assert "division" not in str(caught.value)
    assert ["rpc.failed" in record.message for record in caplog.records] == [True]


def test_a_refusal_arrives_with_its_id_whether_raised_or_aborted(
    served: tuple[Service, fleet_pb2_grpc.FleetStub],
) -> None:
    service, stub = served
    refusal = CofuseError("wrong_state", "found x, wanted y")

    def raises(_: Any) -> None:
        raise refusal

    service.handlers = {"raise": raises, "abort": lambda context: abort(context, refusal)}
    for how in service.handlers:
        with pytest.raises(RemoteError, match="found x, wanted y") as caught, remote_errors():
            stub.Join(pb.JoinRequest(software_version=how), timeout=WAIT_S)
        assert caught.value.error_id == "wrong_state"


def test_a_blocking_handler_takes_and_gives_messages_and_hears_that_the_caller_left(
    served: tuple[Service, fleet_pb2_grpc.FleetStub],
) -> None:
    service, stub = served
    call = stub.Attend(pb.Beat(clock_unix_ms=n) for n in range(1, 4))
    assert [next(call).beat_interval_s for _ in range(3)] == [1, 2, 3]
    assert not service.ended.is_set()
    call.cancel()
    assert service.ended.wait(WAIT_S)


def test_waiting_streams_cost_no_threads(address: str, identities: MakeIdentity) -> None:
    channels = [dial(address, identities("participant", f"n{n}")) for n in range(20)]
    attending = [Attending(channel) for channel in channels]
    for one in attending:
        one.next()
    # One or two took the calls of Join, one after another; the streams need none.
    assert len([t for t in threading.enumerate() if t.name.startswith("Fleet")]) <= 3
    for channel in channels:
        channel.close()


def test_each_side_hears_the_head_of_the_others_audit_chain(
    tmp_path: Path, identities: MakeIdentity
) -> None:
    with serving(config_at(tmp_path, identities)) as running:
        channel = dial(running.address, identities("participant", "witness"))
        attending = Attending(channel)
        for seq, letter in ((4, "a"), (9, "a"), (6, "b")):
            attending.beats.put(pb.Beat(audit_seq=seq, audit_head=letter * 64))
        heard = attending.next()
        while not heard.audit_seq:  # the first one may be said before the head is known
            heard = attending.next()
        ends = time.monotonic() + WAIT_S
        while not (found := running.store.anchors().get("witness")) or not found.alarm:
            assert time.monotonic() < ends
            time.sleep(0.05)
        assert "back from record 9 " in found.alarm
        with running.store.database.read() as db:
            known = {record["seq"]: record["h"] for record in map(read_record, lines(db))}
        assert known[heard.audit_seq] == heard.audit_head
        attending.beats.put(pb.Beat(audit_seq=1, audit_head="no hash"))
        while not isinstance(said := attending.next(), RemoteError):
            pass
        assert said.error_id == "bad_request"
        channel.close()
