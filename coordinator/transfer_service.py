"""Bulk bytes in and out: translate, check the caller, hand to the artifact store."""

from collections.abc import Iterator
from typing import Any

from coordinator.access import GET_KINDS, caller, kind_name
from coordinator.artifacts import Artifacts
from coordinator.metrics import UPLOAD_BYTES, UPLOAD_RESUMES
from coordinator.store import Store
from protos.chunks import read_chunks
from protos.errors import CofuseError, abort
from protos.v1 import transfer_pb2 as pb
from protos.v1 import transfer_pb2_grpc


class TransferService(transfer_pb2_grpc.TransferServicer):
    """Stat, Put, Get. Names come from certificates, never from requests."""

    def __init__(self, artifacts: Artifacts, store: Store, max_bytes: int) -> None:
        self._artifacts = artifacts
        self._store = store
        self._max_bytes = max_bytes

    def Stat(self, request: pb.StatRequest, context: Any) -> pb.StatReply:
        """Where the caller's upload of this file stands."""
        try:
            return self._stat(request.sha256, caller(context).uri)
        except CofuseError as error:
            abort(context, error)

    def Put(self, requests: Iterator[pb.PutRequest], context: Any) -> pb.StatReply:
        """Append to the caller's upload; the reply says whether it is complete."""
        try:
            first = next(requests, None)
            if first is None or first.WhichOneof("part") != "header":
                raise CofuseError("bad_request", "the first message of a Put is its header")
            return self._put(first.header, requests, context)
        except CofuseError as error:
            abort(context, error)

    def Get(self, request: pb.GetRequest, context: Any) -> Iterator[pb.Chunk]:
        """Stream a file the caller's role may read."""
        try:
            who = caller(context)
            path = self._artifacts.path(request.sha256)
            kinds = {kind for kind, _ in self._store.artifact_kinds(request.sha256).values()}
            if not kinds & GET_KINDS[who.role] or not path.exists():
                # The same words for "not there" and "not yours": neither tells about others.
                raise CofuseError("unknown_artifact", f"no file {request.sha256} for you")
            size = path.stat().st_size
            if request.offset_bytes > size:
                raise CofuseError(
                    "wrong_offset", f"found offset {request.offset_bytes}, wanted at most {size}"
                )
        except CofuseError as error:
            abort(context, error)
        for data in read_chunks(path, request.offset_bytes):
            yield pb.Chunk(data=data)

    def _stat(self, sha256: str, sender: str) -> pb.StatReply:
        kinds = self._store.artifact_kinds(sha256)
        if sender in kinds and self._artifacts.has(sha256):
            return pb.StatReply(complete=True, received_bytes=kinds[sender][1])
        return pb.StatReply(received_bytes=self._artifacts.received_bytes(sha256, _safe(sender)))

    def _put(
        self, header: pb.PutHeader, requests: Iterator[pb.PutRequest], context: Any
    ) -> pb.StatReply:
        who = caller(context)
        kind = kind_name(header.kind, who.role)
        if header.size_bytes > self._max_bytes:
            raise CofuseError(
                "too_large", f"found {header.size_bytes} bytes, wanted at most {self._max_bytes}"
            )
        if header.offset_bytes:
            UPLOAD_RESUMES.inc()
        received = self._artifacts.receive(
            header.sha256,
            _safe(who.uri),
            size_bytes=header.size_bytes,
            offset_bytes=header.offset_bytes,
            chunks=_chunks(requests),
        )
        if received < header.size_bytes:
            raise CofuseError(
                "truncated_upload", f"found {received} bytes, wanted {header.size_bytes}"
            )
        self._store.add_artifact(header.sha256, who.uri, kind, header.size_bytes)
        return self._stat(header.sha256, who.uri)


def _safe(identity: str) -> str:
    """An identity as a part of a file name; its alphabet is checked by trust.ca."""
    return identity.removeprefix("cofuse://").replace("/", "_")


def _chunks(requests: Iterator[pb.PutRequest]) -> Iterator[bytes]:
    for request in requests:
        if request.WhichOneof("part") != "chunk":
            raise CofuseError("bad_request", "after the header a Put holds chunks only")
        UPLOAD_BYTES.inc(len(request.chunk))
        yield request.chunk
