"""The researcher's SDK: submit a round, watch it, read the evaluations, take the pivot home.

with Coordinator.from_login() as coordinator:
    submitted = coordinator.submit(FusionRound.load("round.yaml"))
    submitted.wait(timeout=3600)
    print(submitted.evals().table())
    submitted.pivot().download("pivot")
"""

import contextlib
import time
import uuid
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Final

import grpc

from cofuse.fusion_round import FusionRound, SubmittedRound, WaitTimedOutError, pinned
from cofuse.ordering import CALENDAR, LATE, Orderer
from cofuse.pivots import PivotReceiver
from cofuse.profile import connection
from cofuse.sdk_rows import (
    Contribution,
    Event,
    Finding,
    Pivot,
    Recurring,
    Round,
    event_of,
    pivot_of,
    recurring_of,
    round_of,
)
from protos.chunks import sha256_of
from protos.errors import remote_errors
from protos.recurring import RecurringSpec
from protos.spec import RoundSpec
from protos.tls import TlsFiles, dial
from protos.transfer import Transfer
from protos.v1 import recurring_pb2, recurring_pb2_grpc, research_pb2_grpc, transfer_pb2
from protos.v1 import research_pb2 as pb
from trust.pivot_folder import Trust
from trust.pivot_manifest import SIGNER_FILE, Manifest
from trust.pivots_seen import PIVOTS_SEEN

__all__ = ["Contribution", "Coordinator", "Event", "Finding", "Pivot", "Recurring", "Round"]
_RECONNECT_S: Final = 0.5
_PAST_S: Final = 2.0
"""What has happened is here by then; what goes on happening is not waited for."""
_PATIENCE_S: Final = 30.0
"""Somebody waits at the screen: a transfer on which nothing moves is given up earlier."""


class Coordinator:
    """A connection under one identity. Every call repeats safely."""

    def __init__(
        self, address: str, *, ca: Path | str, certificate: Path | str, key: Path | str
    ) -> None:
        """Args: ca: beside it lies the key that pivots are signed with, pivot-signer.pem.

        key: signs the orders of rounds; beside it is kept which pivots were accepted.
        """
        ca, certificate, key = Path(ca), Path(certificate), Path(key)
        self._orderer = Orderer(key, certificate)
        self._channel = dial(address, TlsFiles(ca=ca, certificate=certificate, key=key))
        self._research = research_pb2_grpc.ResearchStub(self._channel)
        self._recurring = recurring_pb2_grpc.RecurringStub(self._channel)
        self._transfer = Transfer(self._channel, patience_s=_PATIENCE_S)
        trust = Trust(signer=ca.with_name(SIGNER_FILE), seen=key.with_name(PIVOTS_SEEN))
        self._pivots = PivotReceiver(lambda name: self.pivot(name).files, self._transfer.get, trust)

    @classmethod
    def from_login(cls, at: str = "", identity: Path | str | None = None) -> "Coordinator":
        """Connect as $COFUSE_AT and $COFUSE_IDENTITY say, else as `cofuse login` does.

        Raises: ValueError when nobody has said where the coordinator is.
        """
        address, home = connection(at, identity)
        files = {name: home / f"{name}.pem" for name in ("ca", "certificate", "key")}
        return cls(address, **files)

    def __enter__(self) -> "Coordinator":
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection."""
        self._channel.close()

    def submit(
        self, spec: RoundSpec | FusionRound, *, folder: Path | None = None, request_id: str = ""
    ) -> SubmittedRound:
        """Upload the spec's files, pin them, submit; return the round's id.

        Args: folder: where relative paths of the spec start; default: the FusionRound's own.
            request_id: the same id twice is the same round; default: a new one.
        Raises: RemoteError, PublicSetError.
        """
        if isinstance(spec, FusionRound):
            folder = folder or spec.folder
            spec = spec.spec
        spec_json = pinned(spec, folder or Path(), self.upload).model_dump_json()
        nonce = request_id or uuid.uuid4().hex
        lasts = timedelta(minutes=spec.deadline_minutes) + LATE
        request = pb.SubmitRoundRequest(
            spec_json=spec_json,
            request_id=nonce,
            order_json=self._orderer.order(spec_json, nonce, lasts, recurring=False),
        )
        with remote_errors():
            return SubmittedRound(self._research.SubmitRound(request).round_id, self)

    def start_recurring(
        self, spec: RecurringSpec, *, folder: Path = Path(), request_id: str = ""
    ) -> str:
        """Make rounds by the calendar from now on (operators); return the recurring spec's id.

        Args, Raises: as submit().
        """
        named = spec.model_copy(update={"round": pinned(spec.round, folder, self.upload)})
        spec_json, nonce = named.model_dump_json(), request_id or uuid.uuid4().hex
        request = recurring_pb2.StartRecurringRequest(
            spec_json=spec_json,
            request_id=nonce,
            order_json=self._orderer.order(spec_json, nonce, CALENDAR, recurring=True),
        )
        with remote_errors():
            return str(self._recurring.StartRecurring(request).recurring_id)

    def recurring(self) -> list[Recurring]:
        """Return all recurring specs, oldest first."""
        with remote_errors():
            reply = self._recurring.ListRecurring(recurring_pb2.ListRecurringRequest())
        return [recurring_of(row) for row in reply.recurring]

    def stop_recurring(self, recurring_id: str) -> Recurring:
        """Make no more rounds of it (operators); one that is open goes on."""
        request = recurring_pb2.StopRecurringRequest(recurring_id=recurring_id)
        with remote_errors():
            return recurring_of(self._recurring.StopRecurring(request))

    def approve(self, round_id: str) -> Round:
        """Let a submitted round run (operators)."""
        with remote_errors():
            return round_of(self._research.ApproveRound(pb.RoundRequest(round_id=round_id)))

    def cancel(self, round_id: str) -> Round:
        """End a round."""
        with remote_errors():
            return round_of(self._research.CancelRound(pb.RoundRequest(round_id=round_id)))

    def round(self, round_id: str) -> Round:
        """Return one round."""
        with remote_errors():
            return round_of(self._research.GetRound(pb.RoundRequest(round_id=round_id)))

    def rounds(self) -> list[Round]:
        """Return all rounds, oldest first."""
        with remote_errors():
            reply = self._research.ListRounds(pb.ListRoundsRequest())
        return [round_of(row) for row in reply.rounds]

    def why(self, name: str) -> list[Finding]:
        """Say why a round, participant, pivot or recurring spec is as it is; first things first."""
        with remote_errors():
            reply = self._research.Why(pb.WhyRequest(name=name))
        return [Finding(row.says, row.do) for row in reply.findings]

    def follow(self, round_id: str) -> SubmittedRound:
        """A round that was submitted before, as `submit` returned it."""
        return SubmittedRound(round_id, self)

    def watch(
        self, round_id: str, *, after_seq: int = 0, timeout_s: float | None = None
    ) -> Iterator[Event]:
        """Yield the round's events until it is final, across restarts of the coordinator.

        Args: timeout_s: how long to wait in all; None: until it ends.
        Raises: WaitTimedOutError, RemoteError.
        """
        seq, end = after_seq, None if timeout_s is None else time.monotonic() + timeout_s
        while True:
            request = pb.WatchRoundRequest(round_id=round_id, after_seq=seq)
            left = None if end is None else max(0.0, end - time.monotonic())
            try:
                with remote_errors():
                    for event in self._research.WatchRound(request, timeout=left):
                        seq = event.seq
                        yield event_of(event)
                return
            except grpc.RpcError as error:
                if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
                    words = f"{round_id} has not ended within {timeout_s:g} s; it goes on"
                    raise WaitTimedOutError(words) from error
                if error.code() is not grpc.StatusCode.UNAVAILABLE:
                    raise
                time.sleep(_RECONNECT_S)

    def events(self, round_id: str) -> Iterator[Event]:
        """Yield what has happened to a round up to now."""
        with contextlib.suppress(WaitTimedOutError):
            final = self.round(round_id).final
            yield from self.watch(round_id, timeout_s=None if final else _PAST_S)

    def wait(self, round_id: str, *, timeout_s: float | None = None) -> Round:
        """Block until the round is final; return it. Raises: as watch."""
        for _ in self.watch(round_id, timeout_s=timeout_s):
            pass
        return self.round(round_id)

    def participants(self) -> dict[str, bool]:
        """Return name -> whether it attends."""
        with remote_errors():
            reply = self._research.ListParticipants(pb.ListParticipantsRequest())
        return {row.name: row.online for row in reply.participants}

    def pivots(self) -> list[Pivot]:
        """Return all pivots, oldest first."""
        with remote_errors():
            reply = self._research.ListPivots(pb.ListPivotsRequest())
        return [pivot_of(row) for row in reply.pivots]

    def pivot(self, name: str) -> Pivot:
        """Return one pivot's manifest and evaluations."""
        with remote_errors():
            return pivot_of(self._research.GetPivot(pb.GetPivotRequest(name=name)))

    def import_pivot(self, name: str, folder: Path) -> Pivot:
        """Upload a model directory as a pivot without a parent (operators)."""
        files = [
            pb.PivotFile(
                name=path.name,
                sha256=self.upload(path, transfer_pb2.PIVOT),
                size_bytes=path.stat().st_size,
            )
            for path in sorted(folder.iterdir())
        ]
        with remote_errors():
            return pivot_of(self._research.ImportPivot(pb.Pivot(name=name, files=files)))

    def download_pivot(self, name: str, folder: Path, *, older: bool = False) -> Path:
        """Bring a pivot to `folder` if all of it is what the coordinator signed; return the folder.

        Args: folder: a pivot in it is replaced, and stays when the new one is refused. older: an
            older version of the lineage than one that was accepted is meant.
        Raises: RemoteError (untrusted_pivot: manifest, signer, version, time or a file is wrong).
        """
        return self._pivots.download(name, folder, older=older)

    def manifest(self, name: str) -> Manifest:
        """Return what the coordinator signed of a pivot, checked. Raises: as download_pivot."""
        return self._pivots.manifest(name)

    def lineage(self, name: str) -> list[Manifest]:
        """Return the manifests from the first pivot of a lineage to this one, each checked.

        Raises: as download_pivot, also when a parent is not the one that its child names.
        """
        return self._pivots.lineage(name)

    def roll_back_pivot(self, name: str) -> Pivot:
        """Publish a pivot's parent once more, as the newest (operators); return it."""
        with remote_errors():
            return pivot_of(self._research.RollbackPivot(pb.RollbackPivotRequest(name=name)))

    def promote_pivot(self, name: str, content_sha256: str) -> Pivot:
        """Say yes to a pivot that waits for it (operators); return it.

        Args: content_sha256: of the manifest that was looked at; the yes is to nothing else.
        """
        signed = self._orderer.promotion(name, content_sha256)
        request = pb.PromotePivotRequest(name=name, promotion_json=signed)
        with remote_errors():
            return pivot_of(self._research.PromotePivot(request))

    def upload(self, path: Path, kind: transfer_pb2.ArtifactKind) -> str:
        """Put a file unless it is there; return its sha256. A broken upload resumes."""
        sha256 = sha256_of(path)
        self._transfer.put(path, sha256, kind)
        return sha256
