"""Files as streams of chunks that name themselves by sha256 and resume at any chunk.

A chunk carries the *running digest*: the sha256 of the file from its first byte to the chunk's
last. The receiver keeps one running hash and compares it after every chunk, so a damaged chunk is
found before it is stored, and the digest after the last chunk is the file's name: no second pass.
"""

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Final, Protocol

from protos.chunk_wire import put_message
from protos.errors import CofuseError
from protos.files import Reading
from protos.v1 import transfer_pb2

CHUNK_BYTES: Final = 1024 * 1024
"""What senders put in a message. As fast as 4 MiB; a cut costs less, and a link of 70 kbit/s
still moves one within the idle limit (protos/streams.py)."""
MAX_GRPC_BYTES: Final = 4 * 1024 * 1024 + 64 * 1024
"""The largest chunk that is taken, and its envelope."""


class RunningHash(Protocol):
    """What hashlib.sha256() returns."""

    def update(self, data: bytes, /) -> None:
        """Take more bytes in."""

    def digest(self) -> bytes:
        """Digest of all bytes so far; 32 bytes."""

    def hexdigest(self) -> str:
        """The same as 64 lower-case hexadecimal digits."""

    def copy(self) -> "RunningHash":
        """A hash that goes on from here by itself."""


def read_chunks(path: Path, offset_bytes: int = 0, *, past_cache: bool = False) -> Iterator[bytes]:
    """Yield the bytes of `path` from `offset_bytes` on; chunks end at multiples of CHUNK_BYTES.

    Args: past_cache: for files that are not expected in the system's page cache, nor wanted there.
    """
    with Reading(path, past_cache=past_cache) as file:
        while chunk := file.read_at(offset_bytes, CHUNK_BYTES - offset_bytes % CHUNK_BYTES):
            yield chunk
            offset_bytes += len(chunk)


def hash_prefix(path: Path, length_bytes: int | None = None) -> RunningHash:
    """Hash the first `length_bytes` of a file; None: all of it."""
    digest: RunningHash = hashlib.sha256()
    left = length_bytes
    for chunk in read_chunks(path):
        digest.update(chunk if left is None else chunk[:left])
        if left is not None and (left := left - len(chunk)) <= 0:
            break
    return digest


def sha256_of(path: Path) -> str:
    """Hexadecimal sha256 of a file, read in chunks. Sending it afterwards hashes nothing again."""
    identity, digest, digests = _identity(path), hashlib.sha256(), []
    for chunk in read_chunks(path):
        digest.update(chunk)
        digests.append(digest.digest())
    with _LOCK:
        _NAMED[identity] = digests
        while len(_NAMED) > _REMEMBERED:
            _NAMED.popitem(last=False)
    return digest.hexdigest()


_REMEMBERED: Final = 16
_NAMED: Final[OrderedDict[tuple[int, ...], list[bytes]]] = OrderedDict()
"""Running digests of the files last named; 32 bytes a MiB."""
_LOCK: Final = threading.Lock()


def _identity(path: Path) -> tuple[int, ...]:
    """What differs when a file was changed, but for a change within a tick of the clock."""
    stat = path.stat()
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns


class Outgoing:
    """A file on its way out: however often it resumes, each byte is hashed once."""

    def __init__(self, path: Path, sha256: str, kind: transfer_pb2.ArtifactKind) -> None:
        self.size_bytes = path.stat().st_size
        self._path = path
        self._sha256 = sha256
        self._kind = kind
        self._states: dict[int, RunningHash] = {0: hashlib.sha256()}
        with _LOCK:
            self._named = _NAMED.get(_identity(path))

    def distrust(self) -> None:
        """Hash what is read from now on: the receiver says that bytes and digests differ."""
        self._named = None

    def requests(self, offset_bytes: int) -> Iterator[tuple[bytes, int]]:
        """Messages of a Put that goes on at `offset_bytes`, and how many of its bytes each brings.

        Raises: CofuseError wrong_digest when the file is no longer the one that was named.
        """
        prefix, digests = self._digests_from(offset_bytes)
        header = transfer_pb2.PutHeader(
            sha256=self._sha256,
            size_bytes=self.size_bytes,
            offset_bytes=offset_bytes,
            kind=self._kind,
            prefix_sha256=prefix,
        )
        yield transfer_pb2.PutRequest(header=header).SerializeToString(), 0
        sent_bytes = offset_bytes
        for data, sha256 in digests:
            sent_bytes += len(data)
            if sent_bytes >= self.size_bytes and sha256.hex() != self._sha256:
                raise CofuseError(
                    "wrong_digest",
                    f"{self._path}: found sha256 {sha256.hex()}, wanted {self._sha256}: "
                    "the file changed after it was named",
                )
            yield put_message(data, sha256), len(data)

    def _digests_from(self, offset_bytes: int) -> tuple[bytes, Iterator[tuple[bytes, bytes]]]:
        """Digest of the first bytes, and the chunks that follow with their running digests."""
        done, rest = divmod(offset_bytes, CHUNK_BYTES)
        if self._named is not None and rest == 0 and done <= len(self._named):
            prefix = self._named[done - 1] if done else hashlib.sha256().digest()
            return prefix, zip(
                read_chunks(self._path, offset_bytes), self._named[done:], strict=False
            )
        digest = self._state(offset_bytes)
        return digest.digest(), self._hashed(offset_bytes, digest)

    def _hashed(self, at: int, digest: RunningHash) -> Iterator[tuple[bytes, bytes]]:
        for data in read_chunks(self._path, at):
            digest.update(data)
            at += len(data)
            self._states[at] = digest.copy()
            yield data, digest.digest()

    def _state(self, offset_bytes: int) -> RunningHash:
        known = self._states.get(offset_bytes) or hash_prefix(self._path, offset_bytes)
        # What the receiver has is not asked for again, unless its disk lost it.
        self._states = {0: hashlib.sha256(), offset_bytes: known.copy()}
        return known.copy()
