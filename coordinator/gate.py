"""The engine's public port: what is let through to Flower, from whom, and how much.

Mutual TLS comes first, so whoever is heard at all holds a certificate of our authority. Then, in
the order of cost and before Flower sees a byte: the route, the key, the rate, the body's size.
This module knows no flwr; what it must know of Flower's protocol it is told.
"""

import asyncio
import base64
import hmac
import socket
import ssl
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import uvicorn
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from coordinator.limits import Rates
from trust.identity import IdentityError, Leaf, leaf_of, public_key_bytes

# The largest body that a participant may send: a reply of the largest payload, with room.
MAX_BODY_BYTES: Final = 1_048_576
MAX_CONNECTIONS: Final = 4096
HANDSHAKE_S: Final = 5.0
"""A connection that has not finished its TLS handshake by then is closed."""
REQUEST_S: Final = 10.0
"""Likewise one that has not sent its first request, or the whole of a body."""
CALLS_PER_S: Final = 20.0
"""What one participant may call in the long run; a SuperNode polls once a second."""
BURST: Final = 200.0
AT_ONCE: Final = 4
"""Calls that Flower works on side by side: each writes to its one SQLite file several times, and
the more wait for that lock, the longer each does."""
START_TIMEOUT_S: Final = 30.0
STOP_TIMEOUT_S: Final = 10.0


class PortError(RuntimeError):
    """The public port did not open."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PortTls:
    """PEM files of the public port."""

    ca: Path
    """Certificate of the authority that signs participants."""
    certificate: Path
    key: Path


class PublicPort:
    """Serves an application over mutual TLS, in a thread with a loop of its own."""

    def __init__(self, app: ASGIApp, tls: PortTls) -> None:
        self._server = uvicorn.Server(_server_config(app, tls))
        self._thread: threading.Thread | None = None

    def open(self, listener: socket.socket) -> None:
        """Answer what comes in at `listener`. Raises: PortError."""
        self._thread = threading.Thread(
            target=_serve, args=(self._server, listener), name="engine-fleet", daemon=True
        )
        self._thread.start()
        ends = time.monotonic() + START_TIMEOUT_S
        while not self._server.started:
            if not self._thread.is_alive() or time.monotonic() > ends:
                raise PortError("the public port did not open: look at the coordinator's log")
            time.sleep(0.02)

    def close(self) -> None:
        """Take no more calls; those that run have two seconds."""
        self._server.should_exit = True
        if self._thread is not None:
            self._thread.join(STOP_TIMEOUT_S)


@dataclass(frozen=True, slots=True)
class _Peer:
    """The participant at the other end of a connection, by its TLS certificate."""

    leaf: Leaf
    public_key: bytes


class _PeerProtocol(H11Protocol):  # type: ignore[misc]
    """HTTP/1.1 that tells the application which participant is speaking."""

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        certificate = transport.get_extra_info("ssl_object").getpeercert(binary_form=True)
        self.app_state: dict[str, Any] = {"peer": _peer_of(certificate)}
        self.loop.call_later(REQUEST_S, self._close_if_silent)

    def _close_if_silent(self) -> None:
        if self.cycle is None and not self.transport.is_closing():
            self.transport.close()


def _peer_of(certificate: bytes) -> _Peer | None:
    try:
        leaf = leaf_of(certificate)
    except IdentityError:
        return None
    if leaf.identity.role != "participant":
        return None
    return _Peer(leaf, public_key_bytes(certificate))


class Gate:
    """Lets through calls, on known routes, of participants that sign with their certificate's key.

    Flower's own signature covers a time stamp only, and it takes the sender that a reply names
    on trust; both are closed here, because the TLS session and the node key are one key.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        key_header: str,
        routes: Mapping[str, Callable[[bytes], bool]],
        rates: Rates | None = None,
        refusal: Callable[[Leaf], object] = lambda _leaf: None,
    ) -> None:
        """Args: key_header: where a call states its public key. routes: path -> body's check.

        refusal: why a certificate counts no more, if so; asked at every request, because its
            connection may be older than the reason.
        """
        self._app = app
        self._key_header = key_header.lower().encode()
        self._routes = routes
        self._rates = rates or Rates(CALLS_PER_S, BURST)
        self._refusal = refusal
        self._turns = asyncio.Semaphore(AT_ONCE)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer 404, 403, 429, 413 or 408, or pass the request on with its body."""
        if scope["type"] != "http" or scope["method"] != "POST":
            return await _refuse(send, 404)
        check = self._routes.get(scope["path"])
        if check is None:
            return await _refuse(send, 404)
        peer = scope["state"].get("peer")
        if peer is None or self._refusal(peer.leaf) or not self._signs_with_own_key(scope, peer):
            return await _refuse(send, 403)
        if not self._rates.take(peer.leaf.identity.name):
            return await _refuse(send, 429)
        if _declared_bytes(scope) > MAX_BODY_BYTES:
            return await _refuse(send, 413)
        try:
            async with asyncio.timeout(REQUEST_S):
                body = await _read_body(receive)
        except TimeoutError:
            return await _refuse(send, 408)
        if body is None:
            return await _refuse(send, 413)
        if not check(body):
            return await _refuse(send, 403)
        await self._in_turn(scope, _replay(body, receive), send)

    async def _in_turn(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let Flower answer, AT_ONCE at a time; whoever reads slowly keeps nobody waiting."""
        answer: list[Message] = []

        async def keep(event: Message) -> None:
            answer.append(event)

        async with self._turns:
            await self._app(scope, receive, keep)
        for event in answer:
            await send(event)

    def _signs_with_own_key(self, scope: Scope, peer: _Peer) -> bool:
        keys = [value for name, value in scope["headers"] if name == self._key_header]
        if len(keys) != 1:
            return False
        return hmac.compare_digest(keys[0], base64.b64encode(peer.public_key))


def _declared_bytes(scope: Scope) -> int:
    """What the request says of its length; 0 when it says nothing: it is counted then."""
    lengths = [value for name, value in scope["headers"] if name == b"content-length"]
    return int(lengths[0]) if lengths and lengths[0].isdigit() else 0


async def _read_body(receive: Receive) -> bytes | None:
    """The request's body, or None when it is larger than MAX_BODY_BYTES."""
    body = bytearray()
    while True:
        event = await receive()
        body += event.get("body", b"")
        if len(body) > MAX_BODY_BYTES:
            return None
        if not event.get("more_body", False):
            return bytes(body)


def _replay(body: bytes, receive: Receive) -> Receive:
    events = iter([{"type": "http.request", "body": body, "more_body": False}])

    async def replay() -> Any:
        return next(events, None) or await receive()

    return replay


async def _refuse(send: Send, status: int) -> None:
    # Who is nobody here is hung up on too: with a renewed certificate it dials anew.
    headers = [(b"connection", b"close")] if status == 403 else []
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": b""})


def _server_config(app: ASGIApp, tls: PortTls) -> uvicorn.Config:
    server = uvicorn.Config(
        app,
        http=_PeerProtocol,
        ws="none",
        loop="asyncio",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        limit_concurrency=MAX_CONNECTIONS,
        timeout_keep_alive=75,
        timeout_graceful_shutdown=2,
        ssl_keyfile=tls.key,
        ssl_certfile=tls.certificate,
        ssl_ca_certs=str(tls.ca),
        ssl_cert_reqs=ssl.CERT_REQUIRED,
    )
    server.load()
    assert server.ssl is not None
    server.ssl.minimum_version = ssl.TLSVersion.TLSv1_3
    return server


def _serve(server: uvicorn.Server, listener: socket.socket) -> None:
    # Outside the main thread uvicorn leaves the process's signal handlers alone.
    async def serve() -> None:
        loop: Any = asyncio.get_running_loop()
        # uvicorn has no word for this, and asyncio alone would wait a minute for a handshake.
        loop.create_server = partial(loop.create_server, ssl_handshake_timeout=HANDSHAKE_S)
        await server.serve(sockets=[listener])

    with listener:
        asyncio.run(serve())
