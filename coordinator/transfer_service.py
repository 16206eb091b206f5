"""Bulk bytes in and out: translate, check the caller, hand to the artifact store."""

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any, Final

from coordinator.access import GET_KINDS, caller, kind_name
from coordinator.artifacts import Artifacts
from coordinator.incoming import Piece
from coordinator.metrics import UPLOAD_BYTES, UPLOAD_RESUMES
from coordinator.promotion import require_released
from coordinator.store import Store
from protos.chunk_wire import chunk_message
from protos.chunks import CHUNK_BYTES, read_chunks
from protos.errors import CofuseError, abort
from protos.streams import IDLE_S, read_ahead
from protos.v1 import transfer_pb2 as pb
from protos.v1 import transfer_pb2_grpc

_ANSWER_BYTES: Final = 2 * CHUNK_BYTES
_ANSWER_S: Final = 1.0
"""An upload is answered after so much or so long: each answer costs about as much as a chunk."""


class TransferService(transfer_pb2_grpc.TransferServicer):
    """Stat, Put, Get. Names come from certificates, never from requests."""

    def __init__(
        self, artifacts: Artifacts, store: Store, max_bytes: int, *, idle_s: float = IDLE_S
    ) -> None:
        """Args: idle_s: a stream on which nothing moves for so long is ended."""
        self._artifacts = artifacts
        self._store = store
        self._max_bytes = max_bytes
        self._idle_s = idle_s

    def Stat(self, request: pb.StatRequest, context: Any) -> pb.StatReply:
        """Where the caller's upload of this file stands."""
        try:
            return self._stat(request.sha256, caller(context).uri)
        except CofuseError as error:
            abort(context, error)

    def Put(self, requests: Iterator[pb.PutRequest], context: Any) -> Iterator[pb.StatReply]:
        """Append to the caller's upload; each answer says how far it is."""
        # A thread receives the next chunks while this one checks and writes.
        moving = read_ahead(requests, idle_s=self._idle_s)
        try:
            first = next(moving, None)
            if first is None or first.WhichOneof("part") != "header":
                raise CofuseError("bad_request", "the first message of a Put is its header")
            yield from self._put(first.header, moving, context)
        except CofuseError as error:
            abort(context, error)

    def Get(self, request: pb.GetRequest, context: Any) -> Iterator[bytes]:
        """Stream a file the caller's role may read, as the bytes of its Chunks."""
        try:
            chunks = self._get(request, context)
        except CofuseError as error:
            abort(context, error)
        yield from chunks

    def _get(self, request: pb.GetRequest, context: Any) -> Iterator[bytes]:
        who = caller(context)
        kinds = {kind for kind, _ in self._store.artifact_kinds(request.sha256).values()}
        if not kinds & GET_KINDS[who.role] or not self._artifacts.has(request.sha256):
            # The same words for "not there" and "not yours": neither tells about others.
            raise CofuseError("unknown_artifact", f"no file {request.sha256[:80]} for you")
        if "PIVOT" in kinds and who.role != "operator":
            require_released(self._store.database, request.sha256)
        digests = self._artifacts.running_digests(request.sha256)
        path, start = self._artifacts.path(request.sha256), request.offset_bytes
        if start > path.stat().st_size:
            raise CofuseError(
                "bad_request", f"found offset {start}, wanted at most {path.stat().st_size}"
            )
        return (
            chunk_message(data, digests[number])
            for number, data in enumerate(
                read_chunks(path, start, past_cache=True), start // CHUNK_BYTES
            )
        )

    def _stat(self, sha256: str, sender: str) -> pb.StatReply:
        kinds = self._store.artifact_kinds(sha256)
        if sender in kinds and self._artifacts.has(sha256):
            return pb.StatReply(complete=True, received_bytes=kinds[sender][1])
        return pb.StatReply(received_bytes=self._artifacts.received_bytes(sha256, _safe(sender)))

    def _put(
        self, header: pb.PutHeader, requests: Iterator[pb.PutRequest], context: Any
    ) -> Iterator[pb.StatReply]:
        who = caller(context)
        kind = kind_name(header.kind, who.role)
        if header.size_bytes > self._max_bytes:
            raise CofuseError(
                "too_large", f"found {header.size_bytes} bytes, wanted at most {self._max_bytes}"
            )
        if len(header.prefix_sha256) not in (0, 32):
            raise CofuseError(
                "bad_request", f"prefix_sha256: found {len(header.prefix_sha256)} bytes, wanted 32"
            )
        if header.offset_bytes:
            UPLOAD_RESUMES.inc()
        if not self._stat(header.sha256, who.uri).complete:
            received = self._artifacts.receive(
                header.sha256,
                _safe(who.uri),
                size_bytes=header.size_bytes,
                offset_bytes=header.offset_bytes,
                pieces=_pieces(requests),
                prefix_sha256=header.prefix_sha256,
            )
            answered_bytes, answered_s = header.offset_bytes, time.monotonic()
            for received_bytes in received:
                if (
                    received_bytes - answered_bytes >= _ANSWER_BYTES
                    or time.monotonic() - answered_s >= _ANSWER_S
                ):
                    yield pb.StatReply(received_bytes=received_bytes)
                    answered_bytes, answered_s = received_bytes, time.monotonic()
            yield from self._complete(header, who.uri)
            self._store.add_artifact(header.sha256, who.uri, kind, header.size_bytes)
        yield self._stat(header.sha256, who.uri)

    def _complete(self, header: pb.PutHeader, sender: str) -> Iterator[pb.StatReply]:
        """Make it durable; a slow disk or object store may take its time, but not in silence."""
        with ThreadPoolExecutor(1, thread_name_prefix="complete") as worker:
            done = worker.submit(
                self._artifacts.complete, header.sha256, _safe(sender), header.size_bytes
            )
            while not wait([done], timeout=self._idle_s / 4).done:
                yield pb.StatReply(received_bytes=header.size_bytes)
            done.result()


def _safe(identity: str) -> str:
    """An identity as a part of a file name; its alphabet is checked by trust.ca."""
    return identity.removeprefix("cofuse://").replace("/", "_")


def _pieces(requests: Iterator[pb.PutRequest]) -> Iterator[Piece]:
    for request in requests:
        if request.WhichOneof("part") != "chunk":
            raise CofuseError("bad_request", "after the header a Put holds chunks only")
        data = request.chunk.data  # each look at it is a copy
        UPLOAD_BYTES.inc(len(data))
        yield data, request.chunk.sha256
