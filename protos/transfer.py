"""The dialling side of the Transfer service: files up and down, resumed, bounded by progress."""

import hashlib
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import grpc

from protos.chunk_wire import put_stream
from protos.chunks import Outgoing, RunningHash, hash_prefix, sha256_of
from protos.errors import CofuseError, RemoteError, remote_errors
from protos.files import GrowingFile, replace
from protos.messages import FileRef
from protos.retry import PATIENCE_S, Patience
from protos.streams import IDLE_S, read_ahead
from protos.v1 import transfer_pb2 as pb
from protos.v1 import transfer_pb2_grpc

_UNARY_S: Final = 60.0
"""A small question's answer; Stat may have to read a partial file again."""
WINDOW_BYTES: Final = 4 * 1024 * 1024
"""What may be on its way unanswered; what a cut costs at most."""


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
        self._put_stream = put_stream(channel)
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
                try:
                    with remote_errors():
                        self._put(file, status.received_bytes, patience)
                except RemoteError as error:
                    if error.error_id == "wrong_chunk":
                        file.distrust()
                    raise

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
            request = pb.GetRequest(sha256=file.sha256, offset_bytes=incoming.length_bytes)
            call = self._stub.Get(request)
            try:
                incoming.take(read_ahead(call, idle_s=self._idle_s), patience)
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

    def _put(self, file: Outgoing, offset_bytes: int, patience: Patience) -> None:
        window = _Window(file, offset_bytes)
        call: Any = self._put_stream(window.requests())
        call.add_callback(window.close)  # else a sender that waits for answers waits for ever
        try:
            for reply in read_ahead(call, idle_s=self._idle_s):
                window.answered(reply.received_bytes)
                patience.advanced(reply.received_bytes)
        except grpc.RpcError:
            if window.changed is not None:  # of which the other side can only say: truncated
                raise window.changed from None
            raise
        finally:
            call.cancel()


class _Window:
    """Sends a file no further ahead of the answers than WINDOW_BYTES."""

    def __init__(self, file: Outgoing, offset_bytes: int) -> None:
        self.changed: CofuseError | None = None
        """Why sending ended, when the file was no longer the one that was named."""
        self._file = file
        self._answered_bytes = offset_bytes
        self._closed = False
        self._news = threading.Condition()

    def requests(self) -> Iterator[bytes]:
        """Messages of the Put, each as soon as there is room for it."""
        sent_bytes = self._answered_bytes
        try:
            for request, length in self._file.requests(sent_bytes):
                sent_bytes += length
                if not self._has_room(sent_bytes):
                    return
                yield request
        except CofuseError as error:  # grpc would only say that the iterator raised
            self.changed = error

    def _has_room(self, sent_bytes: int) -> bool:
        """Wait for answers; whether the call still goes on."""
        with self._news:
            while not self._closed and sent_bytes - self._answered_bytes > WINDOW_BYTES:
                self._news.wait()
            return not self._closed

    def answered(self, received_bytes: int) -> None:
        """The other side has so many bytes."""
        with self._news:
            self._answered_bytes = received_bytes
            self._news.notify()

    def close(self) -> None:
        """The call is over."""
        with self._news:
            self._closed = True
            self._news.notify()


class _Incoming:
    """A file on its way in: only bytes that fit their digests count."""

    def __init__(self, path: Path, file: FileRef) -> None:
        self.path = path
        self._file = file
        self._digest: RunningHash = hashlib.sha256()
        self.length_bytes = 0
        if path.exists() and path.stat().st_size <= file.size_bytes:
            self._digest, self.length_bytes = hash_prefix(path), path.stat().st_size

    def take(self, chunks: Iterator[pb.Chunk], patience: Patience) -> None:
        """Append chunks until the file is whole.

        Raises: CofuseError wrong_chunk, wrong_digest, truncated_upload; what `chunks` raises.
        """
        with GrowingFile(self.path) as file:
            resumed = self.length_bytes > 0
            for chunk in chunks:
                data = chunk.data  # each look at it is a copy
                digest = self._digest.copy()
                digest.update(data)
                if digest.digest() != chunk.sha256:
                    if resumed:  # our own partial file may be what is damaged
                        self._restart()
                    raise CofuseError("wrong_chunk", f"{self._file.name}: a chunk was damaged")
                file.write_at(self.length_bytes, data)
                self._digest, resumed = digest, False
                self.length_bytes += len(data)
                patience.advanced(self.length_bytes)
            file.truncate(self.length_bytes)
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
        self._digest = hashlib.sha256()
        self.length_bytes = 0
