"""The researcher's SDK: submit a round, watch it, read the evaluations, take the pivot home.

with Coordinator("host:7443", ca=..., certificate=..., key=...) as coordinator:
round_id = coordinator.submit(load_spec(Path("round.yaml")))
final = coordinator.wait(round_id)
coordinator.download_pivot(final.pivot_name, Path("pivot"))
"""

import json
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any, Final

import grpc

from cofuse.ordering import CALENDAR, LATE, Orderer
from cofuse.pivots import PivotReceiver
from protos.chunks import sha256_of
from protos.errors import remote_errors
from protos.messages import FileRef
from protos.public_sets import read_evals, read_prompts
from protos.recurring import RecurringSpec
from protos.spec import RoundSpec
from protos.tls import TlsFiles, dial
from protos.transfer import Transfer
from protos.v1 import recurring_pb2, recurring_pb2_grpc, research_pb2_grpc, transfer_pb2
from protos.v1 import research_pb2 as pb
from trust.pivot_folder import Trust
from trust.pivot_manifest import SIGNER_FILE, Manifest

PIVOTS_SEEN: Final = "pivots-seen.json"
"""Beside the key: which pivots were accepted, so that an older one is noticed."""
FINAL: Final = frozenset({"PUBLISHED", "REJECTED", "FAILED", "CANCELLED", "EXPIRED"})
_RECONNECT_S: Final = 0.5
_PATIENCE_S: Final = 30.0
"""Somebody waits at the screen: a transfer on which nothing moves is given up earlier."""


@dataclass(frozen=True, slots=True)
class Contribution:
    """One participant's part in a round."""

    participant: str
    status: str
    detail: str
    size_bytes: int
    report: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Round:
    """A round as the coordinator sees it now."""

    round_id: str
    state: str
    detail: str
    pivot_name: str
    spec: RoundSpec
    contributions: tuple[Contribution, ...]

    @property
    def final(self) -> bool:
        """Whether nothing more will happen to it."""
        return self.state in FINAL


@dataclass(frozen=True, slots=True)
class Event:
    """One line of a round's story."""

    seq: int
    time_unix_ms: int
    kind: str
    body: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Pivot:
    """One version of the pivot."""

    name: str
    parent: str
    round_id: str
    files: tuple[FileRef, ...]
    evals: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was found out about a name, and what helps."""

    says: str
    do: str
    """Empty: nothing needs to be done."""


@dataclass(frozen=True, slots=True)
class Recurring:
    """Rounds by the calendar."""

    recurring_id: str
    state: str
    due_unix_ms: int
    last_round_id: str
    detail: str
    """What it waits for, or who stopped it."""
    spec: RecurringSpec


class Coordinator:
    """A connection under one identity. Every call repeats safely."""

    def __init__(self, address: str, *, ca: Path, certificate: Path, key: Path) -> None:
        """Args: ca: beside it lies the key that pivots are signed with, pivot-signer.pem.

        key: signs the orders of rounds; beside it is kept which pivots were accepted.
        """
        self._orderer = Orderer(key, certificate)
        self._channel = dial(address, TlsFiles(ca=ca, certificate=certificate, key=key))
        self._research = research_pb2_grpc.ResearchStub(self._channel)
        self._recurring = recurring_pb2_grpc.RecurringStub(self._channel)
        self._transfer = Transfer(self._channel, patience_s=_PATIENCE_S)
        trust = Trust(signer=ca.with_name(SIGNER_FILE), seen=key.with_name(PIVOTS_SEEN))
        self._pivots = PivotReceiver(lambda name: self.pivot(name).files, self._transfer.get, trust)

    def __enter__(self) -> "Coordinator":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection."""
        self._channel.close()

    def submit(self, spec: RoundSpec, *, folder: Path = Path(), request_id: str = "") -> str:
        """Upload the spec's files, pin them, submit; return the round's id.

        Args: folder: where relative paths of the spec start. request_id: the same id twice is
            the same round; default: a new one.
        Raises: RemoteError, PublicSetError.
        """
        spec_json = self._pinned(spec, folder).model_dump_json()
        nonce = request_id or uuid.uuid4().hex
        lasts = timedelta(minutes=spec.deadline_minutes) + LATE
        request = pb.SubmitRoundRequest(
            spec_json=spec_json,
            request_id=nonce,
            order_json=self._orderer.order(spec_json, nonce, lasts, recurring=False),
        )
        with remote_errors():
            return str(self._research.SubmitRound(request).round_id)

    def start_recurring(
        self, spec: RecurringSpec, *, folder: Path = Path(), request_id: str = ""
    ) -> str:
        """Make rounds by the calendar from now on (operators); return the recurring spec's id.

        Args, Raises: as submit().
        """
        pinned = spec.model_copy(update={"round": self._pinned(spec.round, folder)})
        spec_json, nonce = pinned.model_dump_json(), request_id or uuid.uuid4().hex
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
        return [_recurring(row) for row in reply.recurring]

    def stop_recurring(self, recurring_id: str) -> Recurring:
        """Make no more rounds of it (operators); one that is open goes on."""
        request = recurring_pb2.StopRecurringRequest(recurring_id=recurring_id)
        with remote_errors():
            return _recurring(self._recurring.StopRecurring(request))

    def _pinned(self, spec: RoundSpec, folder: Path) -> RoundSpec:
        """Upload the files that a spec names; return it with their digests instead."""
        pinned = {}
        readers: dict[str, tuple[Callable[[Path], Any], transfer_pb2.ArtifactKind]] = {
            "prompts": (read_prompts, transfer_pb2.PROMPTS),
            "evals": (read_evals, transfer_pb2.EVALS),
        }
        for field, (read, kind) in readers.items():
            value = getattr(spec, field)
            if value is not None and not value.startswith("sha256:"):
                path = folder / value
                read(path)  # its errors name file and line, which the other side cannot
                pinned[field] = f"sha256:{self.upload(path, kind)}"
        return spec.model_copy(update=pinned)

    def approve(self, round_id: str) -> Round:
        """Let a submitted round run (operators)."""
        with remote_errors():
            return _round(self._research.ApproveRound(pb.RoundRequest(round_id=round_id)))

    def cancel(self, round_id: str) -> Round:
        """End a round."""
        with remote_errors():
            return _round(self._research.CancelRound(pb.RoundRequest(round_id=round_id)))

    def round(self, round_id: str) -> Round:
        """Return one round."""
        with remote_errors():
            return _round(self._research.GetRound(pb.RoundRequest(round_id=round_id)))

    def rounds(self) -> list[Round]:
        """Return all rounds, oldest first."""
        with remote_errors():
            reply = self._research.ListRounds(pb.ListRoundsRequest())
        return [_round(row) for row in reply.rounds]

    def why(self, name: str) -> list[Finding]:
        """Say why a round, participant, pivot or recurring spec is as it is; first things first."""
        with remote_errors():
            reply = self._research.Why(pb.WhyRequest(name=name))
        return [Finding(row.says, row.do) for row in reply.findings]

    def watch(self, round_id: str, *, after_seq: int = 0) -> Iterator[Event]:
        """Yield the round's events until it is final, across restarts of the coordinator."""
        seq = after_seq
        while True:
            request = pb.WatchRoundRequest(round_id=round_id, after_seq=seq)
            try:
                with remote_errors():
                    for event in self._research.WatchRound(request):
                        seq = event.seq
                        body = json.loads(event.body_json)
                        yield Event(event.seq, event.time_unix_ms, event.kind, body)
                return
            except grpc.RpcError as error:
                if error.code() is not grpc.StatusCode.UNAVAILABLE:
                    raise
                time.sleep(_RECONNECT_S)

    def wait(self, round_id: str) -> Round:
        """Block until the round is final; return it."""
        for _ in self.watch(round_id):
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
        return [_pivot(row) for row in reply.pivots]

    def pivot(self, name: str) -> Pivot:
        """Return one pivot's manifest and evaluations."""
        with remote_errors():
            return _pivot(self._research.GetPivot(pb.GetPivotRequest(name=name)))

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
            return _pivot(self._research.ImportPivot(pb.Pivot(name=name, files=files)))

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
            return _pivot(self._research.RollbackPivot(pb.RollbackPivotRequest(name=name)))

    def upload(self, path: Path, kind: transfer_pb2.ArtifactKind) -> str:
        """Put a file unless it is there; return its sha256. A broken upload resumes."""
        sha256 = sha256_of(path)
        self._transfer.put(path, sha256, kind)
        return sha256


def _round(row: pb.Round) -> Round:
    return Round(
        round_id=row.round_id,
        state=row.state,
        detail=row.detail,
        pivot_name=row.pivot_name,
        spec=RoundSpec.model_validate_json(row.spec_json),
        contributions=tuple(
            Contribution(
                participant=part.participant,
                status=part.status,
                detail=part.detail,
                size_bytes=part.size_bytes,
                report=json.loads(part.report_json or "{}"),
            )
            for part in row.contributions
        ),
    )


def _recurring(row: recurring_pb2.RecurringRounds) -> Recurring:
    return Recurring(
        recurring_id=row.recurring_id,
        state=row.state,
        due_unix_ms=row.due_unix_ms,
        last_round_id=row.last_round_id,
        detail=row.detail,
        spec=RecurringSpec.model_validate_json(row.spec_json),
    )


def _pivot(row: pb.Pivot) -> Pivot:
    return Pivot(
        name=row.name,
        parent=row.parent,
        round_id=row.round_id,
        files=tuple(
            FileRef(name=f.name, sha256=f.sha256, size_bytes=f.size_bytes) for f in row.files
        ),
        evals=json.loads(row.evals_json or "{}"),
    )
