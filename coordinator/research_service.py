"""What researchers and operators ask: gRPC in and out; the store and the scheduler decide."""

import json
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from pydantic import ValidationError

from coordinator.access import caller
from coordinator.artifacts import Artifacts
from coordinator.clock import now_unix_ms
from coordinator.orders import Orders, checked_request_id
from coordinator.presence import Seen as Attendee
from coordinator.promotion import promote, require_promoted
from coordinator.rounds import FINAL, Event, IllegalTransitionError
from coordinator.signing import Signer
from coordinator.store import PivotRow, RoundRow, Store
from coordinator.why import explain, seen_of
from fusion.public_files import READERS, check_public
from protos.errors import CofuseError, abort
from protos.messages import FileRef
from protos.public_sets import PublicSetError
from protos.spec import RoundSpec, SpecError, first_message, parse_spec
from protos.v1 import research_pb2 as pb
from protos.v1 import research_pb2_grpc

_IMPORTED = re.compile(r"pivot-(0|[1-9][0-9]{0,5})")  # room above for those made from it
_WATCH_WAKE_S = 1.0


class ResearchService(research_pb2_grpc.ResearchServicer):
    """Rounds and pivots."""

    def __init__(
        self,
        store: Store,
        artifacts: Artifacts,
        signer: Signer,
        orders: Orders,
        *,
        auto_approve: bool,
        attending: Callable[[], Mapping[str, Attendee | None]],
        stopping: threading.Event | None = None,
    ) -> None:
        self._store = store
        self._artifacts = artifacts
        self._signer = signer
        self._orders = orders
        self._auto_approve = auto_approve
        self._attending = attending
        self._stopping = stopping or threading.Event()

    def SubmitRound(self, request: pb.SubmitRoundRequest, context: Any) -> pb.Round:
        """Check the spec against what is here, then store it."""
        try:
            spec = self.checked(request.spec_json)
            who, request_id = caller(context), checked_request_id(request.request_id)
            self._orders.check(
                request.order_json, who, spec_json=request.spec_json, request_id=request_id
            )
            row = self._store.submit_round(
                request_id=request_id,
                submitted_by=who.name,
                role=who.role,
                spec_json=spec.model_dump_json(),
                deadline_ms=int(spec.deadline_minutes * 60_000),
                order_json=request.order_json,
            )
            if self._auto_approve and row.state == "SUBMITTED":
                row = self._store.advance(row.round_id, Event.APPROVE, "by policy: auto")
            return self._round(row)
        except CofuseError as error:
            abort(context, error)

    def ApproveRound(self, request: pb.RoundRequest, context: Any) -> pb.Round:
        """Let a submitted round run; nobody approves their own, whatever certificate they show."""
        try:
            who, row = caller(context), self._store.round(request.round_id)
            if row.submitted_by == who.name:
                raise CofuseError("own_round", f"{row.round_id} was submitted by {who.name}")
        except CofuseError as error:
            abort(context, error)
        return self._move(request.round_id, Event.APPROVE, context)

    def CancelRound(self, request: pb.RoundRequest, context: Any) -> pb.Round:
        """End a round in whatever state it is; a researcher, only one of their own."""
        try:
            who, row = caller(context), self._store.round(request.round_id)
            if who.role == "researcher" and row.submitted_by != who.name:
                raise CofuseError(
                    "not_allowed", f"{row.round_id} is not yours to cancel: an operator may"
                )
        except CofuseError as error:
            abort(context, error)
        return self._move(request.round_id, Event.CANCEL, context)

    def GetRound(self, request: pb.RoundRequest, context: Any) -> pb.Round:
        """One round with its contributions."""
        try:
            return self._round(self._store.round(request.round_id))
        except CofuseError as error:
            abort(context, error)

    def ListRounds(self, request: pb.ListRoundsRequest, context: Any) -> pb.ListRoundsReply:
        """All rounds, oldest first."""
        return pb.ListRoundsReply(rounds=[self._round(row) for row in self._store.rounds()])

    def WatchRound(self, request: pb.WatchRoundRequest, context: Any) -> Iterator[pb.RoundEvent]:
        """Events as they happen, until the round is final or the caller leaves."""
        seq = request.after_seq
        while context.is_active():
            try:
                if self._stopping.is_set():
                    raise CofuseError("stopping", "the coordinator is stopping")
                final = self._store.round(request.round_id).state in FINAL
            except CofuseError as error:
                abort(context, error)
            news = self._store.events(request.round_id, seq)
            for event in news:
                seq = event.seq
                yield pb.RoundEvent(
                    seq=event.seq,
                    time_unix_ms=event.time_unix_ms,
                    kind=event.kind,
                    body_json=event.body_json,
                )
            if final and not news:
                return
            if not news:
                with self._store.changed:
                    self._store.changed.wait(_WATCH_WAKE_S)

    def ListParticipants(
        self, request: pb.ListParticipantsRequest, context: Any
    ) -> pb.ListParticipantsReply:
        """Everybody who joined."""
        here = self._attending()
        return pb.ListParticipantsReply(
            participants=[
                pb.Participant(
                    name=row.name, joined_unix_ms=row.joined_unix_ms, online=row.name in here
                )
                for row in self._store.participants().values()
            ]
        )

    def Why(self, request: pb.WhyRequest, context: Any) -> pb.WhyReply:
        """Why something is as it is, with the remedy."""
        try:
            alarms = {name: one.alarm for name, one in self._store.anchors().items()}
            seen = seen_of(self._store.participants(), self._attending(), alarms)
            findings = explain(request.name, self._store.facts(seen), now_unix_ms())
        except CofuseError as error:
            abort(context, error)
        return pb.WhyReply(findings=[pb.Finding(says=f.says, do=f.do) for f in findings])

    def ImportPivot(self, request: pb.Pivot, context: Any) -> pb.Pivot:
        """Register uploaded files as a pivot without a parent."""
        try:
            files = tuple(
                FileRef(name=file.name, sha256=file.sha256, size_bytes=file.size_bytes)
                for file in request.files
            )
            if not _IMPORTED.fullmatch(request.name):
                raise CofuseError(
                    "bad_request", f"name: found {request.name[:40]!r}, wanted pivot-N, N < 10^6"
                )
            given = [f.name for f, _ in request.ListFields() if f.name not in ("name", "files")]
            if given:
                raise CofuseError(
                    "bad_request", f"{', '.join(given)}: an imported pivot has none; leave it out"
                )
            if "model.safetensors" not in {file.name for file in files}:
                raise CofuseError("bad_request", "a pivot needs its model.safetensors")
            for file in files:
                size = self._need(file.sha256, "PIVOT").stat().st_size
                if file.size_bytes != size:
                    raise CofuseError(
                        "bad_request", f"{file.name}: found {file.size_bytes} bytes, wanted {size}"
                    )
            row = PivotRow(
                name=request.name,
                parent="",
                round_id="",
                files=files,
                evals_json="{}",
                created_unix_ms=now_unix_ms(),
            )
            row = self._store.add_pivot(
                name=row.name,
                parent="",
                round_id="",
                files=self._signer.sign(row),
                evals_json="{}",
                by=caller(context).uri,
            )
            return _pivot(row)
        except CofuseError as error:
            abort(context, error)
        except ValidationError as error:  # a file name or digest that is none
            abort(context, CofuseError("bad_request", f"files: {first_message(error)}"))

    def RollbackPivot(self, request: pb.RollbackPivotRequest, context: Any) -> pb.Pivot:
        """Publish a pivot's parent once more, as the newest of the lineage."""
        try:
            return _pivot(self._signer.roll_back(request.name, caller(context).uri))
        except CofuseError as error:
            abort(context, error)

    def PromotePivot(self, request: pb.PromotePivotRequest, context: Any) -> pb.Pivot:
        """Take an operator's signed yes to a pivot."""
        try:
            by, row = caller(context), self._store.pivot(request.name)
            promotion = self._orders.promotion(request.promotion_json, by, row.name)
            manifest = self._signer.manifest(row)
            return _pivot(promote(self._store, manifest, promotion, by, request.promotion_json))
        except CofuseError as error:
            abort(context, error)

    def GetPivot(self, request: pb.GetPivotRequest, context: Any) -> pb.Pivot:
        """One pivot's manifest."""
        try:
            return _pivot(self._store.pivot(request.name))
        except CofuseError as error:
            abort(context, error)

    def ListPivots(self, request: pb.ListPivotsRequest, context: Any) -> pb.ListPivotsReply:
        """All pivots, oldest first."""
        return pb.ListPivotsReply(pivots=[_pivot(row) for row in self._store.pivots()])

    def checked(self, spec_json: str) -> RoundSpec:
        """The spec, when everything that it names is here.

        Raises: CofuseError.
        """
        try:
            spec = parse_spec(spec_json)
            require_promoted(self._store.pivot(spec.pivot))
            unknown = sorted(set(spec.participants) - set(self._store.participants()))
            if unknown:
                raise CofuseError("unknown_participant", f"nobody joined as {', '.join(unknown)}")
            for key, (_, kind) in READERS.items():
                if pinned := getattr(spec, key):
                    check_public(spec, key, self._need(pinned.removeprefix("sha256:"), kind))
        except (SpecError, PublicSetError) as error:
            raise CofuseError("bad_spec", str(error).rstrip(".")) from error
        return spec

    def _need(self, sha256: str, kind: str) -> Any:
        kinds = {found for found, _ in self._store.artifact_kinds(sha256).values()}
        if kind not in kinds:
            raise CofuseError("unknown_artifact", f"no file {sha256[:80]} of kind {kind}")
        return self._artifacts.path(sha256)

    def _move(self, round_id: str, event: Event, context: Any) -> pb.Round:
        try:
            by = caller(context).uri
            return self._round(self._store.advance(round_id, event, f"by {by}", by))
        except IllegalTransitionError as error:
            abort(context, CofuseError("wrong_state", str(error)))
        except CofuseError as error:
            abort(context, error)

    def _round(self, row: RoundRow) -> pb.Round:
        return pb.Round(
            round_id=row.round_id,
            state=row.state,
            spec_json=row.spec_json,
            created_unix_ms=row.created_unix_ms,
            deadline_unix_ms=row.deadline_unix_ms,
            detail=row.detail,
            pivot_name=row.pivot_name,
            contributions=[
                pb.Contribution(
                    participant=part.participant,
                    status=part.status,
                    detail=part.detail,
                    size_bytes=part.size_bytes,
                    report_json=part.report_json,
                )
                for part in self._store.contributions(row.round_id)
            ],
        )


def _pivot(row: PivotRow) -> pb.Pivot:
    return pb.Pivot(
        name=row.name,
        parent=row.parent,
        round_id=row.round_id,
        files=[pb.PivotFile(**file.model_dump()) for file in row.files],
        evals_json=json.dumps(json.loads(row.evals_json)),
        created_unix_ms=row.created_unix_ms,
        promotions_needed=row.promotions_needed,
        promoted_by=row.promoted_by,
    )
