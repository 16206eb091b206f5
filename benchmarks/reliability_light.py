"""A participant without a model: certificate, beats and engine are real, its logits are dice.

What it does when it is summoned is what the daemon and its SuperNode do, call by call, but in a
thread: a thousand of them fit into one process.
"""

import os

# flwr reads these two switches when it is first imported.
os.environ["FLWR_TELEMETRY_ENABLED"] = "0"
os.environ["FLWR_DISABLE_UPDATE_CHECK"] = "1"

import hashlib
import ssl
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Final, TypeVar

import httpx
import numpy as np
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

from fusion.codec import write_logits
from fusion.contribution import CODEC_VERSION, LogitContribution, LogitHeader
from participant.client import Client
from participant.supernode import KEY, RECORD
from protos.chunks import sha256_of
from protos.messages import Assignment, Report
from protos.public_sets import read_prompts
from protos.tls import TlsFiles

POLL_S: Final = 1.0
RETRY_S: Final = 60.0
PAUSE_S: Final = 0.5
EOS: Final = 256
"""The vocabulary is the 256 bytes and one empty eos."""
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """Name, folder and PEM files of one participant."""

    name: str
    home: Path

    @property
    def tls(self) -> TlsFiles:
        """Its certificate and key, and the authority's."""
        return TlsFiles(
            ca=self.home / "ca.pem",
            certificate=self.home / "certificate.pem",
            key=self.home / "key.pem",
        )


@dataclass(frozen=True, slots=True)
class Taken:
    """A promise that the coordinator gave."""

    round_id: str
    participant: str
    sha256: str


class Visit:
    """One stay at the engine, on Flower's own Fleet client: come online, take, answer, leave."""

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
        self.retries = 0

    def __enter__(self) -> "Visit":
        """Come online, also when a goodbye was lost before."""
        request = ActivateNodeRequest(
            public_key=self._public_key, heartbeat_interval=HEARTBEAT_DEFAULT_INTERVAL
        )
        self._node = Node(node_id=self._call(self._client.ActivateNode, request).node_id)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Say goodbye."""
        try:
            if self._node.node_id:
                request = DeactivateNodeRequest(node_id=self._node.node_id)
                self._call(self._client.DeactivateNode, request)
        finally:
            self._client.close()

    def take(self) -> Message | None:
        """The next message, whole and confirmed; None when there is none yet."""
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
        return message

    def answer(self, message: Message, payload: str) -> None:
        """Push the reply and its objects."""
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


def serve(
    identity: Identity,
    coordinator: str,
    engine: str,
    *,
    working: Callable[[Sequence[str]], None],
    taken: Callable[[Taken], None],
    dismissed: threading.Event,
) -> int:
    """Answer what the engine brings until dismissed.

    Args: working: told which rounds are in hand, for the next beat. taken: told every receipt.
    Returns: how many calls of the engine had to be repeated.
    """
    with Visit(engine, identity.tls) as visit:
        while not dismissed.is_set():
            message = visit.take()
            if message is None:
                dismissed.wait(POLL_S)
                continue
            payload = str(message.content.config_records[RECORD][KEY])
            assignment = Assignment.model_validate_json(payload)
            working([assignment.round_id])
            receipt = contribute(identity, coordinator, assignment)
            taken(receipt)
            report = Report(
                round_id=assignment.round_id,
                attempt=assignment.attempt,
                status="committed",
                sha256=receipt.sha256,
                architecture="llama",
                vocabulary=EOS + 1,
            )
            visit.answer(message, report.model_dump_json())
            working([])
    return visit.retries


def contribute(identity: Identity, coordinator: str, assignment: Assignment) -> Taken:
    """Make a contribution, ship it, and have it counted."""
    assert assignment.prompts is not None
    with _client(coordinator, identity.tls) as client:
        prompts = client.fetch(assignment.prompts, identity.home / assignment.round_id)
        path = prompts.with_name("logits.safetensors")
        if not path.exists():
            made = dice(read_prompts(prompts), assignment, identity.name)
            write_logits(path, made)
        digest = sha256_of(path)
        client.put(path, digest)
        receipt = client.commit(assignment.round_id, digest, path.stat().st_size)
    return Taken(receipt.round_id, receipt.participant, receipt.sha256)


@contextmanager
def _client(coordinator: str, tls: TlsFiles) -> Iterator[Client]:
    client = Client(coordinator, tls)
    try:
        yield client
    finally:
        client.close()


def dice(texts: Sequence[str], assignment: Assignment, name: str) -> LogitContribution:
    """A valid contribution to a round of whole top-K rows: bytes as tokens, chances by dice.

    P = positions, V = vocabulary.
    """
    assert assignment.prompts is not None
    documents = [text.encode() for text in texts]
    ids = np.asarray([one for text in documents for one in (*text, EOS)], np.int32)
    lengths = [len(text) + 1 for text in documents]
    ends = np.concatenate([[*range(1, n), n - 1] for n in lengths]).astype(np.int32)
    seed = hashlib.sha256(name.encode())
    generator = np.random.default_rng(int(seed.hexdigest()[:8], 16))
    raw_PV = generator.normal(size=(len(ids), EOS + 1))
    logprobs_PV = raw_PV - np.log(np.exp(raw_PV).sum(-1, keepdims=True))
    order_PV = np.argsort(-logprobs_PV, axis=-1)
    kept = order_PV[:, : assignment.spec.top_k]
    rest = np.take_along_axis(logprobs_PV, order_PV[:, assignment.spec.top_k :], -1)
    pieces = [1] * EOS + [0]
    return LogitContribution(
        header=LogitHeader(
            codec_version=CODEC_VERSION,
            prompt_set_sha256=assignment.prompts.sha256,
            tokenizer_sha256="0" * 64,
            model_sha256=seed.hexdigest(),
            pivot_sha256="",
            sampler="top_k",
            draws=0,
            vocab_size=EOS + 1,
            top_k=assignment.spec.top_k,
            documents=len(documents),
            positions=len(ids),
            shipped=len(ids),
            eos_id=EOS,
            prefix_bytes=0,
        ),
        doc_offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        token_ids=ids,
        byte_ends=ends,
        own_logprob=logprobs_PV[np.arange(len(ids)), ids].astype(np.float32),
        topk_ids=kept.astype(np.int32),
        topk_logprobs=np.take_along_axis(logprobs_PV, kept, -1).astype(np.float32),
        tail_logprob=np.log(np.exp(rest).sum(-1)).astype(np.float32),
        vocab_bytes=np.arange(EOS, dtype=np.uint8),
        vocab_offsets=np.concatenate([[0], np.cumsum(pieces)]).astype(np.int64),
    )
