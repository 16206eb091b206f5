"""What the SDK returns: plain frozen rows, read from the wire's messages."""

import json
from dataclasses import dataclass
from typing import Any, Final

from protos.messages import FileRef
from protos.recurring import RecurringSpec
from protos.spec import RoundSpec
from protos.v1 import recurring_pb2
from protos.v1 import research_pb2 as pb

FINAL: Final = frozenset({"PUBLISHED", "REJECTED", "FAILED", "CANCELLED", "EXPIRED"})


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
    promotions_needed: int = 0
    """Operators who must say yes before others may use it."""
    promoted_by: tuple[str, ...] = ()

    @property
    def waits_for(self) -> int:
        """How many operators have still to say yes."""
        return max(0, self.promotions_needed - len(self.promoted_by))


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


def round_of(row: pb.Round) -> Round:
    """A round."""
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


def recurring_of(row: recurring_pb2.RecurringRounds) -> Recurring:
    """A recurring spec."""
    return Recurring(
        recurring_id=row.recurring_id,
        state=row.state,
        due_unix_ms=row.due_unix_ms,
        last_round_id=row.last_round_id,
        detail=row.detail,
        spec=RecurringSpec.model_validate_json(row.spec_json),
    )


def pivot_of(row: pb.Pivot) -> Pivot:
    """A pivot."""
    return Pivot(
        name=row.name,
        parent=row.parent,
        round_id=row.round_id,
        files=tuple(
            FileRef(name=f.name, sha256=f.sha256, size_bytes=f.size_bytes) for f in row.files
        ),
        evals=json.loads(row.evals_json or "{}"),
        promotions_needed=row.promotions_needed,
        promoted_by=tuple(row.promoted_by),
    )


def event_of(row: pb.RoundEvent) -> Event:
    """One line of a round's story."""
    return Event(row.seq, row.time_unix_ms, row.kind, json.loads(row.body_json))
