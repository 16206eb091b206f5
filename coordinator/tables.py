"""What the coordinator remembers: the tables, and one frozen dataclass for a row of each.

A change here needs a revision in coordinator/migrations/versions; a test fails until both agree.
"""

from dataclasses import dataclass

from sqlalchemy import BigInteger, Column, Integer, LargeBinary, MetaData, String, Table, Text

from coordinator.rounds import State
from protos.messages import FileRef

META = MetaData()
PARTICIPANTS = Table(
    "participants",
    META,
    Column("name", String(40), primary_key=True),
    Column("node_id", String(24), nullable=False),  # 64 unsigned bits: more than SQL's integers
    Column("public_key", LargeBinary, nullable=False),
    Column("joined_unix_ms", BigInteger, nullable=False),
)
ROUNDS = Table(
    "rounds",
    META,
    Column("number", Integer, primary_key=True, autoincrement=True),
    Column("request_id", String(120), unique=True, nullable=False),
    Column("submitted_by", String(40), nullable=False),
    Column("spec_json", Text, nullable=False),
    Column("state", String(20), nullable=False),
    Column("created_unix_ms", BigInteger, nullable=False),
    Column("deadline_unix_ms", BigInteger, nullable=False),
    Column("detail", Text, nullable=False),
    Column("pivot_name", String(20), nullable=False),
    Column("attempt", Integer, nullable=False, server_default="0"),
    Column("lease_unix_ms", BigInteger, nullable=False, server_default="0"),
    Column("losses", Integer, nullable=False, server_default="0"),
    Column("order_json", Text, nullable=False, server_default=""),
)
CONTRIBUTIONS = Table(
    "contributions",
    META,
    Column("round_id", String(20), primary_key=True),
    Column("participant", String(40), primary_key=True),
    Column("status", String(12), nullable=False),
    Column("attempt", Integer, nullable=False),
    Column("sha256", String(64), nullable=False),
    Column("size_bytes", BigInteger, nullable=False),
    Column("committed_unix_ms", BigInteger, nullable=False),
    Column("detail", Text, nullable=False),
    Column("report_json", Text, nullable=False),
    Column("lease_unix_ms", BigInteger, nullable=False, server_default="0"),
)
EVENTS = Table(
    "events",
    META,
    Column("seq", Integer, primary_key=True, autoincrement=True),
    Column("round_id", String(20), nullable=False, index=True),
    Column("time_unix_ms", BigInteger, nullable=False),
    Column("kind", String(16), nullable=False),
    Column("body_json", Text, nullable=False),
)
ARTIFACTS = Table(
    "artifacts",
    META,
    Column("sha256", String(64), primary_key=True),
    Column("owner", String(40), primary_key=True),
    Column("kind", String(16), nullable=False),
    Column("size_bytes", BigInteger, nullable=False),
)
PIVOTS = Table(
    "pivots",
    META,
    Column("name", String(20), primary_key=True),
    Column("parent", String(20), nullable=False),
    Column("round_id", String(20), nullable=False),
    Column("files_json", Text, nullable=False),
    Column("evals_json", Text, nullable=False),
    Column("created_unix_ms", BigInteger, nullable=False),
    Column("promotions_needed", Integer, nullable=False, server_default="0"),
    Column("promotions_json", Text, nullable=False, server_default="{}"),
)
EXPERTS = Table(
    "experts",
    META,
    Column("participant", String(40), primary_key=True),
    Column("version", String(64), nullable=False),
    Column("changed_unix_ms", BigInteger, nullable=False),
)
RECURRING = Table(
    "recurring",
    META,
    Column("number", Integer, primary_key=True, autoincrement=True),
    Column("request_id", String(120), unique=True, nullable=False),
    Column("submitted_by", String(40), nullable=False),
    Column("spec_json", Text, nullable=False),
    Column("state", String(20), nullable=False),
    Column("due_unix_ms", BigInteger, nullable=False),
    Column("last_round_id", String(20), nullable=False),
    Column("detail", Text, nullable=False),
    Column("order_json", Text, nullable=False, server_default=""),
)
AUDIT = Table(
    "audit",
    META,
    Column("seq", Integer, primary_key=True, autoincrement=False),
    Column("h", String(64), nullable=False),
    Column("line", Text, nullable=False),
)
AUDIT_CHECKPOINTS = Table(
    "audit_checkpoints",
    META,
    Column("seq", Integer, primary_key=True, autoincrement=False),
    Column("line", Text, nullable=False),
)
ANCHORS = Table(
    "anchors",
    META,
    Column("participant", String(40), primary_key=True),
    Column("seq", BigInteger, nullable=False),
    Column("head", String(64), nullable=False),
    Column("noted_unix_ms", BigInteger, nullable=False),
    Column("alarm", Text, nullable=False),
)
REVOCATIONS = Table(
    "revocations",
    META,
    Column("number", Integer, primary_key=True, autoincrement=True),
    Column("subject", String(60), nullable=False),  # role/name, or empty: one serial only
    Column("serial", String(48), nullable=False),  # decimal: more bits than SQL's integers
    Column("revoked_unix_ms", BigInteger, nullable=False),
    Column("why", Text, nullable=False),
)
INVITATIONS = Table(
    "invitations",
    META,
    Column("invitation", String(16), primary_key=True),
    Column("secret_sha256", String(64), nullable=False),
    Column("role", String(16), nullable=False),
    Column("name", String(40), nullable=False),
    Column("created_unix_ms", BigInteger, nullable=False),
    Column("expires_unix_ms", BigInteger, nullable=False),
    Column("wrong_tries", Integer, nullable=False),
    Column("used_unix_ms", BigInteger, nullable=False),  # 0: not yet
    Column("request_sha256", String(64), nullable=False),
    Column("certificate_pem", Text, nullable=False),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundRow:
    """One round as stored."""

    round_id: str
    submitted_by: str
    spec_json: str
    state: State
    created_unix_ms: int
    deadline_unix_ms: int
    detail: str
    pivot_name: str
    attempt: int
    """Of the fusion worker."""
    lease_unix_ms: int
    """The worker's; 0 while it waits for its turn."""
    losses: int
    """Workers lost so far."""
    order_json: str = ""
    """The submitter's signed order; empty for rounds of older releases."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ContributionRow:
    """One participant's part in one round."""

    round_id: str
    participant: str
    status: str
    attempt: int
    sha256: str
    size_bytes: int
    committed_unix_ms: int
    detail: str
    report_json: str
    lease_unix_ms: int
    """Until then this attempt may go on unheard."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EventRow:
    """One line of a round's story."""

    seq: int
    time_unix_ms: int
    kind: str
    body_json: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ParticipantRow:
    """One enrolled participant."""

    name: str
    node_id: int
    joined_unix_ms: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PivotRow:
    """One version of the pivot."""

    name: str
    parent: str
    round_id: str
    files: tuple[FileRef, ...]
    evals_json: str
    created_unix_ms: int
    promotions_needed: int = 0
    """Operators who must say yes before others may use it."""
    promoted_by: tuple[str, ...] = ()
    """Who has, oldest first."""

    @property
    def waits_for(self) -> int:
        """How many operators have still to say yes."""
        return max(0, self.promotions_needed - len(self.promoted_by))
