"""Flower's SuperLink inside the coordinator's process: what coordinator/engine.py hands work to.

With flower_run.py the only coordinator module that knows flwr. What the network can reach is one
port (gate.py): mutual TLS, Flower's Fleet routes and nothing else. Flower's Control and Runtime
APIs, which stock Flower opens to whoever reaches them, are not served at all: this module starts
runs, claims their task and moves messages on Flower's own state, in process. No app bundle exists
anywhere.
"""

import os

os.environ["FLWR_TELEMETRY_ENABLED"] = "0"
os.environ["FLWR_DISABLE_UPDATE_CHECK"] = "1"

import logging
import socket
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Final

from fastapi import FastAPI
from flwr.common.constant import (
    HEARTBEAT_DEFAULT_INTERVAL,
    NOOP_ACCOUNT_NAME,
    NOOP_FLWR_AID,
    Status,
)
from flwr.proto.fleet_pb2 import PushMessagesRequest
from flwr.supercore.constant import FLEET_HTTP_PUBLIC_KEY_HEADER, NodeStatus
from flwr.supercore.error import http_error_translator
from flwr.supercore.logger import console_handler
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
from starlette.types import ASGIApp

from coordinator.engine import (
    MAX_PAYLOAD_BYTES,
    EngineConfig,
    EngineError,
    Reply,
    address_of,
    listen,
)
from coordinator.flower_run import Post, Run
from coordinator.gate import Gate, PortTls, PublicPort
from coordinator.schema import ALEMBIC
from trust.identity import Leaf

logger = logging.getLogger(__name__)

POLL_S: Final = 0.25

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


class SuperLink:
    """Carries small JSON messages to participants and their replies back."""

    def __init__(self, config: EngineConfig) -> None:
        self._config = config
        self._state: Any = None
        self._port: PublicPort | None = None
        self._address = ""

    @property
    def public_address(self) -> str:
        """host:port that participants dial."""
        return self._address

    def start(self, listener: socket.socket | None = None) -> None:
        """Open the state, end runs that an earlier process left, and serve the public port.

        Args: listener: of the public port, when the caller listens already.
        """
        _quieten()
        self._config.state_dir.mkdir(parents=True, exist_ok=True)
        database = str(self._config.state_dir / "flower.sqlite")
        _, states = get_objectstore_linkstate_factories(database, get_federation_manager())
        with ALEMBIC:
            self._state = states.state()
        for run in self._state.get_run_info(
            statuses=[Status.PENDING, Status.STARTING, Status.RUNNING]
        ):
            # Its replies cannot be told to anybody any more; the caller issues a new attempt.
            self._state.stop_run(run.run_id)
        tls = PortTls(
            ca=self._config.ca, certificate=self._config.certificate, key=self._config.key
        )
        self._port = PublicPort(_fleet_app(states, self._config.refusal), tls)
        listener = listener or listen(self._config)
        self._port.open(listener)
        self._address = address_of(self._config, listener)

    def stop(self) -> None:
        """Close the public port. Flower's state stays on disk."""
        if self._port is None:
            return
        self._port.close()
        self._port = None
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
        idle_s: Callable[[int], float] = lambda _node: 0.0,
    ) -> None:
        """Send each node its message, until it replies, and hand back replies as they come.

        A message waits here until its node is online. Flower may lose one silently, and has no
        redelivery: what is lost goes out again here, under a new id, so a node may see a message
        twice. Returns when all have replied, stop is set or deadline_s has passed; nodes that
        have not replied by then get no callback, and a reply that comes later is dropped.
        Several deliveries may run at once, in threads.

        Args: assignments: node id -> JSON text of at most MAX_PAYLOAD_BYTES.
            on_reply: called in this thread, once a node; it should return within seconds.
            idle_s: for how long a node is known to have nothing in hand, by another way than
                Flower; a message that is older, and no older than that, is lost.
        Raises: ValueError for a message that is too large or a node that was never registered.
            EngineError when Flower has ended the run; the caller issues a new attempt.
        """
        waiting = {node: _checked_payload(payload) for node, payload in assignments.items()}
        self._check_registered(waiting)
        ends = time.monotonic() + deadline_s
        run = _start_run(self._state)
        post = Post(run, waiting, idle_s, ends)
        try:
            while waiting and not stop.is_set() and time.monotonic() < ends:
                arrived: list[tuple[int, Reply]] = []
                began = time.monotonic()
                with _database_may_be_busy():
                    # In this order: whose answer has come is not taken for one that got nothing.
                    arrived.extend(post.take())
                    post.send(self.online())
                    run.heartbeat()
                for node, reply in arrived:
                    on_reply(node, reply)
                if waiting:  # with hundreds of nodes a look costs; it gets half the time at most
                    stop.wait(max(POLL_S, time.monotonic() - began))
        finally:
            with _database_may_be_busy():  # a run that stays open here ends by itself in 60 s
                run.close(completed=not waiting)

    def _check_registered(self, nodes: Collection[int]) -> None:
        known = {node.node_id for node in self._state.get_node_info(node_ids=list(nodes))}
        if unknown := set(nodes) - known:
            raise ValueError(f"found the node ids {sorted(unknown)}, wanted registered ones")


def _start_run(state: Any) -> Run:
    try:
        return Run(state)
    except SQLAlchemyError as error:
        raise EngineError(f"Flower's database took no run, try again: {error}") from error


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


def _fleet_app(states: Any, refusal: Callable[[Leaf], object]) -> ASGIApp:
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
    checks: dict[str, Callable[[bytes], bool]] = dict.fromkeys(FLEET_ROUTES, _any_body)
    checks["/v1/fleet/push-messages"] = _speaks_for_itself
    return Gate(app, key_header=FLEET_HTTP_PUBLIC_KEY_HEADER, routes=checks, refusal=refusal)


def _any_body(_body: bytes) -> bool:
    return True


def _speaks_for_itself(body: bytes) -> bool:
    """Whether a push names nobody but its sender, which Flower itself does not look at."""
    try:
        request = PushMessagesRequest.FromString(body)
    except DecodeError:
        return False
    senders = {message.metadata.src_node_id for message in request.messages_list}
    return senders == {request.node.node_id}


def _quieten() -> None:
    """Flower's and uvicorn's words go through logging, from WARNING on."""
    logging.getLogger("flwr").removeHandler(console_handler)
    for name in ("flwr", "uvicorn"):
        logging.getLogger(name).setLevel(logging.WARNING)
