"""Files that are not complete yet: every chunk is checked before it counts, and survives a cut.

Beside the data lies a journal, one record a chunk: how many bytes there are with it, and their
sha256. After a crash or power cut the data is read against it, and what fits is kept.
"""

import hashlib
import os
import struct
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Final, TypeAlias

from protos.chunks import MAX_GRPC_BYTES, RunningHash
from protos.errors import CofuseError
from protos.files import NO_ROOM, GrowingFile, sync

Piece: TypeAlias = tuple[bytes, bytes]
"""Bytes of a chunk, and the running digest (protos/chunks.py) with it."""
_RECORD: Final = struct.Struct(">Q32s")


class Partial:
    """One sender's unfinished file. Of two uploads at a time the newer one goes on."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._journal = path.with_name(path.name + ".journal")
        self._lock = threading.Lock()
        self._writer: object = None
        self._digest: RunningHash | None = None
        self._length_bytes = 0
        self._records = 0

    @property
    def received_bytes(self) -> int:
        """How far it has come; the first time after a start the file is read to find out."""
        with self._lock:
            self._recover()
            return self._length_bytes

    def receive(
        self, pieces: Iterable[Piece], *, offset_bytes: int, size_bytes: int, prefix_sha256: bytes
    ) -> Iterator[int]:
        """Append pieces that fit their digests; yield the bytes received in all after each.

        Raises: CofuseError wrong_offset, wrong_chunk, bad_request, storage_full.
        """
        writer = object()
        with self._lock:
            self._recover()
            self._writer = writer
            self._check_start(offset_bytes, prefix_sha256)
        try:
            with GrowingFile(self.path) as data, GrowingFile(self._journal) as journal:
                try:
                    for piece in pieces:
                        with self._lock:
                            self._append(writer, (data, journal), piece, size_bytes)
                        yield self._length_bytes
                finally:
                    data.sync()
                    journal.sync()
                    sync(self.path.parent)
        except OSError as error:
            self._digest = None  # what the disk holds now is found out by reading it
            raise storage_error(error) from error

    def finish(self, sha256: str, size_bytes: int, place: Callable[[Path, str], None]) -> None:
        """Hand the whole file to `place`; drop it unless it is the one that was named.

        Raises: CofuseError wrong_digest, storage_full.
        """
        with self._lock:
            self._recover()
            assert self._digest is not None
            if (found := self._digest.hexdigest()) != sha256:
                self._drop()
                raise CofuseError("wrong_digest", f"found sha256 {found}, wanted {sha256}")
            try:
                os.truncate(self.path, size_bytes)  # a torn write may reach beyond the end
                place(self.path, sha256)
            except OSError as error:
                raise storage_error(error) from error
            self._drop()

    def drop(self) -> None:
        """Forget all of it."""
        with self._lock:
            self._drop()

    def _drop(self) -> None:
        self._digest, self._length_bytes, self._records = hashlib.sha256(), 0, 0
        for path in (self.path, self._journal):
            path.unlink(missing_ok=True)

    def _check_start(self, offset_bytes: int, prefix_sha256: bytes) -> None:
        assert self._digest is not None
        resumes = offset_bytes > 0 and offset_bytes == self._length_bytes
        if resumes and prefix_sha256 and self._digest.digest() != prefix_sha256:
            self._drop()  # bytes of another file came under this name; go on from nothing
        if offset_bytes != self._length_bytes:
            raise CofuseError(
                "wrong_offset", f"found offset {offset_bytes}, wanted {self._length_bytes}"
            )

    def _append(
        self,
        writer: object,
        files: tuple[GrowingFile, GrowingFile],
        piece: Piece,
        size_bytes: int,
    ) -> None:
        data_bytes, sha256 = piece
        here = self._length_bytes
        if writer is not self._writer or self._digest is None:
            raise CofuseError("wrong_offset", "a newer upload of this file took over")
        if here + len(data_bytes) > size_bytes:
            raise CofuseError("bad_request", f"found more than the {size_bytes} bytes announced")
        digest = self._digest.copy()
        digest.update(data_bytes)
        if digest.digest() != sha256:
            raise CofuseError("wrong_chunk", f"the chunk at byte {here} does not fit its digest")
        end = here + len(data_bytes)
        files[0].write_at(here, data_bytes)
        files[1].write_at(self._records * _RECORD.size, _RECORD.pack(end, sha256))
        self._digest, self._length_bytes, self._records = digest, end, self._records + 1

    def _recover(self) -> None:
        """Read what is on disk against the journal; keep what fits."""
        if self._digest is not None:
            return
        digest: RunningHash = hashlib.sha256()
        length, kept = 0, 0
        if self.path.exists() and self._journal.exists():
            with self.path.open("rb") as data:
                for end, sha256 in self._records_on_disk():
                    if not 0 < end - length <= MAX_GRPC_BYTES:
                        break
                    longer = digest.copy()
                    longer.update(data.read(end - length))
                    if longer.digest() != sha256:
                        break
                    digest, length, kept = longer, end, kept + 1
        self._digest, self._length_bytes, self._records = digest, length, kept

    def _records_on_disk(self) -> Iterator[tuple[int, bytes]]:
        records = self._journal.read_bytes()
        yield from _RECORD.iter_unpack(records[: len(records) // _RECORD.size * _RECORD.size])


def storage_error(error: OSError) -> CofuseError:
    """The catalogue's words for a disk that takes no more; other faults of a disk are raised.

    Raises: `error`, when it is not that.
    """
    if error.errno not in NO_ROOM:
        raise error
    return CofuseError("storage_full", "the coordinator's disk is full")
