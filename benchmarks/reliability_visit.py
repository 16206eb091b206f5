"""One stay at the engine as a SuperNode makes it, without a process of its own for each.

On Flower's own Fleet client, call by call: come online, take a message, answer it, leave.
"""

import os

# flwr reads these two switches when it is first imported.
os.environ["FLWR_TELEMETRY_ENABLED"] = "0"
os.environ["FLWR_DISABLE_UPDATE_CHECK"] = "1"

import ssl
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Final, TypeVar

import httpx
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.app.message import remove_content_from_message
from flwr.common.constant import HEARTBEAT_DEFAULT_INTERVAL
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto.fleet_pb2 import (
    ActivateNodeRequest,
    DeactivateNodeRequest,
    PullMessagesRequest,
    PushMessagesRequest,
)
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest
from flwr.proto.message_pb2 import (
    ConfirmMessageReceivedRequest,
    PullObjectRequest,
    PushObjectRequest,
)
from flwr.proto.node_pb2 import Node
from flwr.proto.run_pb2 import GetRunRequest
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_tree,
    iterate_object_tree,
)
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from flwr.supercore.interceptors.http.runtime_version import RuntimeVersionHttpInterceptor
from flwr.supercore.primitives.asymmetric import public_key_to_bytes
from flwr.supernode.fleet_http_client import FleetHttpClient
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor

from participant.supernode import KEY, RECORD
from protos.tls import TlsFiles

BEAT_S: Final = 20.0
RETRY_S: Final = 60.0
PAUSE_S: Final = 0.5
_T = TypeVar("_T")


class Visit:
    """One stay, from coming online until the goodbye."""

    def __init__(self, address: str, tls: TlsFiles) -> None:
        context = ssl.create_default_context(cafile=str(tls.ca))
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.load_cert_chain(tls.certificate, tls.key)
        key = load_pem_private_key(tls.key.read_bytes(), None)
        assert isinstance(key, ec.EllipticCurvePrivateKey)
        self._public_key = public_key_to_bytes(key.public_key())
        self._client = FleetHttpClient(
            f"https://{address}",
            interceptors=[
                RuntimeVersionHttpInterceptor(component_name="SuperNode"),
                NodeAuthHttpInterceptor(key, key.public_key()),
            ],
            verify=context,
        )
        self._node = Node()
        self._beat_due = 0.0
        self.retries = 0

    def __enter__(self) -> "Visit":
        """Come online, also when a goodbye was lost before."""
        request = ActivateNodeRequest(
            public_key=self._public_key, heartbeat_interval=HEARTBEAT_DEFAULT_INTERVAL
        )
        self._node = Node(node_id=self._call(self._client.ActivateNode, request).node_id)
        self._beat_due = time.monotonic() + BEAT_S
        return self

    def __exit__(self, *_error: object) -> None:
        """Say goodbye; Flower may have taken us for dead before."""
        with suppress(httpx.HTTPError):
            self._call(
                self._client.DeactivateNode, DeactivateNodeRequest(node_id=self._node.node_id)
            )
        self._client.close()

    def take(self) -> tuple[Message, str] | None:
        """The next message, whole and confirmed, with its text; None when there is none yet."""
        self._beat()
        pulled = self._call(self._client.PullMessages, PullMessagesRequest(node=self._node))
        if not pulled.messages_list:
            return None
        head, tree = message_from_proto(pulled.messages_list[0]), pulled.message_object_trees[0]
        run_id, message_id = head.metadata.run_id, head.metadata.message_id
        self._call(self._client.GetRun, GetRunRequest(node=self._node, run_id=run_id))
        contents = {}
        for one in (node.object_id for node in iterate_object_tree(tree)):
            wanted = PullObjectRequest(node=self._node, run_id=run_id, object_id=one)
            contents[one] = self._call(self._client.PullObject, wanted).object_content
        received = ConfirmMessageReceivedRequest(
            node=self._node, run_id=run_id, message_object_id=message_id
        )
        self._call(self._client.ConfirmMessageReceived, received)
        message = inflate_object_from_contents(message_id, contents)
        assert isinstance(message, Message)
        message.metadata.__dict__["_message_id"] = message_id
        return message, str(message.content.config_records[RECORD][KEY])

    def answer(self, message: Message, payload: str) -> None:
        """Push the reply and its objects."""
        self._beat()
        reply = Message(RecordDict({RECORD: ConfigRecord({KEY: payload})}), reply_to=message)
        reply.metadata.__dict__["_message_id"] = reply.object_id
        objects, run_id = get_all_nested_objects(reply), message.metadata.run_id
        pushed = self._call(
            self._client.PushMessages,
            PushMessagesRequest(
                node=self._node,
                messages_list=[message_to_proto(remove_content_from_message(reply))],
                message_object_trees=[get_object_tree(reply)],
                clientapp_runtime_list=[0.0],
            ),
        )
        for one in pushed.objects_to_push:
            part = PushObjectRequest(
                node=self._node,
                run_id=run_id,
                object_id=one,
                object_content=objects[one].deflate(),
                session_id=pushed.session_id,
            )
            self._call(self._client.PushObject, part)

    def _beat(self) -> None:
        """Tell Flower, every BEAT_S, that this node is alive."""
        if time.monotonic() >= self._beat_due:
            alive = SendNodeHeartbeatRequest(
                node=self._node, heartbeat_interval=HEARTBEAT_DEFAULT_INTERVAL
            )
            self._call(self._client.SendNodeHeartbeat, alive)
            self._beat_due = time.monotonic() + BEAT_S

    def _call(self, call: Callable[[Any], _T], request: Any) -> _T:
        """Repeat while the engine is away or too busy; its refusals are final."""
        ends = time.monotonic() + RETRY_S
        while True:
            try:
                return call(request)
            except (httpx.HTTPStatusError, httpx.TransportError) as error:
                status = error.response.status_code if hasattr(error, "response") else 503
                if (status < 500 and status != 429) or time.monotonic() > ends:
                    raise
            self.retries += 1
            time.sleep(PAUSE_S)
