"""The participant's side of the wire: join, fetch public files, put and commit a contribution."""

import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final, TypeVar

import grpc

from protos.chunks import put_requests, sha256_of
from protos.errors import CofuseError, RemoteError, remote_errors
from protos.messages import FileRef
from protos.tls import TlsFiles, dial
from protos.v1 import fleet_pb2, fleet_pb2_grpc, transfer_pb2, transfer_pb2_grpc

_LOG = logging.getLogger(__name__)
_T = TypeVar("_T")
_LOST: Final = frozenset(
    {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.CANCELLED}
)
_AGAIN: Final = frozenset({"wrong_offset", "truncated_upload", "wrong_digest"})
RETRY_S: Final = 300.0
"""How long a lost coordinator is dialled again before the work is given back."""


class Stopped(Exception):  # noqa: N818 - not an error
    """We were asked to stop; the work goes on at the next start."""


class Client:
    """Every call repeats safely; a broken transfer goes on where it ended."""

    def __init__(self, address: str, tls: TlsFiles, stop: threading.Event | None = None) -> None:
        """Args: stop: once set, a call that would be repeated raises Stopped instead."""
        self._stop = stop or threading.Event()
        self._channel = dial(address, tls)
        self._fleet = fleet_pb2_grpc.FleetStub(self._channel)
        self._transfer = transfer_pb2_grpc.TransferStub(self._channel)

    def join(self, version: str) -> str:
        """Make ourselves known; return the engine's address."""
        request = fleet_pb2.JoinRequest(software_version=version)
        return str(self._retry(lambda: self._fleet.Join(request)).engine_address)

    def fetch(self, reference: FileRef, folder: Path) -> Path:
        """Bring a public file into `folder`, named as the reference says; check its digest."""
        folder.mkdir(parents=True, exist_ok=True)
        final = folder / reference.name
        if final.exists() and sha256_of(final) == reference.sha256:
            return final
        partial = folder / f"{reference.sha256}.part"

        def get() -> None:
            here = partial.stat().st_size if partial.exists() else 0
            request = transfer_pb2.GetRequest(sha256=reference.sha256, offset_bytes=here)
            with partial.open("ab") as file:
                for chunk in self._transfer.Get(request):
                    file.write(chunk.data)

        self._retry(get)
        found = sha256_of(partial)
        if found != reference.sha256:
            partial.unlink()
            raise RemoteError(
                "wrong_digest", f"{reference.name}: found {found}, wanted {reference.sha256}"
            )
        partial.rename(final)
        return final

    def missing_bytes(self, path: Path, sha256: str) -> int:
        """Count the bytes of a file that the coordinator does not have from us yet."""
        request = transfer_pb2.StatRequest(sha256=sha256)
        status = self._retry(lambda: self._transfer.Stat(request))
        return path.stat().st_size - int(status.received_bytes)

    def put(self, path: Path, sha256: str) -> None:
        """Upload a contribution; what the coordinator already has is not sent again."""

        def put_rest() -> None:
            status = self._transfer.Stat(transfer_pb2.StatRequest(sha256=sha256))
            if not status.complete:
                self._transfer.Put(
                    put_requests(path, sha256, transfer_pb2.CONTRIBUTION, status.received_bytes)
                )

        self._retry(put_rest)

    def commit(self, round_id: str, sha256: str, size_bytes: int) -> fleet_pb2.Receipt:
        """Make the uploaded file our contribution; return the coordinator's receipt."""
        request = fleet_pb2.CommitRequest(round_id=round_id, sha256=sha256, size_bytes=size_bytes)
        receipt: fleet_pb2.Receipt = self._retry(lambda: self._fleet.CommitContribution(request))
        return receipt

    def close(self) -> None:
        """Close the channel."""
        self._channel.close()

    def _retry(self, call: Callable[[], _T]) -> _T:
        """Repeat while the other side is away or a transfer broke; refusals are final."""
        deadline = time.monotonic() + RETRY_S
        pause_s = 0.2
        while True:
            try:
                with remote_errors():
                    return call()
            except RemoteError as error:
                if error.error_id not in _AGAIN or time.monotonic() > deadline:
                    raise
                _LOG.warning("transfer goes on: %s", error)
            except grpc.RpcError as error:
                if error.code() not in _LOST:
                    raise
                refusal = CofuseError("unreachable", f"coordinator not reached: {error.details()}")
                if time.monotonic() > deadline:
                    raise RemoteError("unreachable", str(refusal)) from None
                _LOG.warning("%s Trying again.", refusal)
            if self._stop.wait(pause_s):
                raise Stopped
            pause_s = min(5.0, pause_s * 2)
