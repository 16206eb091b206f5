"""The coordinator's memory: rounds, contributions, events, participants, pivots.

Every method is one transaction: what it reports done is on disk.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from threading import Condition
from typing import Any

from sqlalchemy import Connection, func, insert, select, update

from coordinator.database import Database, open_database
from coordinator.migrate import migrate
from coordinator.queries import (
    find_contribution,
    find_contributions,
    find_round,
    next_pivot_name,
    now_unix_ms,
    pivot_row,
    plain,
    round_number,
    round_row,
    tell,
    update_contribution,
)
from coordinator.rounds import FINAL, Event, State, advance
from coordinator.tables import (
    ARTIFACTS,
    CONTRIBUTIONS,
    EVENTS,
    PARTICIPANTS,
    PIVOTS,
    ROUNDS,
    ContributionRow,
    EventRow,
    ParticipantRow,
    PivotRow,
    RoundRow,
)
from protos.errors import CofuseError
from protos.messages import FileRef

__all__ = [
    "ContributionRow",
    "EventRow",
    "ParticipantRow",
    "PivotRow",
    "RoundRow",
    "Store",
    "now_unix_ms",
]


class Store:
    """All tables behind one interface for many threads; `changed` wakes whoever waits for news."""

    def __init__(self, url: str, *, lead: bool = False, backups: Path | None = None) -> None:
        """Open the database, check it, and bring its schema up to date.

        Args: url as in open_database; lead: be the only coordinator of it until close();
            backups: folder for the copy made before an upgrade, default beside a SQLite file.
        Raises: StoreError when it cannot be used; the message says what to do.
        """
        self.database: Database = open_database(url)
        try:
            self.database.check()
            if lead:
                self.database.lead()
            migrate(self.database, backups)
        except BaseException:
            self.database.close()
            raise
        self.changed = Condition()

    @classmethod
    def at(cls, path: Path) -> "Store":
        """Open or make the SQLite file `path`."""
        return cls(f"sqlite:///{path}")

    def close(self) -> None:
        """Let go of the database and of the lead."""
        self.database.close()

    @contextmanager
    def _write(self) -> Iterator[Connection]:
        with self.database.write() as connection:
            yield connection
        with self.changed:
            self.changed.notify_all()

    # participants

    def upsert_participant(self, name: str, node_id: int, public_key: bytes) -> None:
        """Remember the engine's node of a participant; joining again keeps the first date."""
        with self._write() as db:
            known = db.execute(select(PARTICIPANTS).where(PARTICIPANTS.c.name == name)).first()
            values = {"node_id": str(node_id), "public_key": public_key}
            if known is None:
                row = {"name": name, **values, "joined_unix_ms": now_unix_ms()}
                db.execute(insert(PARTICIPANTS).values(row))
            else:
                db.execute(update(PARTICIPANTS).where(PARTICIPANTS.c.name == name).values(values))

    def participants(self) -> dict[str, ParticipantRow]:
        """Everybody who ever joined, by name."""
        with self.database.read() as db:
            rows = db.execute(select(PARTICIPANTS).order_by(PARTICIPANTS.c.name)).mappings()
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
            found = db.execute(select(ROUNDS).where(ROUNDS.c.request_id == unique)).mappings()
            if known := found.first():
                return round_row(known)
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
            number = db.execute(insert(ROUNDS).values(values)).inserted_primary_key[0]  # type: ignore[index]
            tell(db, f"rnd-{number}", "state", {"state": State.SUBMITTED, "detail": ""})
        return self.round(f"rnd-{number}")

    def round(self, round_id: str) -> RoundRow:
        """One round.

        Raises: CofuseError unknown_round.
        """
        with self.database.read() as db:
            return find_round(db, round_id)

    def rounds(self, *, active_only: bool = False) -> list[RoundRow]:
        """Rounds in the order they were submitted."""
        query = select(ROUNDS).order_by(ROUNDS.c.number)
        if active_only:
            query = query.where(ROUNDS.c.state.not_in(sorted(FINAL)))
        with self.database.read() as db:
            return [round_row(row) for row in db.execute(query).mappings()]

    def advance(self, round_id: str, event_: Event, detail: str = "") -> RoundRow:
        """Move a round along its table and write it to its story, in one transaction.

        Raises: IllegalTransitionError when its state does not take the event.
        """
        with self._write() as db:
            row = find_round(db, round_id)
            state = advance(row.state, event_)
            changes = {"state": state, "detail": plain(detail)}
            if event_ is Event.COLLECTED:
                changes["pivot_name"] = next_pivot_name(db)
            db.execute(
                update(ROUNDS).where(ROUNDS.c.number == round_number(round_id)).values(changes)
            )
            tell(db, round_id, "state", {"state": state, "detail": detail})
        return self.round(round_id)

    # contributions

    def assign(self, round_id: str, participants: Sequence[str]) -> list[ContributionRow]:
        """Make or re-issue the assignments still open: each gets a new attempt number."""
        with self._write() as db:
            known = {row.participant: row for row in find_contributions(db, round_id)}
            for name in participants:
                if name not in known:
                    empty = {"sha256": "", "size_bytes": 0, "committed_unix_ms": 0}
                    texts = {"detail": "", "report_json": ""}
                    key = {"round_id": round_id, "participant": name}
                    row = {**key, "status": "assigned", "attempt": 1, **empty, **texts}
                    db.execute(insert(CONTRIBUTIONS).values(row))
                elif known[name].status == "assigned":
                    changes = {"attempt": known[name].attempt + 1}
                    db.execute(update_contribution(round_id, name).values(changes))
            return find_contributions(db, round_id)

    def contributions(self, round_id: str) -> list[ContributionRow]:
        """Every named participant's part, by name."""
        with self.database.read() as db:
            return find_contributions(db, round_id)

    def commit(
        self, round_id: str, participant: str, sha256: str, size_bytes: int
    ) -> ContributionRow:
        """Count a validated file as the participant's contribution. The first one stands.

        Raises: CofuseError wrong_state when the round does not collect or does not name the
            caller, or has another file of theirs.
        """
        with self._write() as db:
            row = find_round(db, round_id)
            mine = find_contribution(db, round_id, participant)
            if mine is None:
                raise CofuseError("wrong_state", f"{round_id} does not name {participant!r}")
            if mine.status == "committed":
                if mine.sha256 != sha256:
                    raise CofuseError(
                        "wrong_state",
                        f"{round_id} already holds {mine.sha256[:12]} of {participant!r}",
                    )
                return mine
            if row.state is not State.COLLECTING or mine.status != "assigned":
                raise CofuseError(
                    "wrong_state",
                    f"{round_id} is {row.state} and {participant!r} {mine.status}: "
                    "it takes no contribution now",
                )
            values: dict[str, Any] = {
                "status": "committed",
                "sha256": sha256,
                "size_bytes": size_bytes,
                "committed_unix_ms": now_unix_ms(),
            }
            db.execute(update_contribution(round_id, participant).values(values))
            body = {"participant": participant, "status": "committed", "size_bytes": size_bytes}
            tell(db, round_id, "contribution", body)
        return replace(mine, **values)

    def report(self, round_id: str, participant: str, status: str, detail: str, body: str) -> None:
        """Keep a participant's report; a refusal or failure ends its part unless committed."""
        with self._write() as db:
            mine = find_contribution(db, round_id, participant)
            if mine is None:
                return
            changes: dict[str, Any] = {"report_json": body}
            if mine.status == "assigned" and status in ("refused", "failed"):
                changes |= {"status": status, "detail": plain(detail)}
                news = {"participant": participant, "status": status, "detail": detail}
                tell(db, round_id, "contribution", news)
            db.execute(update_contribution(round_id, participant).values(changes))

    # events

    def note(self, round_id: str, kind: str, body: Mapping[str, Any]) -> None:
        """Add a line to a round's story."""
        with self._write() as db:
            tell(db, round_id, kind, body)

    def events(self, round_id: str, after_seq: int = 0) -> list[EventRow]:
        """The story after `after_seq`, oldest first."""
        query = (
            select(EVENTS)
            .where(EVENTS.c.round_id == round_id, EVENTS.c.seq > after_seq)
            .order_by(EVENTS.c.seq)
        )
        with self.database.read() as db:
            return [
                EventRow(**{k: row[k] for k in ("seq", "time_unix_ms", "kind", "body_json")})
                for row in db.execute(query).mappings()
            ]

    # artifacts

    def add_artifact(self, sha256: str, owner: str, kind: str, size_bytes: int) -> None:
        """Remember who put a complete file, and as what. Repeating changes nothing."""
        with self._write() as db:
            key = (ARTIFACTS.c.sha256 == sha256) & (ARTIFACTS.c.owner == owner)
            if db.execute(select(ARTIFACTS).where(key)).first() is None:
                row = {"sha256": sha256, "owner": owner, "kind": kind, "size_bytes": size_bytes}
                db.execute(insert(ARTIFACTS).values(row))

    def artifact_kinds(self, sha256: str) -> dict[str, tuple[str, int]]:
        """Owner -> (kind, size) of one file."""
        query = select(ARTIFACTS).where(ARTIFACTS.c.sha256 == sha256)
        with self.database.read() as db:
            return {r["owner"]: (r["kind"], r["size_bytes"]) for r in db.execute(query).mappings()}

    # pivots

    def add_pivot(
        self, *, name: str, parent: str, round_id: str, files: Sequence[FileRef], evals_json: str
    ) -> PivotRow:
        """Publish a pivot. Repeating changes nothing; another content under the name is refused."""
        files_json = json.dumps([file.model_dump() for file in files])
        with self._write() as db:
            if known := db.execute(select(PIVOTS).where(PIVOTS.c.name == name)).mappings().first():
                if known["files_json"] != files_json:
                    raise CofuseError("bad_request", f"{name} exists with other files")
            else:
                texts = {"files_json": files_json, "evals_json": evals_json}
                row = {"name": name, "parent": parent, "round_id": round_id, **texts}
                db.execute(insert(PIVOTS).values({**row, "created_unix_ms": now_unix_ms()}))
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
        order = (PIVOTS.c.created_unix_ms, func.length(PIVOTS.c.name), PIVOTS.c.name)
        with self.database.read() as db:
            return [
                pivot_row(row) for row in db.execute(select(PIVOTS).order_by(*order)).mappings()
            ]
