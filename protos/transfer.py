"""The dialling side of the Transfer service: files up and down, resumed, bounded by progress."""

import hashlib
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import grpc

from protos.chunks import Outgoing, RunningHash, hash_prefix, sha256_of
from protos.errors import CofuseError
from protos.files import replace, write_at
from protos.messages import FileRef
from protos.retry import PATIENCE_S, Patience
from protos.streams import IDLE_S, Progress, read_ahead, stalled
from protos.v1 import transfer_pb2 as pb
from protos.v1 import transfer_pb2_grpc

_UNARY_S: Final = 60.0
"""A small question's answer; Stat may have to read a partial file again."""
_DURABLE_BYTES_PER_S: Final = 10e6
"""The slowest store at which the other side may make a whole file durable before it answers."""


class Transfer:
    """Stat, Put and Get of one channel. Every call repeats safely and goes on where it ended."""

    def __init__(
        self,
        channel: grpc.Channel,
        *,
        stop: threading.Event | None = None,
        patience_s: float = PATIENCE_S,
        idle_s: float = IDLE_S,
    ) -> None:
        self._stub = transfer_pb2_grpc.TransferStub(channel)
        self._stop = stop
        self._patience_s = patience_s
        self._idle_s = idle_s

    def missing_bytes(self, path: Path, sha256: str) -> int:
        """Count the bytes of a file that the other side does not have from us yet."""
        received = self._patience().repeat(lambda: self._stat(sha256)).received_bytes
        return path.stat().st_size - int(received)

    def put(self, path: Path, sha256: str, kind: pb.ArtifactKind) -> None:
        """Upload a file; what the other side already has is not sent again.

        Raises: RemoteError (wrong_digest when the file is no longer `sha256`); Stopped.
        """
        file = Outgoing(path, sha256, kind)
        patience = self._patience()

        def put_rest() -> None:
            status = self._stat(sha256)
            if not status.complete:
                patience.advanced(status.received_bytes)
                self._put(file, status.received_bytes)

        patience.repeat(put_rest)

    def get(self, file: FileRef, folder: Path) -> Path:
        """Bring a file into `folder` under its name, unless it is there; return its path.

        Raises: RemoteError; Stopped.
        """
        folder.mkdir(parents=True, exist_ok=True)
        final = folder / file.name
        if final.exists() and sha256_of(final) == file.sha256:
            return final
        incoming = _Incoming(folder / f"{file.sha256}.part", file)
        patience = self._patience()

        def get_rest() -> None:
            patience.advanced(incoming.length_bytes)
            request = pb.GetRequest(sha256=file.sha256, offset_bytes=incoming.length_bytes)
            call = self._stub.Get(request)
            try:
                incoming.take(read_ahead(call, idle_s=self._idle_s))
            finally:
                call.cancel()

        patience.repeat(get_rest)
        replace(incoming.path, final)
        return final

    def _patience(self) -> Patience:
        return Patience(self._stop, patience_s=self._patience_s)

    def _stat(self, sha256: str) -> pb.StatReply:
        reply: pb.StatReply = self._stub.Stat(pb.StatRequest(sha256=sha256), timeout=_UNARY_S)
        return reply

    def _put(self, file: Outgoing, offset_bytes: int) -> None:
        progress = Progress(self._idle_s)
        changed: list[CofuseError] = []

        def requests() -> Iterator[pb.PutRequest]:
            try:
                for request in file.requests(offset_bytes):
                    yield request
                    progress.moved()
            except CofuseError as error:  # grpc would only say that the iterator raised
                changed.append(error)
                return
            # All is on its way; now the other side's disk or object store may take its time.
            progress.idle_s += file.size_bytes / _DURABLE_BYTES_PER_S

        call: Any = self._stub.Put.future(requests())
        while not call.done():
            try:
                call.result(timeout=max(0.0, progress.left_s()))
            except grpc.FutureTimeoutError:
                if progress.left_s() <= 0:
                    call.cancel()
                    raise stalled(self._idle_s) from None
            except (grpc.RpcError, grpc.FutureCancelledError):
                break
        if changed:
            raise changed[0]
        call.result()


class _Incoming:
    """A file on its way in: only bytes that fit their digests count."""

    def __init__(self, path: Path, file: FileRef) -> None:
        self.path = path
        self._file = file
        self._restart()
        if path.exists() and path.stat().st_size <= file.size_bytes:
            self._digest, self.length_bytes = hash_prefix(path), path.stat().st_size

    def take(self, chunks: Iterator[pb.Chunk]) -> None:
        """Append chunks until the file is whole.

        Raises: CofuseError wrong_chunk, wrong_digest, truncated_upload; what `chunks` raises.
        """
        handle = os.open(self.path, os.O_CREAT | os.O_WRONLY, 0o600)
        try:
            resumed = self.length_bytes > 0
            for chunk in chunks:
                digest = self._digest.copy()
                digest.update(chunk.data)
                if digest.digest() != chunk.sha256:
                    if resumed:  # our own partial file may be what is damaged
                        self._restart()
                    raise CofuseError("wrong_chunk", f"{self._file.name}: a chunk was damaged")
                write_at(handle, self.length_bytes, chunk.data)
                self._digest, resumed = digest, False
                self.length_bytes += len(chunk.data)
            os.ftruncate(handle, self.length_bytes)
        finally:
            os.close(handle)
        self._check()

    def _check(self) -> None:
        here, wanted = self.length_bytes, self._file.size_bytes
        if here < wanted:
            raise CofuseError(
                "truncated_upload", f"{self._file.name}: found {here} bytes, wanted {wanted}"
            )
        if (found := self._digest.hexdigest()) != self._file.sha256:
            self._restart()
            raise CofuseError(
                "wrong_digest", f"{self._file.name}: found {found}, wanted {self._file.sha256}"
            )

    def _restart(self) -> None:
        self._digest: RunningHash = hashlib.sha256()
        self.length_bytes = 0
