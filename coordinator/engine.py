"""The federation engine: Flower's SuperLink inside the coordinator's process.

The only coordinator module that knows flwr. What the network can reach is one port: mutual TLS,
Flower's Fleet routes and nothing else. Flower's Control and Runtime APIs, which stock Flower
opens to whoever reaches them, are not served at all: this module starts runs, claims their task
and moves messages on Flower's own state, in process. No app bundle exists anywhere.
"""

import os

os.environ["FLWR_TELEMETRY_ENABLED"] = "0"
os.environ["FLWR_DISABLE_UPDATE_CHECK"] = "1"

import asyncio
import base64
import hmac
import logging
import socket
import ssl
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import uvicorn
from fastapi import FastAPI
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.app.message import make_message, remove_content_from_message
from flwr.app.metadata import Metadata
from flwr.common.constant import (
    HEARTBEAT_DEFAULT_INTERVAL,
    NOOP_ACCOUNT_NAME,
    NOOP_FLWR_AID,
    SUPERLINK_NODE_ID,
    Status,
    SubStatus,
)
from flwr.proto.fleet_pb2 import PushMessagesRequest
from flwr.supercore.constant import (
    FLEET_HTTP_PUBLIC_KEY_HEADER,
    NOOP_FEDERATION_ID,
    NodeStatus,
    TaskType,
)
from flwr.supercore.error import http_error_translator
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_tree,
    iterate_object_tree,
)
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from flwr.supercore.logger import console_handler
from flwr.supercore.object_store import NoObjectInStoreError
from flwr.supercore.protobuf.translation import ProtobufTranslationMiddleware
from flwr.superlink.config_loader import (
    get_federation_manager,
    get_objectstore_linkstate_factories,
)
from flwr.superlink.routers.fleet.node_auth import NodeAuthMiddleware
from flwr.superlink.routers.fleet.router import router as fleet_router
from google.protobuf.message import DecodeError
from sqlalchemy.exc import SQLAlchemyError
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from trust.ca import IdentityError, identity_of, public_key_bytes

logger = logging.getLogger(__name__)

# A record of this name, with one text under this key, is the whole content of every message.
RECORD: Final = "cofuse"
KEY: Final = "json"
MESSAGE_TYPE: Final = "train"

MAX_PAYLOAD_BYTES: Final = 65_536
# The largest body that a participant may send: a reply of the largest payload, with room.
MAX_BODY_BYTES: Final = 1_048_576
# A message is three objects: itself, its records, the one record.
MAX_OBJECTS: Final = 4
POLL_S: Final = 0.25
HEARTBEAT_S: Final = 10.0
START_TIMEOUT_S: Final = 30.0
STOP_TIMEOUT_S: Final = 10.0

# Registration is the operator's, and bundles are never fetched: neither route is here.
FLEET_ROUTES: Final = frozenset(
    f"/v1/fleet/{name}"
    for name in (
        "activate-node",
        "deactivate-node",
        "send-node-heartbeat",
        "pull-messages",
        "push-messages",
        "get-run",
        "pull-object",
        "push-object",
        "confirm-message-received",
    )
)


class EngineError(RuntimeError):
    """The engine cannot do what was asked; the caller tries again or tells the operator."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """Where the engine keeps its state, where it listens, and who it is."""

    state_dir: Path
    """Folder of Flower's SQLite file; it is made when missing."""
    public_host: str = "127.0.0.1"
    public_port: int = 0
    """0 picks a free port; a coordinator that restarts names the one that participants know."""
    ca: Path
    """Certificate of the authority that signs participants (PEM)."""
    certificate: Path
    key: Path


@dataclass(frozen=True, slots=True)
class Reply:
    """A participant's answer: its JSON text, or the reason why there is none."""

    payload: str | None
    error: str | None = None


class Engine:
    """Carries small JSON messages to participants and their replies back."""

    def __init__(self, config: EngineConfig) -> None:
        self._config = config
        self._state: Any = None
        self._server: uvicorn.Server | None = None
        self._thread: threading.Thread | None = None
        self._address = ""

    @property
    def public_address(self) -> str:
        """host:port that participants dial."""
        return self._address

    def start(self) -> None:
        """Open the state, end runs that an earlier process left, and serve the public port."""
        _quieten()
        self._config.state_dir.mkdir(parents=True, exist_ok=True)
        database = str(self._config.state_dir / "flower.sqlite")
        _, states = get_objectstore_linkstate_factories(database, get_federation_manager())
        self._state = states.state()
        for run in self._state.get_run_info(
            statuses=[Status.PENDING, Status.STARTING, Status.RUNNING]
        ):
            # Its replies cannot be told to anybody any more; the caller issues a new attempt.
            self._state.stop_run(run.run_id)
        listener = socket.create_server(
            (self._config.public_host, self._config.public_port), backlog=128
        )
        self._address = f"{self._config.public_host}:{listener.getsockname()[1]}"
        self._server = uvicorn.Server(_server_config(self._config, _fleet_app(states)))
        self._thread = threading.Thread(
            target=_serve, args=(self._server, listener), name="engine-fleet", daemon=True
        )
        self._thread.start()
        _wait_until_started(self._server, self._thread)

    def stop(self) -> None:
        """Close the public port. Flower's state stays on disk."""
        if self._server is None or self._thread is None:
            return
        self._server.should_exit = True
        self._thread.join(STOP_TIMEOUT_S)
        self._server = self._thread = None
        for database in (self._state, self._state.object_store):
            database._engine.dispose()

    def register(self, participant: str, public_key: bytes) -> int:
        """Admit a participant's key (PEM, as trust.ca.public_key_bytes gives it).

        Returns: its node id; the same one when the key is known already.
        """
        known = self._state.get_node_id_by_public_key(public_key)
        if known is not None:
            return int(known)
        try:
            node_id = self._state.create_node(
                owner_aid=NOOP_FLWR_AID,
                owner_name=NOOP_ACCOUNT_NAME,
                public_key=public_key,
                heartbeat_interval=HEARTBEAT_DEFAULT_INTERVAL,
                name=participant,
            )
        except ValueError:  # another thread was faster
            node_id = self._state.get_node_id_by_public_key(public_key)
        if not node_id:
            raise EngineError(f"found no node id for {participant}: register it again")
        return int(node_id)

    def online(self) -> set[int]:
        """Node ids whose SuperNode is connected; one that died is noticed after 60 s."""
        return {node.node_id for node in self._state.get_node_info(statuses=[NodeStatus.ONLINE])}

    def deliver(
        self,
        assignments: Mapping[int, str | bytes],
        *,
        on_reply: Callable[[int, Reply], None],
        stop: threading.Event,
        deadline_s: float,
    ) -> None:
        """Send each node its message in one Flower run, and hand back replies as they come.

        A message waits here until its node is online. Returns when all have replied, stop is set
        or deadline_s has passed; nodes that have not replied by then get no callback, and a
        reply that comes later is dropped. Several deliveries may run at once, in threads.

        Args: assignments: node id -> JSON text of at most MAX_PAYLOAD_BYTES.
            on_reply: called in this thread; it should return within seconds.
        Raises: ValueError for a message that is too large or a node that was never registered.
            EngineError when Flower has ended the run; the caller issues a new attempt.
        """
        waiting = {node: _checked_payload(payload) for node, payload in assignments.items()}
        self._check_registered(waiting)
        ends = time.monotonic() + deadline_s
        run = _start_run(self._state)
        try:
            while not stop.is_set() and time.monotonic() < ends:
                arrived: list[tuple[int, Reply]] = []
                with _database_may_be_busy():
                    for node in waiting.keys() & self.online() if waiting else ():
                        run.send(node, waiting[node], ttl_s=ends - time.monotonic())
                        del waiting[node]
                    arrived.extend(run.replies())
                    run.heartbeat()
                for node, reply in arrived:
                    on_reply(node, reply)
                if not waiting and not run.open_messages:
                    break
                stop.wait(POLL_S)
        finally:
            with _database_may_be_busy():  # a run that stays open here ends by itself in 60 s
                run.close(completed=not waiting and not run.open_messages)

    def _check_registered(self, nodes: Collection[int]) -> None:
        known = {node.node_id for node in self._state.get_node_info(node_ids=list(nodes))}
        if unknown := set(nodes) - known:
            raise ValueError(f"found the node ids {sorted(unknown)}, wanted registered ones")


class _Run:
    """One Flower run: its task is claimed by this process, so nothing else executes it."""

    def __init__(self, state: Any) -> None:
        self._state = state
        self.run_id: int = state.create_run(
            fab_id="cofuse/round",
            fab_version="1",
            fab_hash=None,
            override_config={},
            federation_id=NOOP_FEDERATION_ID,
            federation_config=None,
            flwr_aid=NOOP_FLWR_AID,
            primary_task_type=TaskType.SERVER_APP,
        )
        runs = state.get_run_info(run_ids=[self.run_id])
        if not runs or not state.claim_task(runs[0].primary_task_id):
            raise EngineError("Flower made no run: look at the coordinator's log")
        self._task_id: int = runs[0].primary_task_id
        if not state.activate_task(self._task_id):
            raise EngineError("Flower did not start the run: look at the coordinator's log")
        self._heartbeat_due = time.monotonic() + HEARTBEAT_S
        self.open_messages: dict[str, int] = {}
        self._incomplete: dict[str, Message] = {}

    def send(self, node: int, payload: str, *, ttl_s: float) -> None:
        """Queue one message for a node; Flower keeps it for ttl_s seconds."""
        content = RecordDict({RECORD: ConfigRecord({KEY: payload})})
        message = make_message(self._metadata(node, ttl_s), content)
        message.metadata.__dict__["_message_id"] = message.object_id
        session = self._state.start_session(self.run_id)
        stored, missing = self._state.store_message_and_object_tree(
            remove_content_from_message(message), get_object_tree(message), session
        )
        if not stored:
            raise EngineError(f"Flower took no message for node {node}: look at the log")
        objects = get_all_nested_objects(message)
        for object_id in missing:
            self._state.store_object(self.run_id, session, object_id, objects[object_id].deflate())
        self.open_messages[message.metadata.message_id] = node

    def replies(self) -> Iterator[tuple[int, Reply]]:
        """Replies that have arrived whole since the last call; each is given once."""
        if asked := set(self.open_messages) - set(self._incomplete):
            for message in self._state.get_message_res(message_ids=asked, run_id=self.run_id):
                self._incomplete[message.metadata.reply_to_message_id] = message
        for message_id, message in list(self._incomplete.items()):
            if (reply := self._read(message)) is not None:
                del self._incomplete[message_id]
                yield self.open_messages.pop(message_id), reply

    def heartbeat(self) -> None:
        """Tell Flower, every HEARTBEAT_S, that the run's task is alive."""
        if time.monotonic() < self._heartbeat_due:
            return
        if not self._state.acknowledge_task_heartbeat(self._task_id):
            raise EngineError(f"Flower has ended run {self.run_id}: issue a new attempt")
        self._heartbeat_due = time.monotonic() + HEARTBEAT_S

    def close(self, *, completed: bool) -> None:
        """End the run and drop its messages; later replies to it are refused by Flower."""
        outcome = SubStatus.COMPLETED if completed else SubStatus.STOPPED
        self._state.finish_task(self._task_id, outcome, "")
        self._state.cleanup_run(self.run_id)

    def _metadata(self, node: int, ttl_s: float) -> Metadata:
        # Message(...) would read the run from a process-wide variable; several runs live here.
        return Metadata(
            run_id=self.run_id,
            message_id="",
            src_node_id=SUPERLINK_NODE_ID,
            dst_node_id=node,
            reply_to_message_id="",
            group_id="",
            created_at=time.time(),
            ttl=max(ttl_s, 1.0),
            message_type=MESSAGE_TYPE,
            src_task_id=self._task_id,
        )

    def _read(self, message: Message) -> Reply | None:
        """The reply, or None while its objects are still on the way."""
        if message.has_error():
            return Reply(None, f"code {message.error.code}: {message.error.reason}")
        reply_id = message.metadata.message_id
        try:
            tree = self._state.object_store.get_object_tree(reply_id)
        except NoObjectInStoreError:
            return Reply(None, "found a reply without its content: it was lost, or never sent")
        object_ids = [node.object_id for node in iterate_object_tree(tree)]
        if len(object_ids) > MAX_OBJECTS:
            return Reply(None, f"found a reply of {len(object_ids)} objects, wanted 3")
        contents = {one: self._state.get_object(self.run_id, one) for one in object_ids}
        if None in contents.values():
            return Reply(None, "found a reply with a part missing: it was lost, or never sent")
        if b"" in contents.values():
            return None
        return _reply_of(reply_id, contents)


def _start_run(state: Any) -> _Run:
    try:
        return _Run(state)
    except SQLAlchemyError as error:
        raise EngineError(f"Flower's database took no run, try again: {error}") from error


def _reply_of(reply_id: str, contents: dict[str, bytes]) -> Reply:
    try:
        message = inflate_object_from_contents(reply_id, contents)
        payload = message.content.config_records[RECORD][KEY]
    except Exception as error:  # noqa: BLE001 - hostile bytes may make Flower's parser raise anything
        return Reply(None, f"found a reply that is not one text: {error!r}")
    if not isinstance(payload, str) or len(payload) > MAX_PAYLOAD_BYTES:
        return Reply(None, f"found a reply that is not a text of {MAX_PAYLOAD_BYTES} bytes at most")
    return Reply(payload)


def _checked_payload(payload: str | bytes) -> str:
    text = payload.decode() if isinstance(payload, bytes) else payload
    if (size := len(text.encode())) > MAX_PAYLOAD_BYTES:
        raise ValueError(
            f"found a message of {size} bytes, wanted {MAX_PAYLOAD_BYTES} at most: "
            "send a reference (sha256, size) and let the participant fetch the bytes"
        )
    return text


@contextmanager
def _database_may_be_busy() -> Iterator[None]:
    """SQLite may be locked by the threads that serve participants: say so, and go on."""
    try:
        yield
    except SQLAlchemyError as error:
        logger.warning("Flower's database was busy, trying again: %s", error)


# --- the public port ------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Peer:
    """The participant at the other end of a connection, by its TLS certificate."""

    name: str
    public_key: bytes


class _PeerProtocol(H11Protocol):  # type: ignore[misc]
    """HTTP/1.1 that tells the application which participant is speaking."""

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        certificate = transport.get_extra_info("ssl_object").getpeercert(binary_form=True)
        self.app_state: dict[str, Any] = {"peer": _peer_of(certificate)}


def _peer_of(certificate: bytes) -> _Peer | None:
    try:
        identity = identity_of(certificate)
    except IdentityError:
        return None
    if identity.role != "participant":
        return None
    return _Peer(identity.name, public_key_bytes(certificate))


class _Gate:
    """Lets through Fleet calls of participants that sign with the key of their certificate.

    Flower's own signature covers a time stamp only, and it takes the sender that a reply names
    on trust; both are closed here, because the TLS session and the node key are one key.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer 404, 403 or 413, or pass the request on with its body."""
        if scope["type"] != "http" or scope["method"] != "POST":
            return await _refuse(send, 404)
        if scope["path"] not in FLEET_ROUTES:
            return await _refuse(send, 404)
        if not _signs_with_own_key(scope):
            return await _refuse(send, 403)
        body = await _read_body(receive)
        if body is None:
            return await _refuse(send, 413)
        if scope["path"] == "/v1/fleet/push-messages" and not _speaks_for_itself(body):
            return await _refuse(send, 403)
        await self._app(scope, _replay(body, receive), send)


def _signs_with_own_key(scope: Scope) -> bool:
    peer = scope["state"].get("peer")
    header = FLEET_HTTP_PUBLIC_KEY_HEADER.lower().encode()
    keys = [value for name, value in scope["headers"] if name == header]
    if peer is None or len(keys) != 1:
        return False
    return hmac.compare_digest(keys[0], base64.b64encode(peer.public_key))


def _speaks_for_itself(body: bytes) -> bool:
    try:
        request = PushMessagesRequest.FromString(body)
    except DecodeError:
        return False
    senders = {message.metadata.src_node_id for message in request.messages_list}
    return senders == {request.node.node_id}


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
    await send({"type": "http.response.start", "status": status, "headers": []})
    await send({"type": "http.response.body", "body": b""})


def _fleet_app(states: Any) -> ASGIApp:
    """Flower's Fleet routes over its state, behind the gate; the order is Flower's own."""
    app = FastAPI(
        openapi_url=None,
        middleware=[
            Middleware(BaseHTTPMiddleware, dispatch=http_error_translator),
            Middleware(ProtobufTranslationMiddleware),
            Middleware(NodeAuthMiddleware),
        ],
    )
    app.state.linkstate_factory = states
    app.state.enable_supernode_auth = True
    app.include_router(fleet_router)
    return _Gate(app)


def _server_config(config: EngineConfig, app: ASGIApp) -> uvicorn.Config:
    server = uvicorn.Config(
        app,
        http=_PeerProtocol,
        ws="none",
        loop="asyncio",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_keep_alive=75,
        timeout_graceful_shutdown=2,
        ssl_keyfile=config.key,
        ssl_certfile=config.certificate,
        ssl_ca_certs=str(config.ca),
        ssl_cert_reqs=ssl.CERT_REQUIRED,
    )
    server.load()
    assert server.ssl is not None
    server.ssl.minimum_version = ssl.TLSVersion.TLSv1_3
    return server


def _serve(server: uvicorn.Server, listener: socket.socket) -> None:
    # Outside the main thread uvicorn leaves the process's signal handlers alone.
    with listener:
        asyncio.run(server.serve(sockets=[listener]))


def _wait_until_started(server: uvicorn.Server, thread: threading.Thread) -> None:
    ends = time.monotonic() + START_TIMEOUT_S
    while not server.started:
        if not thread.is_alive() or time.monotonic() > ends:
            raise EngineError("the public port did not open: look at the coordinator's log")
        time.sleep(0.02)


def _quieten() -> None:
    """Flower's and uvicorn's words go through logging, from WARNING on."""
    logging.getLogger("flwr").removeHandler(console_handler)
    for name in ("flwr", "uvicorn"):
        logging.getLogger(name).setLevel(logging.WARNING)
