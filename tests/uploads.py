"""A file as the messages of one Put, for tests that speak to the service themselves."""

from collections.abc import Iterator
from pathlib import Path

from protos.chunks import Outgoing
from protos.v1 import transfer_pb2


def put_requests(
    path: Path, sha256: str, kind: transfer_pb2.ArtifactKind, offset_bytes: int
) -> Iterator[transfer_pb2.PutRequest]:
    """Messages of one Put that goes on at `offset_bytes`. Raises: as Outgoing.requests."""
    requests = Outgoing(path, sha256, kind).requests(offset_bytes)
    return (transfer_pb2.PutRequest.FromString(raw) for raw, _ in requests)
