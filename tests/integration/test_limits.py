"""Whoever is rude to the coordinator's port is refused, and the honest do not notice."""

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest

from protos.errors import RemoteError, remote_errors
from protos.tls import dial
from protos.v1 import transfer_pb2 as pb
from protos.v1 import transfer_pb2_grpc
from tests.integration.transfer_site import MIB, THREADS, Site, make_file, start_site

__all__ = ["start_site"]
STAT = "/cofuse.v1.Transfer/Stat"
PUT = "/cofuse.v1.Transfer/Put"
HANDSHAKE_S = 5.0


def slowest_honest_call_s(site: Site, calls: int = 20) -> float:
    """The longest that a small honest call takes now, on a connection of its own."""
    channel = dial(site.address, site.identity)
    stub = transfer_pb2_grpc.TransferStub(channel)
    took = []
    for _ in range(calls):
        begun = time.monotonic()
        stub.Stat(pb.StatRequest(sha256="0" * 64), timeout=10)
        took.append(time.monotonic() - begun)
    channel.close()
    return max(took)


def raw_call(site: Site, method: str, message: bytes, **options: Any) -> grpc.StatusCode:
    """Send bytes as they are, past our own limits; the status that comes back."""
    read = tuple(
        f.read_bytes() for f in (site.identity.ca, site.identity.key, site.identity.certificate)
    )
    unlimited = [("grpc.max_send_message_length", -1), ("grpc.max_metadata_size", 2**24)]
    with grpc.secure_channel(
        site.address, grpc.ssl_channel_credentials(*read), options=unlimited
    ) as channel:
        try:
            channel.unary_unary(method)(message, timeout=20, **options)
        except grpc.RpcError as error:
            return error.code()
    return grpc.StatusCode.OK


def test_what_is_too_large_is_refused_without_memory(start_site: Callable[..., Site]) -> None:
    """A message over the limit, headers over theirs, and a message that would unpack to more."""
    site = start_site()
    slowest_honest_call_s(site, 1)
    before = psutil.Process().memory_info().rss
    large = bytes(64 * MIB)
    assert raw_call(site, STAT, large) is grpc.StatusCode.RESOURCE_EXHAUSTED
    headers = tuple((f"x-{n}", "y" * 90) for n in range(3000))
    assert raw_call(site, STAT, b"", metadata=headers) is grpc.StatusCode.RESOURCE_EXHAUSTED
    refused = raw_call(site, STAT, large, compression=grpc.Compression.Gzip)
    assert refused in (grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.UNIMPLEMENTED)
    del large
    assert psutil.Process().memory_info().rss - before < 200 * MIB  # 64 of it were the sender's
    assert slowest_honest_call_s(site) < 4.0


def test_silent_streams_of_one_caller_leave_room_for_the_others(
    start_site: Callable[..., Site],
) -> None:
    site = start_site(idle_s=1.0)
    end = threading.Event()

    def silent() -> Iterator[pb.PutRequest]:
        end.wait(20)
        yield pb.PutRequest()

    with dial(site.address, site.identity) as channel:
        stub = transfer_pb2_grpc.TransferStub(channel)
        calls = [stub.Put(silent()) for _ in range(100)]
        try:
            # The streams it may have at once are given up as stalled; then the next ones come.
            assert slowest_honest_call_s(site, 5) < 10.0
        finally:
            end.set()
            for call in calls:
                call.cancel()


def test_a_body_that_trickles_is_ended_as_stalled(start_site: Callable[..., Site]) -> None:
    site = start_site(idle_s=0.5)
    end = threading.Event()

    def trickle() -> Iterator[pb.PutRequest]:
        yield pb.PutRequest(
            header=pb.PutHeader(sha256="0" * 64, size_bytes=9, kind=pb.CONTRIBUTION)
        )
        end.wait(20)

    with dial(site.address, site.identity) as channel:
        stub = transfer_pb2_grpc.TransferStub(channel)
        with pytest.raises(RemoteError, match="nothing moved") as caught, remote_errors():
            list(stub.Put(trickle()))
        end.set()
    assert caught.value.error_id == "stalled"


def test_readers_that_do_not_read_keep_nobody_waiting_and_are_ended(
    start_site: Callable[..., Site], tmp_path: Path
) -> None:
    """They hold no thread, so an honest call is answered beside them."""
    site = start_site(idle_s=0.5)
    path, sha256 = make_file(tmp_path, 64 * MIB)
    site.artifacts.add(path, sha256)
    site.store.add_artifact(sha256, "coordinator", "PIVOT", 64 * MIB)
    with dial(site.address, site.identity) as channel:
        stub = transfer_pb2_grpc.TransferStub(channel)
        calls = [stub.Get(pb.GetRequest(sha256=sha256)) for _ in range(THREADS)]
        for call in calls:
            next(call)
        assert slowest_honest_call_s(site, 1) < 8.0
        deadline = time.monotonic() + 30
        while site.server.open_calls:
            assert time.monotonic() < deadline, "the server still waits for the readers"
            threading.Event().wait(0.05)
        ends = []
        for call in calls:
            got, error = 1, None
            try:
                for _ in call:
                    got += 1
            except grpc.RpcError as caught:
                error = caught.code()
            ends.append((error, got < 64))
        # What was on its way already is all it gets, and the reason comes behind it. On a slow
        # machine gRPC's windows may grow to a whole file: that one has been read, in a way.
        assert set(ends) <= {(grpc.StatusCode.DEADLINE_EXCEEDED, True), (None, False)}


def test_who_shows_no_certificate_is_hung_up_on_and_nobody_waits(
    start_site: Callable[..., Site],
) -> None:
    """Idle connections, and one that sends a byte a second."""
    site = start_site()
    host, _, port = site.address.rpartition(":")
    with ExitStack() as stack:
        idle = [
            stack.enter_context(socket.create_connection((host, int(port)))) for _ in range(300)
        ]
        begun = time.monotonic()
        assert slowest_honest_call_s(site) < 4.0
        idle[0].send(b"\x16")
        for one in idle:
            one.settimeout(2 * HANDSHAKE_S + 5)
            assert one.recv(1) == b""
        assert time.monotonic() - begun < 2 * HANDSHAKE_S


def test_keepalive_and_reauthentication_are_set_on_every_channel() -> None:
    from protos.tls import CLIENT_OPTIONS, SERVER_OPTIONS

    server, client = dict(SERVER_OPTIONS), dict(CLIENT_OPTIONS)
    assert server["grpc.max_connection_age_ms"] == 3_600_000
    # A client that pinged more often than the server allows would be hung up on.
    allowed_ms = server["grpc.http2.min_ping_interval_without_data_ms"]
    assert client["grpc.keepalive_time_ms"] >= allowed_ms
