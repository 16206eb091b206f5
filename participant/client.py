"""The participant's side of the wire: join, fetch public files, put and commit a contribution."""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from protos.messages import FileRef
from protos.retry import PATIENCE_S, Patience, Stopped
from protos.tls import TlsFiles, dial
from protos.transfer import Transfer
from protos.v1 import fleet_pb2, fleet_pb2_grpc, transfer_pb2

__all__ = ["Client", "Stopped"]
_T = TypeVar("_T")


class Client:
    """Every call repeats safely; a broken transfer goes on where it ended."""

    def __init__(
        self,
        address: str,
        tls: TlsFiles,
        stop: threading.Event | None = None,
        *,
        patience_s: float = PATIENCE_S,
    ) -> None:
        """Args: stop: once set, a call that would be repeated raises Stopped instead.

        patience_s: how long nothing may get through before a call raises RemoteError.
        """
        self._stop = stop or threading.Event()
        self._patience_s = patience_s
        self._channel = dial(address, tls)
        self._fleet = fleet_pb2_grpc.FleetStub(self._channel)
        self._transfer = Transfer(self._channel, stop=self._stop, patience_s=patience_s)

    def join(self, version: str) -> str:
        """Make ourselves known; return the engine's address."""
        request = fleet_pb2.JoinRequest(software_version=version)
        return str(self._repeat(lambda: self._fleet.Join(request)).engine_address)

    def fetch(self, reference: FileRef, folder: Path) -> Path:
        """Bring a public file into `folder`, named as the reference says; check its digest."""
        return self._transfer.get(reference, folder)

    def missing_bytes(self, path: Path, sha256: str) -> int:
        """Count the bytes of a file that the coordinator does not have from us yet."""
        return self._transfer.missing_bytes(path, sha256)

    def put(self, path: Path, sha256: str) -> None:
        """Upload a contribution; what the coordinator already has is not sent again."""
        self._transfer.put(path, sha256, transfer_pb2.CONTRIBUTION)

    def commit(self, round_id: str, sha256: str, size_bytes: int) -> fleet_pb2.Receipt:
        """Make the uploaded file our contribution; return the coordinator's receipt."""
        request = fleet_pb2.CommitRequest(round_id=round_id, sha256=sha256, size_bytes=size_bytes)
        receipt: fleet_pb2.Receipt = self._repeat(lambda: self._fleet.CommitContribution(request))
        return receipt

    def close(self) -> None:
        """Close the channel."""
        self._channel.close()

    def _repeat(self, call: Callable[[], _T]) -> _T:
        return Patience(self._stop, patience_s=self._patience_s).repeat(call)
