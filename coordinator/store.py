"""The coordinator's memory: rounds, contributions, events, participants, pivots. SQLite by default.

Every method is one transaction: what it reports done is on disk (WAL, synchronous=FULL).
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from threading import Condition
from typing import Any

from sqlalchemy import (
    BigInteger,
    Column,
    Connection,
    Engine,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    Text,
    create_engine,
    event,
    func,
    insert,
    select,
    update,
)

from coordinator.clock import now_unix_ms
from coordinator.happenings import Committed, Decided, Evaluated, Happening, Reported
from coordinator.metrics import DB_COMMIT_SECONDS
from coordinator.recurring import Recurring, Situation, Standing, decide, newest_pivot
from coordinator.round_state import Part, Round
from coordinator.rounds import FINAL, CommitRefusedError, Event, State, step
from coordinator.why import Facts, Seen
from protos.errors import CofuseError
from protos.messages import FileRef
from protos.recurring import RecurringSpec

_META = MetaData()
_PARTICIPANTS = Table(
    "participants",
    _META,
    Column("name", String(40), primary_key=True),
    Column("node_id", String(24), nullable=False),  # 64 unsigned bits: more than SQL's integers
    Column("public_key", LargeBinary, nullable=False),
    Column("joined_unix_ms", BigInteger, nullable=False),
)
_ROUNDS = Table(
    "rounds",
    _META,
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
)
_CONTRIBUTIONS = Table(
    "contributions",
    _META,
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
_EVENTS = Table(
    "events",
    _META,
    Column("seq", Integer, primary_key=True, autoincrement=True),
    Column("round_id", String(20), nullable=False, index=True),
    Column("time_unix_ms", BigInteger, nullable=False),
    Column("kind", String(16), nullable=False),
    Column("body_json", Text, nullable=False),
)
_ARTIFACTS = Table(
    "artifacts",
    _META,
    Column("sha256", String(64), primary_key=True),
    Column("owner", String(40), primary_key=True),
    Column("kind", String(16), nullable=False),
    Column("size_bytes", BigInteger, nullable=False),
)
_PIVOTS = Table(
    "pivots",
    _META,
    Column("name", String(20), primary_key=True),
    Column("parent", String(20), nullable=False),
    Column("round_id", String(20), nullable=False),
    Column("files_json", Text, nullable=False),
    Column("evals_json", Text, nullable=False),
    Column("created_unix_ms", BigInteger, nullable=False),
)
_EXPERTS = Table(
    "experts",
    _META,
    Column("participant", String(40), primary_key=True),
    Column("version", String(64), nullable=False),
    Column("changed_unix_ms", BigInteger, nullable=False),
)
_RECURRING = Table(
    "recurring",
    _META,
    Column("number", Integer, primary_key=True, autoincrement=True),
    Column("request_id", String(120), unique=True, nullable=False),
    Column("submitted_by", String(40), nullable=False),
    Column("spec_json", Text, nullable=False),
    Column("state", String(20), nullable=False),
    Column("due_unix_ms", BigInteger, nullable=False),
    Column("last_round_id", String(20), nullable=False),
    Column("detail", Text, nullable=False),
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
    """Of the fusion worker; this and the two below as in coordinator/round_state.py."""
    lease_unix_ms: int
    losses: int


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


class Store:
    """All tables behind one lock-free interface; `changed` wakes whoever waits for news."""

    def __init__(self, url: str) -> None:
        self._engine = _open(url)
        _META.create_all(self._engine)
        self.changed = Condition()

    @classmethod
    def at(cls, path: Path) -> "Store":
        """Open or make the SQLite file `path`."""
        return cls(f"sqlite:///{path}")

    @contextmanager
    def _write(self) -> Iterator[Connection]:
        with DB_COMMIT_SECONDS.time(), self._engine.begin() as connection:
            # A plain BEGIN that reads and then writes fails at once when another writer comes
            # in between; this one waits its turn.
            connection.exec_driver_sql("BEGIN IMMEDIATE")
            yield connection
        with self.changed:
            self.changed.notify_all()

    def check_writable(self) -> None:
        """Take the writers' turn and give it back, changing nothing.

        Raises: sqlalchemy.exc.SQLAlchemyError when the database takes no writer.
        """
        with self._write():
            pass

    # participants

    def upsert_participant(self, name: str, node_id: int, public_key: bytes) -> None:
        """Remember the engine's node of a participant; joining again keeps the first date."""
        with self._write() as db:
            known = db.execute(select(_PARTICIPANTS).where(_PARTICIPANTS.c.name == name)).first()
            values = {"node_id": str(node_id), "public_key": public_key}
            if known is None:
                row = {"name": name, **values, "joined_unix_ms": now_unix_ms()}
                db.execute(insert(_PARTICIPANTS).values(row))
            else:
                db.execute(update(_PARTICIPANTS).where(_PARTICIPANTS.c.name == name).values(values))

    def participants(self) -> dict[str, ParticipantRow]:
        """Everybody who ever joined, by name."""
        with self._engine.connect() as db:
            rows = db.execute(select(_PARTICIPANTS).order_by(_PARTICIPANTS.c.name)).mappings()
            return {
                row["name"]: ParticipantRow(
                    name=row["name"],
                    node_id=int(row["node_id"]),
                    joined_unix_ms=row["joined_unix_ms"],
                )
                for row in rows
            }

    # rounds

    def submit_round(
        self, *, request_id: str, submitted_by: str, spec_json: str, deadline_ms: int
    ) -> RoundRow:
        """Store a new round, or return the one this request made before."""
        with self._write() as db:
            round_id = _submit(
                db, f"{submitted_by}/{request_id}", submitted_by, spec_json, deadline_ms
            )
        return self.round(round_id)

    def round(self, round_id: str) -> RoundRow:
        """One round.

        Raises: CofuseError unknown_round.
        """
        with self._engine.connect() as db:
            return _round(db, round_id)

    def rounds(self, *, active_only: bool = False) -> list[RoundRow]:
        """Rounds in the order they were submitted."""
        query = select(_ROUNDS).order_by(_ROUNDS.c.number)
        if active_only:
            query = query.where(_ROUNDS.c.state.not_in(sorted(FINAL)))
        with self._engine.connect() as db:
            return [_round_row(row) for row in db.execute(query).mappings()]

    def step(self, round_id: str, happening: Happening) -> Round:
        """Let a happening change a round as coordinator/rounds.py says, in one transaction.

        What changes nothing is not written, so asking often costs a reading only.

        Raises: IllegalTransitionError, CommitRefusedError: then nothing has changed.
        """
        with self._engine.connect() as db:
            before, after = _decide(db, round_id, happening)
        if after == before:
            return after
        with self._write() as db:
            return _step(db, round_id, happening)

    def core(self, round_id: str) -> Round:
        """One round as the rules of coordinator/rounds.py see it, with every part.

        Raises: CofuseError unknown_round.
        """
        with self._engine.connect() as db:
            return _core(_round(db, round_id), _contributions(db, round_id))

    def facts(self, seen: Mapping[str, Seen]) -> Facts:
        """What coordinator/why.py explains names from, with what is seen of the participants."""
        with self._engine.connect() as db:
            rows = [_round_row(r) for r in db.execute(select(_ROUNDS)).mappings()]
            pivots = db.execute(select(_PIVOTS.c.name, _PIVOTS.c.round_id))
            kept = {row.pivot_name: row.round_id for row in rows if row.pivot_name}
            return Facts(
                rounds=[_core(row, _contributions(db, row.round_id)) for row in rows],
                seen=seen,
                pivots={**kept, **{name: by for name, by in pivots}},
                recurring=self.recurring(),
            )

    def advance(self, round_id: str, event_: Event, detail: str = "") -> RoundRow:
        """Move a round along its table and write it to its story, in one transaction.

        Raises: IllegalTransitionError when its state does not take the event.
        """
        self.step(round_id, Decided(event_, detail))
        return self.round(round_id)

    # contributions

    def assign(self, round_id: str, participants: Sequence[str]) -> list[ContributionRow]:
        """Make or re-issue the assignments still open: each gets a new attempt number."""
        with self._write() as db:
            known = {row.participant: row for row in _contributions(db, round_id)}
            for name in participants:
                if name not in known:
                    empty = {"sha256": "", "size_bytes": 0, "committed_unix_ms": 0}
                    texts = {"detail": "", "report_json": "", "lease_unix_ms": 0}
                    key = {"round_id": round_id, "participant": name}
                    row = {**key, "status": "assigned", "attempt": 1, **empty, **texts}
                    db.execute(insert(_CONTRIBUTIONS).values(row))
                elif known[name].status == "assigned":
                    changes = {"attempt": known[name].attempt + 1}
                    db.execute(_update_contribution(round_id, name).values(changes))
            return _contributions(db, round_id)

    def contributions(self, round_id: str) -> list[ContributionRow]:
        """Every named participant's part, by name."""
        with self._engine.connect() as db:
            return _contributions(db, round_id)

    def commit(
        self, round_id: str, participant: str, sha256: str, size_bytes: int
    ) -> ContributionRow:
        """Count a validated file as the participant's contribution. The first one stands.

        Raises: CofuseError wrong_state when the round does not collect or does not name the
            caller, or has another file of theirs.
        """
        try:
            self.step(round_id, Committed(participant, sha256, size_bytes))
        except CommitRefusedError as error:
            raise CofuseError("wrong_state", str(error)) from error
        return next(c for c in self.contributions(round_id) if c.participant == participant)

    def report(self, round_id: str, participant: str, status: str, detail: str, body: str) -> None:
        """Keep a participant's report; a refusal or failure ends its part unless committed."""
        self.step(round_id, Reported(participant, None, status, detail, body))

    # events

    def note(self, round_id: str, kind: str, body: Mapping[str, Any]) -> None:
        """Add a line to a round's story."""
        with self._write() as db:
            _log(db, round_id, kind, body)

    def events(self, round_id: str, after_seq: int = 0) -> list[EventRow]:
        """The story after `after_seq`, oldest first."""
        query = (
            select(_EVENTS)
            .where(_EVENTS.c.round_id == round_id, _EVENTS.c.seq > after_seq)
            .order_by(_EVENTS.c.seq)
        )
        with self._engine.connect() as db:
            return [
                EventRow(**{k: row[k] for k in ("seq", "time_unix_ms", "kind", "body_json")})
                for row in db.execute(query).mappings()
            ]

    def news(self, after_seq: int = 0) -> list[tuple[str, EventRow]]:
        """Every round's changes of state and contributions after `after_seq`, oldest first.

        Returns: (round id, event) pairs.
        """
        query = (
            select(_EVENTS)
            .where(_EVENTS.c.seq > after_seq, _EVENTS.c.kind.in_(("state", "contribution")))
            .order_by(_EVENTS.c.seq)
        )
        with self._engine.connect() as db:
            return [
                (
                    row["round_id"],
                    EventRow(**{k: row[k] for k in ("seq", "time_unix_ms", "kind", "body_json")}),
                )
                for row in db.execute(query).mappings()
            ]

    # artifacts

    def add_artifact(self, sha256: str, owner: str, kind: str, size_bytes: int) -> None:
        """Remember who put a complete file, and as what. Repeating changes nothing."""
        with self._write() as db:
            key = (_ARTIFACTS.c.sha256 == sha256) & (_ARTIFACTS.c.owner == owner)
            if db.execute(select(_ARTIFACTS).where(key)).first() is None:
                row = {"sha256": sha256, "owner": owner, "kind": kind, "size_bytes": size_bytes}
                db.execute(insert(_ARTIFACTS).values(row))

    def artifact_kinds(self, sha256: str) -> dict[str, tuple[str, int]]:
        """Owner -> (kind, size) of one file."""
        query = select(_ARTIFACTS).where(_ARTIFACTS.c.sha256 == sha256)
        with self._engine.connect() as db:
            return {r["owner"]: (r["kind"], r["size_bytes"]) for r in db.execute(query).mappings()}

    # pivots

    def add_pivot(
        self, *, name: str, parent: str, round_id: str, files: Sequence[FileRef], evals_json: str
    ) -> PivotRow:
        """Publish a pivot. Repeating changes nothing; another content under the name is refused."""
        with self._write() as db:
            _add_pivot(db, name, parent, round_id, files, evals_json)
        return self.pivot(name)

    def publish(
        self, round_id: str, attempt: int, *, parent: str, files: Sequence[FileRef], evals_json: str
    ) -> Round:
        """End a round with its pivot, both in one transaction: no half of it is ever visible.

        Raises: IllegalTransitionError when the round has ended, or another worker has it.
        """
        with self._write() as db:
            after = _step(db, round_id, Evaluated(attempt))
            name = _round(db, round_id).pivot_name
            _add_pivot(db, name, parent, round_id, files, evals_json)
            return after

    def pivot(self, name: str) -> PivotRow:
        """One pivot.

        Raises: CofuseError unknown_pivot, naming those there are.
        """
        found = {row.name: row for row in self.pivots()}
        if name not in found:
            raise CofuseError(
                "unknown_pivot", f"no pivot {name!r}; there are: {', '.join(found) or 'none yet'}"
            )
        return found[name]

    def pivots(self) -> list[PivotRow]:
        """All pivots, oldest first."""
        with self._engine.connect() as db:
            rows = db.execute(select(_PIVOTS).order_by(_PIVOTS.c.created_unix_ms)).mappings()
            return [
                PivotRow(
                    name=row["name"],
                    parent=row["parent"],
                    round_id=row["round_id"],
                    files=tuple(FileRef(**file) for file in json.loads(row["files_json"])),
                    evals_json=row["evals_json"],
                    created_unix_ms=row["created_unix_ms"],
                )
                for row in rows
            ]

    # recurring

    def add_recurring(
        self, *, request_id: str, submitted_by: str, spec_json: str, due_unix_ms: int
    ) -> Recurring:
        """Store a recurring spec, or return the one this request made before."""
        unique = f"{submitted_by}/{request_id}"
        with self._write() as db:
            found = db.scalar(select(_RECURRING.c.number).where(_RECURRING.c.request_id == unique))
            if found is None:
                values = {
                    "request_id": unique,
                    "submitted_by": submitted_by,
                    "spec_json": spec_json,
                    "state": Standing.ACTIVE,
                    "due_unix_ms": due_unix_ms,
                    "last_round_id": "",
                    "detail": "",
                }
                found = db.execute(insert(_RECURRING).values(values)).inserted_primary_key[0]  # type: ignore[index]
            return _recurring(db, f"rec-{found}")

    def recurring(self) -> list[Recurring]:
        """All recurring specs, oldest first."""
        with self._engine.connect() as db:
            rows = db.execute(select(_RECURRING).order_by(_RECURRING.c.number)).mappings()
            return [_recurring_row(row) for row in rows]

    def stop_recurring(self, recurring_id: str, detail: str) -> Recurring:
        """Make no more rounds of it; one that is open goes on. Repeating changes nothing.

        Raises: CofuseError unknown_recurring.
        """
        with self._write() as db:
            if _recurring(db, recurring_id).state is Standing.ACTIVE:
                changes = {"state": Standing.STOPPED, "detail": detail}
                db.execute(_update_recurring(recurring_id).values(changes))
            return _recurring(db, recurring_id)

    def repeat(self, recurring_id: str) -> str:
        """Make the next round of a recurring spec if its time has come, in one transaction.

        Returns: the round's id; empty when none was made.
        """
        with self._write() as db:
            before = _recurring(db, recurring_id)
            after, is_time = decide(before, _situation(db, before), now_unix_ms())
            round_id = ""
            if is_time:
                round_id = _repeat(db, before)
                after = replace(after, last_round_id=round_id)
            if after != before:
                names = ("due_unix_ms", "last_round_id", "detail")
                changes = {name: getattr(after, name) for name in names}
                db.execute(_update_recurring(recurring_id).values(changes))
            return round_id

    def note_expert(self, participant: str, version: str) -> None:
        """Remember since when a participant's expert is as it is; the same version is no news."""
        key = _EXPERTS.c.participant == participant
        with self._engine.connect() as db:
            if db.scalar(select(_EXPERTS.c.version).where(key)) == version:
                return
        with self._write() as db:
            values = {"version": version, "changed_unix_ms": now_unix_ms()}
            if not db.execute(update(_EXPERTS).where(key).values(values)).rowcount:
                db.execute(insert(_EXPERTS).values({"participant": participant, **values}))


def _open(url: str) -> Engine:
    engine = create_engine(url)

    @event.listens_for(engine, "connect")
    def _durable(connection: Any, _record: Any) -> None:
        for pragma in ("journal_mode=WAL", "synchronous=FULL", "busy_timeout=30000"):
            connection.execute(f"PRAGMA {pragma}")
        connection.isolation_level = None  # _write begins its transactions itself

    return engine


def _number(round_id: str) -> int:
    head, _, number = round_id.partition("-")
    # As we write it, and no other spelling: "rnd-07" would be another key of the other tables.
    if head != "rnd" or not re.fullmatch(r"[1-9][0-9]{0,8}", number):
        raise CofuseError("unknown_round", f"found round id {round_id[:60]!r}, wanted rnd-<number>")
    return int(number)


def _round(db: Connection, round_id: str) -> RoundRow:
    query = select(_ROUNDS).where(_ROUNDS.c.number == _number(round_id))
    row = db.execute(query).mappings().first()
    if row is None:
        raise CofuseError("unknown_round", f"there is no round {round_id!r}")
    return _round_row(row)


def _round_row(row: Any) -> RoundRow:
    return RoundRow(
        round_id=f"rnd-{row['number']}",
        submitted_by=row["submitted_by"],
        spec_json=row["spec_json"],
        state=State(row["state"]),
        created_unix_ms=row["created_unix_ms"],
        deadline_unix_ms=row["deadline_unix_ms"],
        detail=row["detail"],
        pivot_name=row["pivot_name"],
        attempt=row["attempt"],
        lease_unix_ms=row["lease_unix_ms"],
        losses=row["losses"],
    )


def _submit(
    db: Connection, request_id: str, submitted_by: str, spec_json: str, deadline_ms: int
) -> str:
    known = db.scalar(select(_ROUNDS.c.number).where(_ROUNDS.c.request_id == request_id))
    if known is not None:
        return f"rnd-{known}"
    created = now_unix_ms()
    values = {
        "request_id": request_id,
        "submitted_by": submitted_by,
        "spec_json": spec_json,
        "state": State.SUBMITTED,
        "created_unix_ms": created,
        "deadline_unix_ms": created + deadline_ms,
        "detail": "",
        "pivot_name": "",
    }
    number = db.execute(insert(_ROUNDS).values(values)).inserted_primary_key[0]  # type: ignore[index]
    _log(db, f"rnd-{number}", "state", {"state": State.SUBMITTED, "detail": ""})
    return f"rnd-{number}"


def _repeat(db: Connection, recurring: Recurring) -> str:
    """Submit and approve the round: whoever started the recurring spec approved its rounds."""
    spec = RecurringSpec.model_validate_json(recurring.spec_json).round
    columns = select(_PIVOTS.c.name, _PIVOTS.c.parent).order_by(_PIVOTS.c.created_unix_ms)
    parents = {name: parent for name, parent in db.execute(columns)}
    pivot = newest_pivot(spec.pivot, parents)
    round_id = _submit(
        db,
        f"{recurring.recurring_id}/{recurring.due_unix_ms}",
        recurring.submitted_by,
        spec.model_copy(update={"pivot": pivot}).model_dump_json(),
        int(spec.deadline_minutes * 60_000),
    )
    _step(db, round_id, Decided(Event.APPROVE, f"by {recurring.recurring_id}"))
    return round_id


def _situation(db: Connection, recurring: Recurring) -> Situation:
    last = recurring.last_round_id
    changed = db.execute(select(_EXPERTS.c.participant, _EXPERTS.c.changed_unix_ms))
    fused = db.execute(
        select(_CONTRIBUTIONS.c.participant, func.max(_CONTRIBUTIONS.c.committed_unix_ms))
        .where(
            _CONTRIBUTIONS.c.status == "committed",
            _CONTRIBUTIONS.c.round_id.in_(select(_PIVOTS.c.round_id)),
        )
        .group_by(_CONTRIBUTIONS.c.participant)
    )
    return Situation(
        last_is_open=bool(last) and _round(db, last).state not in FINAL,
        changed_unix_ms={name: at for name, at in changed},
        fused_unix_ms={name: at for name, at in fused},
    )


def _recurring(db: Connection, recurring_id: str) -> Recurring:
    head, _, number = recurring_id.partition("-")
    if head == "rec" and number.isascii() and number.isdigit() and len(number) < 10:
        query = select(_RECURRING).where(_RECURRING.c.number == int(number))
        if row := db.execute(query).mappings().first():
            return _recurring_row(row)
    raise CofuseError("unknown_recurring", f"there is no recurring spec {recurring_id[:60]!r}")


def _recurring_row(row: Any) -> Recurring:
    names = ("submitted_by", "spec_json", "due_unix_ms", "last_round_id", "detail")
    return Recurring(
        recurring_id=f"rec-{row['number']}",
        state=Standing(row["state"]),
        **{name: row[name] for name in names},
    )


def _update_recurring(recurring_id: str) -> Any:
    number = int(recurring_id.removeprefix("rec-"))
    return update(_RECURRING).where(_RECURRING.c.number == number)


def _contributions(db: Connection, round_id: str, only: str | None = None) -> list[ContributionRow]:
    query = (
        select(_CONTRIBUTIONS)
        .where(_CONTRIBUTIONS.c.round_id == round_id)
        .order_by(_CONTRIBUTIONS.c.participant)
    )
    if only is not None:
        query = query.where(_CONTRIBUTIONS.c.participant == only)
    return [ContributionRow(**row) for row in db.execute(query).mappings()]


def _update_contribution(round_id: str, participant: str) -> Any:
    return update(_CONTRIBUTIONS).where(
        _CONTRIBUTIONS.c.round_id == round_id, _CONTRIBUTIONS.c.participant == participant
    )


def _log(db: Connection, round_id: str, kind: str, body: Mapping[str, Any]) -> None:
    row = {"round_id": round_id, "time_unix_ms": now_unix_ms(), "kind": kind}
    db.execute(insert(_EVENTS).values({**row, "body_json": json.dumps(body)}))


def _core(row: RoundRow, parts: Sequence[ContributionRow]) -> Round:
    """The round as its rules see it. What the spec leaves out is what protos/spec.py says."""
    spec = json.loads(row.spec_json)
    participants = tuple(spec.get("participants", ()))
    kept = spec.get("fusion_minutes")
    whole_ms = row.deadline_unix_ms - row.created_unix_ms
    kept_ms = whole_ms // 3 if kept is None else int(kept * 60_000)
    return Round(
        round_id=row.round_id,
        state=row.state,
        participants=participants,
        needed=spec.get("quorum") or len(participants),
        deadline_unix_ms=row.deadline_unix_ms,
        collect_unix_ms=row.deadline_unix_ms - kept_ms,
        detail=row.detail,
        parts=tuple(_part(part) for part in parts),
        attempt=row.attempt,
        lease_unix_ms=row.lease_unix_ms,
        losses=row.losses,
    )


def _part(row: ContributionRow) -> Part:
    return Part(**{field.name: getattr(row, field.name) for field in fields(Part)})


def _decide(db: Connection, round_id: str, happening: Happening) -> tuple[Round, Round]:
    """The round before and after. For a word of one participant its row alone is read."""
    only = getattr(happening, "participant", None)
    before = _core(_round(db, round_id), _contributions(db, round_id, only))
    return before, step(before, happening, now_unix_ms())[0]


def _step(db: Connection, round_id: str, happening: Happening) -> Round:
    before, after = _decide(db, round_id, happening)
    if after != before:
        _save_round(db, before, after)
        old = {part.participant: part for part in before.parts}
        for part in after.parts:
            if part != old.get(part.participant):
                _save_part(db, after, old.get(part.participant), part)
    return after


def _save_round(db: Connection, before: Round, after: Round) -> None:
    names = ("state", "detail", "attempt", "lease_unix_ms", "losses")
    changes = {n: getattr(after, n) for n in names if getattr(after, n) != getattr(before, n)}
    if after.state is not before.state:
        _log(db, after.round_id, "state", {"state": after.state, "detail": after.detail})
        if after.state is State.FUSING:
            changes["pivot_name"] = _next_pivot_name(db)
    elif after.attempt > before.attempt:
        detail = f"fusion worker {after.attempt} follows. {after.detail}".strip()
        _log(db, after.round_id, "note", {"detail": detail})
    if changes:
        number = _number(after.round_id)
        db.execute(update(_ROUNDS).where(_ROUNDS.c.number == number).values(changes))


def _save_part(db: Connection, round_: Round, before: Part | None, after: Part) -> None:
    row = {field.name: getattr(after, field.name) for field in fields(Part)}
    if before is None:
        db.execute(insert(_CONTRIBUTIONS).values({"round_id": round_.round_id, **row}))
        return
    db.execute(_update_contribution(round_.round_id, after.participant).values(row))
    told: dict[str, Any] = {"participant": after.participant}
    if after.status == "committed" != before.status:
        told |= {"status": "committed", "size_bytes": after.size_bytes}
        _log(db, round_.round_id, "contribution", told)
    elif after.status != before.status:
        told |= {"status": after.status, "detail": after.detail}
        _log(db, round_.round_id, "contribution", told)
    elif after.attempt > before.attempt:
        detail = f"is asked again, attempt {after.attempt}. {after.detail}".strip()
        _log(db, round_.round_id, "note", {**told, "detail": detail})


def _add_pivot(
    db: Connection,
    name: str,
    parent: str,
    round_id: str,
    files: Sequence[FileRef],
    evals_json: str,
) -> None:
    files_json = json.dumps([file.model_dump() for file in files])
    found = db.execute(select(_PIVOTS).where(_PIVOTS.c.name == name)).mappings().first()
    if found is not None:
        if found["files_json"] != files_json:
            raise CofuseError("bad_request", f"{name} exists with other files")
        return
    kept = db.scalar(select(_ROUNDS.c.number).where(_ROUNDS.c.pivot_name == name))
    if kept is not None and f"rnd-{kept}" != round_id:
        raise CofuseError("bad_request", f"{name} is the name of what rnd-{kept} will publish")
    texts = {"files_json": files_json, "evals_json": evals_json}
    row = {"name": name, "parent": parent, "round_id": round_id, **texts}
    db.execute(insert(_PIVOTS).values({**row, "created_unix_ms": now_unix_ms()}))


def _next_pivot_name(db: Connection) -> str:
    """A version no pivot and no round has taken: reserved with the round's own row."""
    taken = [*db.scalars(select(_PIVOTS.c.name)), *db.scalars(select(_ROUNDS.c.pivot_name))]
    return f"pivot-{max((int(name.split('-')[1]) for name in taken if name), default=0) + 1}"
