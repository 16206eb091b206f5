"""What can happen to a round: the table's events, and the facts that `rounds.step` takes."""

from dataclasses import dataclass
from enum import StrEnum


class Event(StrEnum):
    """What moves a round along its table."""

    APPROVE = "approve"
    REJECT = "reject"
    ISSUE = "issue"
    """The assignments go out."""
    COLLECTED = "collected"
    """Every answer is in; or there is a quorum and the rest of the time is kept for fusing."""
    QUORUM_MISSED = "quorum_missed"
    """So many have refused or failed that no quorum can come any more."""
    DEADLINE_PASSED = "deadline_passed"
    FUSED = "fused"
    EVALUATED = "evaluated"
    FAIL = "fail"
    CANCEL = "cancel"


@dataclass(frozen=True, slots=True)
class Tick:
    """Time has passed: draw the conclusions."""


@dataclass(frozen=True, slots=True)
class Restarted:
    """The coordinator has started anew: whatever its former process had going on is gone."""


@dataclass(frozen=True, slots=True)
class Decided:
    """Somebody decided: an operator, a researcher, or the program that found a fault."""

    event: Event
    detail: str = ""


@dataclass(frozen=True, slots=True)
class Committed:
    """A participant's whole, checked and durable file."""

    participant: str
    sha256: str
    size_bytes: int


@dataclass(frozen=True, slots=True)
class Reported:
    """A participant's own word on its assignment."""

    participant: str
    attempt: int | None
    """None: of whichever attempt is open."""
    status: str
    """committed, refused or failed."""
    detail: str
    body: str
    """The whole report, JSON."""


@dataclass(frozen=True, slots=True)
class Heard:
    """A participant works on its assignment."""

    participant: str
    attempt: int


@dataclass(frozen=True, slots=True)
class Lost:
    """An assignment did not arrive, or its answer cannot come any more."""

    participant: str
    attempt: int
    detail: str


@dataclass(frozen=True, slots=True)
class Worked:
    """The fusion worker has begun, computed or spoken."""

    attempt: int


@dataclass(frozen=True, slots=True)
class Fused:
    """The fusion worker has fused, and evaluates."""

    attempt: int


@dataclass(frozen=True, slots=True)
class Evaluated:
    """The result is whole, and its files are durable."""

    attempt: int


@dataclass(frozen=True, slots=True)
class Broke:
    """The fusion worker ended without a result."""

    attempt: int
    detail: str
    lost: bool
    """It was killed or found no room: another may do better. Else it failed for good."""


Happening = (
    Tick
    | Restarted
    | Decided
    | Committed
    | Reported
    | Heard
    | Lost
    | Worked
    | Fused
    | Evaluated
    | Broke
)
