"""The coordinator's memory: rounds, contributions, events, participants, pivots. SQLite by default.

Every method is one transaction: what it reports done is on disk (WAL, synchronous=FULL).
"""

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
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
    delete,
    event,
    insert,
    select,
    update,
)

from coordinator.rounds import FINAL, Event, State, advance
from protos.errors import CofuseError
from protos.messages import FileRef

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


def now_unix_ms() -> int:
    """The coordinator's clock, UTC."""
    return time.time_ns() // 1_000_000


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
        with self._engine.begin() as connection:
            # A plain BEGIN that reads and then writes fails at once when another writer comes
            # in between; this one waits its turn.
            connection.exec_driver_sql("BEGIN IMMEDIATE")
            yield connection
        with self.changed:
            self.changed.notify_all()

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
        unique = f"{submitted_by}/{request_id}"
        with self._write() as db:
            found = db.execute(select(_ROUNDS).where(_ROUNDS.c.request_id == unique)).mappings()
            if known := found.first():
                return _round_row(known)
            created = now_unix_ms()
            values = {
                "request_id": unique,
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
        return self.round(f"rnd-{number}")

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

    def advance(self, round_id: str, event_: Event, detail: str = "") -> RoundRow:
        """Move a round along its table and write it to its story, in one transaction.

        Raises: IllegalTransitionError when its state does not take the event.
        """
        with self._write() as db:
            row = _round(db, round_id)
            state = advance(row.state, event_)
            changes = {"state": state, "detail": detail}
            if event_ is Event.COLLECTED:
                changes["pivot_name"] = _next_pivot_name(db)
            db.execute(update(_ROUNDS).where(_ROUNDS.c.number == _number(round_id)).values(changes))
            _log(db, round_id, "state", {"state": state, "detail": detail})
        return self.round(round_id)

    # contributions

    def assign(self, round_id: str, participants: Sequence[str]) -> list[ContributionRow]:
        """Make or re-issue the assignments still open: each gets a new attempt number."""
        with self._write() as db:
            known = {row.participant: row for row in _contributions(db, round_id)}
            for name in participants:
                if name not in known:
                    empty = {"sha256": "", "size_bytes": 0, "committed_unix_ms": 0}
                    texts = {"detail": "", "report_json": ""}
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
        with self._write() as db:
            row = _round(db, round_id)
            mine = [c for c in _contributions(db, round_id) if c.participant == participant]
            if not mine:
                raise CofuseError("wrong_state", f"{round_id} does not name {participant!r}")
            if mine[0].status == "committed":
                if mine[0].sha256 != sha256:
                    raise CofuseError(
                        "wrong_state",
                        f"{round_id} already holds {mine[0].sha256[:12]} of {participant!r}",
                    )
                return mine[0]
            if row.state is not State.COLLECTING or mine[0].status != "assigned":
                raise CofuseError(
                    "wrong_state",
                    f"{round_id} is {row.state} and {participant!r} {mine[0].status}: "
                    "it takes no contribution now",
                )
            values = {"status": "committed", "sha256": sha256, "size_bytes": size_bytes}
            db.execute(
                _update_contribution(round_id, participant).values(
                    {**values, "committed_unix_ms": now_unix_ms()}
                )
            )
            body = {"participant": participant, "status": "committed", "size_bytes": size_bytes}
            _log(db, round_id, "contribution", body)
        return next(c for c in self.contributions(round_id) if c.participant == participant)

    def report(self, round_id: str, participant: str, status: str, detail: str, body: str) -> None:
        """Keep a participant's report; a refusal or failure ends its part unless committed."""
        with self._write() as db:
            mine = [c for c in _contributions(db, round_id) if c.participant == participant]
            if not mine:
                return
            changes: dict[str, Any] = {"report_json": body}
            if mine[0].status == "assigned" and status in ("refused", "failed"):
                changes |= {"status": status, "detail": detail}
                news = {"participant": participant, "status": status, "detail": detail}
                _log(db, round_id, "contribution", news)
            db.execute(_update_contribution(round_id, participant).values(changes))

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

    def forget_artifact(self, sha256: str) -> None:
        """Forget who put a file that is gone."""
        with self._write() as db:
            db.execute(delete(_ARTIFACTS).where(_ARTIFACTS.c.sha256 == sha256))

    # pivots

    def add_pivot(
        self, *, name: str, parent: str, round_id: str, files: Sequence[FileRef], evals_json: str
    ) -> PivotRow:
        """Publish a pivot. Repeating changes nothing; another content under the name is refused."""
        files_json = json.dumps([file.model_dump() for file in files])
        with self._write() as db:
            if (
                known := db.execute(select(_PIVOTS).where(_PIVOTS.c.name == name))
                .mappings()
                .first()
            ):
                if known["files_json"] != files_json:
                    raise CofuseError("bad_request", f"{name} exists with other files")
            else:
                texts = {"files_json": files_json, "evals_json": evals_json}
                row = {"name": name, "parent": parent, "round_id": round_id, **texts}
                db.execute(insert(_PIVOTS).values({**row, "created_unix_ms": now_unix_ms()}))
        return self.pivot(name)

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
    if head != "rnd" or not (number.isascii() and number.isdigit() and len(number) < 10):
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
    )


def _contributions(db: Connection, round_id: str) -> list[ContributionRow]:
    query = (
        select(_CONTRIBUTIONS)
        .where(_CONTRIBUTIONS.c.round_id == round_id)
        .order_by(_CONTRIBUTIONS.c.participant)
    )
    return [ContributionRow(**row) for row in db.execute(query).mappings()]


def _update_contribution(round_id: str, participant: str) -> Any:
    return update(_CONTRIBUTIONS).where(
        _CONTRIBUTIONS.c.round_id == round_id, _CONTRIBUTIONS.c.participant == participant
    )


def _log(db: Connection, round_id: str, kind: str, body: Mapping[str, Any]) -> None:
    row = {"round_id": round_id, "time_unix_ms": now_unix_ms(), "kind": kind}
    db.execute(insert(_EVENTS).values({**row, "body_json": json.dumps(body)}))


def _next_pivot_name(db: Connection) -> str:
    """A version no pivot and no round has taken: reserved with the round's own row."""
    taken = [*db.scalars(select(_PIVOTS.c.name)), *db.scalars(select(_ROUNDS.c.pivot_name))]
    return f"pivot-{max((int(name.split('-')[1]) for name in taken if name), default=0) + 1}"
