"""What is stored of a round, and what must be going on while it is: plain values, no rules."""

from dataclasses import dataclass
from enum import StrEnum


class State(StrEnum):
    """Where a round stands. Durable: written before anything is done about it."""

    SUBMITTED = "SUBMITTED"
    APPROVED = "APPROVED"
    COLLECTING = "COLLECTING"
    FUSING = "FUSING"
    EVALUATING = "EVALUATING"
    PUBLISHED = "PUBLISHED"
    REJECTED = "REJECTED"
    FAILED = "FAILED"
    CANCELLED = "CANCELLED"
    EXPIRED = "EXPIRED"


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One named participant's part."""

    participant: str
    status: str = "assigned"
    """assigned, committed, refused or failed; only the first is ever left."""
    attempt: int = 1
    lease_unix_ms: int = 0
    """Until then this attempt may go on unheard."""
    sha256: str = ""
    size_bytes: int = 0
    committed_unix_ms: int = 0
    detail: str = ""
    report_json: str = ""

    @property
    def awaited(self) -> bool:
        """Whether a word is still to come: its contribution, or the report behind it."""
        return self.status == "assigned" or (self.status == "committed" and not self.report_json)


@dataclass(frozen=True, slots=True, kw_only=True)
class Round:
    """All that decides what a round becomes."""

    round_id: str
    state: State
    participants: tuple[str, ...]
    needed: int
    """Contributions without which nothing is fused."""
    deadline_unix_ms: int
    """The round is final by then, one way or the other."""
    collect_unix_ms: int
    """From then on a quorum is enough; what is left until the deadline is kept for fusing."""
    detail: str = ""
    parts: tuple[Part, ...] = ()
    attempt: int = 0
    """Of the fusion worker."""
    lease_unix_ms: int = 0
    """The worker's; 0 while it waits for its turn."""
    losses: int = 0
    """Workers lost so far."""

    @property
    def answers(self) -> str:
        """Who refused, failed or kept silent, in words."""
        told = [f"{p.participant} {p.status}: {p.detail}" for p in self.parts if p.detail]
        late = [part.participant for part in self.parts if part.status == "assigned"]
        return "; ".join([*told, *([f"no answer from {', '.join(late)}"] if late else [])])

    @property
    def missing(self) -> str:
        """What it still waits for, in words."""
        match self.state:
            case State.SUBMITTED:
                return "nobody approved it in time"
            case State.COLLECTING:
                have = sum(part.status == "committed" for part in self.parts)
                wanted = f"found {have} contributions, wanted {self.needed}"
                return "; ".join(filter(None, [wanted, self.answers]))
            case State.FUSING | State.EVALUATING:
                begun = "it was fusing" if self.lease_unix_ms else "it waited for its turn to fuse"
                return f"{begun}; give the round a longer deadline, or keep more of it for fusing"
        return "the deadline has passed"


@dataclass(frozen=True, slots=True)
class Deliver:
    """Duty: one participant has its assignment, under this attempt and no other."""

    round_id: str
    participant: str
    attempt: int


@dataclass(frozen=True, slots=True)
class Fuse:
    """Duty: a worker fuses what is committed, under this attempt and no other."""

    round_id: str
    attempt: int


Duty = Deliver | Fuse
