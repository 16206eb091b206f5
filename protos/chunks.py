"""Files as chunk streams that name themselves by sha256 and resume at an offset."""

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from protos.v1 import transfer_pb2

CHUNK_BYTES: Final = 4 * 1024 * 1024
MAX_GRPC_BYTES: Final = CHUNK_BYTES + 64 * 1024
"""A chunk and its envelope."""


def read_chunks(path: Path, offset_bytes: int = 0) -> Iterator[bytes]:
    """Yield the bytes of `path` from `offset_bytes` on, at most CHUNK_BYTES at a time."""
    with path.open("rb") as file:
        file.seek(offset_bytes)
        while chunk := file.read(CHUNK_BYTES):
            yield chunk


def sha256_of(path: Path) -> str:
    """Hexadecimal sha256 of a file, read in chunks."""
    digest = hashlib.sha256()
    for chunk in read_chunks(path):
        digest.update(chunk)
    return digest.hexdigest()


def put_requests(
    path: Path, sha256: str, kind: transfer_pb2.ArtifactKind, offset_bytes: int
) -> Iterator[transfer_pb2.PutRequest]:
    """Messages of a Put that goes on at `offset_bytes`."""
    header = transfer_pb2.PutHeader(
        sha256=sha256, size_bytes=path.stat().st_size, offset_bytes=offset_bytes, kind=kind
    )
    yield transfer_pb2.PutRequest(header=header)
    for chunk in read_chunks(path, offset_bytes):
        yield transfer_pb2.PutRequest(chunk=chunk)
