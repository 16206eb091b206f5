"""The coordinator's memory: rounds, contributions, events, participants, pivots.

Every method is one transaction: what it reports done is on disk.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from threading import Condition
from typing import Any

from sqlalchemy import Connection, delete, func, insert, select, update

from coordinator.audit import (
    COORDINATOR,
    actor,
    anchors,
    begin,
    checkpoints,
    head_of,
    put_checkpoint,
    record,
    take_anchor,
)
from coordinator.clock import now_unix_ms
from coordinator.database import Database, open_database
from coordinator.happenings import Committed, Decided, Evaluated, Happening, Reported
from coordinator.metrics import DB_COMMIT_SECONDS
from coordinator.migrate import migrate
from coordinator.queries import (
    find_contributions,
    find_round,
    names_in,
    next_pivot_name,
    pivot_row,
    put_manifest,
    put_pivot,
    round_row,
    tell,
    update_contribution,
)
from coordinator.recurring import Recurring, Standing, decide
from coordinator.recurring_rows import (
    find_recurring,
    make_next_round,
    recurring_row,
    situation,
    update_recurring,
)
from coordinator.round_rows import core_of, decide_step, submit, take_step
from coordinator.round_state import Round
from coordinator.rounds import FINAL, CommitRefusedError, Event
from coordinator.tables import (
    ARTIFACTS,
    CONTRIBUTIONS,
    EVENTS,
    EXPERTS,
    PARTICIPANTS,
    PIVOTS,
    RECURRING,
    ROUNDS,
    ContributionRow,
    EventRow,
    ParticipantRow,
    PivotRow,
    RoundRow,
)
from coordinator.why import Facts, Seen
from protos.errors import CofuseError
from protos.messages import FileRef
from trust.anchors import Anchor
from trust.ca import Identity, Role
from trust.chain import Entry, Head
from trust.checkpoints import Checkpoint

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
            with self.database.write() as db:
                begin(db)
        except BaseException:
            self.database.close()
            raise
        self.changed = Condition()
        self.promotions_needed = 0
        """Operators who must say yes to a pivot from now on (coordinator/promotion.py)."""

    @classmethod
    def at(cls, path: Path) -> "Store":
        """Open or make the SQLite file `path`."""
        return cls(f"sqlite:///{path}")

    def close(self) -> None:
        """Let go of the database and of the lead."""
        self.database.close()

    @contextmanager
    def _write(self) -> Iterator[Connection]:
        with DB_COMMIT_SECONDS.time(), self.database.write() as connection:
            yield connection
        with self.changed:
            self.changed.notify_all()

    def check_writable(self) -> None:
        """Take the writers' turn and give it back, changing nothing.

        Raises: CofuseError storage_full or store_unavailable when the database takes no writer.
        """
        with self._write():
            pass

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
        self,
        *,
        request_id: str,
        submitted_by: str,
        spec_json: str,
        deadline_ms: int,
        role: Role = "researcher",
        order_json: str = "",
    ) -> RoundRow:
        """Store a new round, or return the one this request made before."""
        by = Identity(role, submitted_by)
        with self._write() as db:
            unique = f"{submitted_by}/{request_id}"
            round_id = submit(db, unique, by, spec_json, deadline_ms, order_json)
        return self.round(round_id)

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

    def step(self, round_id: str, happening: Happening, by: str = COORDINATOR) -> Round:
        """Let a happening change a round as coordinator/rounds.py says, in one transaction.

        What changes nothing is not written, so asking often costs a reading only.
        Args: by: URI of whoever decided it, for the audit chain.

        Raises: IllegalTransitionError, CommitRefusedError: then nothing has changed.
        """
        with self.database.read() as db:
            before, after = decide_step(db, round_id, happening)
        if after == before:
            return after
        with self._write() as db:
            return take_step(db, round_id, happening, by)

    def core(self, round_id: str) -> Round:
        """One round as the rules of coordinator/rounds.py see it, with every part.

        Raises: CofuseError unknown_round.
        """
        with self.database.read() as db:
            return core_of(find_round(db, round_id), find_contributions(db, round_id))

    def facts(self, seen: Mapping[str, Seen]) -> Facts:
        """What coordinator/why.py explains names from, with what is seen of the participants."""
        with self.database.snapshot() as db:
            rows = [round_row(r) for r in db.execute(select(ROUNDS)).mappings()]
            pivots = db.execute(select(PIVOTS.c.name, PIVOTS.c.round_id))
            kept = {row.pivot_name: row.round_id for row in rows if row.pivot_name}
            return Facts(
                rounds=[core_of(row, find_contributions(db, row.round_id)) for row in rows],
                seen=seen,
                pivots={**kept, **{name: by for name, by in pivots}},
                recurring=self.recurring(),
            )

    def advance(
        self, round_id: str, event_: Event, detail: str = "", by: str = COORDINATOR
    ) -> RoundRow:
        """Move a round along its table and write it to its story, in one transaction.

        Raises: IllegalTransitionError when its state does not take the event.
        """
        self.step(round_id, Decided(event_, detail), by)
        return self.round(round_id)

    # contributions

    def assign(self, round_id: str, participants: Sequence[str]) -> list[ContributionRow]:
        """Make or re-issue the assignments still open: each gets a new attempt number."""
        with self._write() as db:
            known = {row.participant: row for row in find_contributions(db, round_id)}
            for name in participants:
                if name not in known:
                    empty = {"sha256": "", "size_bytes": 0, "committed_unix_ms": 0}
                    texts = {"detail": "", "report_json": "", "lease_unix_ms": 0}
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

    def named(self, round_id: str) -> frozenset[str]:
        """The participants that a round names."""
        with self.database.read() as db:
            return frozenset(db.scalars(names_in(round_id)))

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
        with self.database.read() as db:
            return find_contributions(db, round_id, only=participant)[0]

    def report(self, round_id: str, participant: str, status: str, detail: str, body: str) -> None:
        """Keep a participant's report; a refusal or failure ends its part unless committed."""
        self.step(round_id, Reported(participant, None, status, detail, body))

    # audit

    def audit_head(self) -> Head:
        """The last record of the audit chain."""
        with self.database.read() as db:
            return head_of(db)

    def record(self, *entries: Entry) -> None:
        """Append to the audit chain what no table tells; no news for those who wait for some."""
        with self.database.write() as db:
            record(db, *entries)

    def take_anchor(self, participant: str, head: Head) -> Anchor:
        """Remember the head of a participant's audit chain; it is on disk when this returns."""
        with self.database.write() as db:
            return take_anchor(db, participant, head)

    def anchors(self) -> dict[str, Anchor]:
        """The last head that was seen of each participant's chain."""
        with self.database.read() as db:
            return anchors(db)

    def signed_seq(self) -> int:
        """The last record that a checkpoint was made for; 0: none."""
        with self.database.read() as db:
            return max((made.seq for made in checkpoints(db)), default=0)

    def sign_audit(self, made: Checkpoint) -> None:
        """Keep a checkpoint."""
        with self.database.write() as db:  # no news for those who wait for some
            put_checkpoint(db, made)

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

    def news(self, after_seq: int = 0) -> list[tuple[str, EventRow]]:
        """Every round's changes of state and contributions after `after_seq`, oldest first.

        Returns: (round id, event) pairs.
        """
        query = (
            select(EVENTS)
            .where(EVENTS.c.seq > after_seq, EVENTS.c.kind.in_(("state", "contribution")))
            .order_by(EVENTS.c.seq)
        )
        with self.database.read() as db:
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
            key = (ARTIFACTS.c.sha256 == sha256) & (ARTIFACTS.c.owner == owner)
            if db.execute(select(ARTIFACTS).where(key)).first() is None:
                row = {"sha256": sha256, "owner": owner, "kind": kind, "size_bytes": size_bytes}
                db.execute(insert(ARTIFACTS).values(row))

    def artifact_kinds(self, sha256: str) -> dict[str, tuple[str, int]]:
        """Owner -> (kind, size) of one file."""
        query = select(ARTIFACTS).where(ARTIFACTS.c.sha256 == sha256)
        with self.database.read() as db:
            return {r["owner"]: (r["kind"], r["size_bytes"]) for r in db.execute(query).mappings()}

    def forget_artifact(self, sha256: str) -> None:
        """Forget who put a file that is gone."""
        with self._write() as db:
            db.execute(delete(ARTIFACTS).where(ARTIFACTS.c.sha256 == sha256))

    # pivots

    def add_pivot(
        self,
        *,
        name: str,
        parent: str,
        round_id: str,
        files: Sequence[FileRef],
        evals_json: str,
        by: str = COORDINATOR,
    ) -> PivotRow:
        """Publish a pivot. Repeating changes nothing; another content under the name is refused."""
        with self._write() as db:
            put_pivot(
                db, name, parent, round_id, files, evals_json, by, needed=self.promotions_needed
            )
        return self.pivot(name)

    def publish(
        self, round_id: str, attempt: int, *, parent: str, files: Sequence[FileRef], evals_json: str
    ) -> Round:
        """End a round with its pivot, both in one transaction: no half of it is ever visible.

        Raises: IllegalTransitionError when the round has ended, or another worker has it.
        """
        with self._write() as db:
            after = take_step(db, round_id, Evaluated(attempt))
            name = find_round(db, round_id).pivot_name
            put_pivot(db, name, parent, round_id, files, evals_json, needed=self.promotions_needed)
            return after

    def replace_manifest(self, name: str, manifest: FileRef) -> None:
        """Let a pivot have a manifest that was issued again."""
        with self._write() as db:
            put_manifest(db, name, manifest)

    def free_pivot_name(self) -> str:
        """A name that no pivot and no round has taken yet."""
        with self.database.read() as db:
            return next_pivot_name(db)

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

    # recurring

    def add_recurring(
        self,
        *,
        request_id: str,
        submitted_by: str,
        spec_json: str,
        due_unix_ms: int,
        order_json: str = "",
    ) -> Recurring:
        """Store a recurring spec, or return the one this request made before."""
        unique = f"{submitted_by}/{request_id}"
        with self._write() as db:
            found = db.scalar(select(RECURRING.c.number).where(RECURRING.c.request_id == unique))
            if found is None:
                values = {
                    "request_id": unique,
                    "submitted_by": submitted_by,
                    "spec_json": spec_json,
                    "state": Standing.ACTIVE,
                    "due_unix_ms": due_unix_ms,
                    "last_round_id": "",
                    "detail": "",
                    "order_json": order_json,
                }
                found = db.execute(insert(RECURRING).values(values)).inserted_primary_key[0]  # type: ignore[index]
                by = actor("operator", submitted_by)
                record(db, Entry(actor=by, act="recurring.started", obj=f"rec-{found}"))
            return find_recurring(db, f"rec-{found}")

    def recurring(self) -> list[Recurring]:
        """All recurring specs, oldest first."""
        with self.database.read() as db:
            rows = db.execute(select(RECURRING).order_by(RECURRING.c.number)).mappings()
            return [recurring_row(row) for row in rows]

    def stop_recurring(self, recurring_id: str, detail: str, by: str = COORDINATOR) -> Recurring:
        """Make no more rounds of it; one that is open goes on. Repeating changes nothing.

        Raises: CofuseError unknown_recurring.
        """
        with self._write() as db:
            if find_recurring(db, recurring_id).state is Standing.ACTIVE:
                changes = {"state": Standing.STOPPED, "detail": detail}
                db.execute(update_recurring(recurring_id).values(changes))
                record(db, Entry(actor=by, act="recurring.stopped", obj=recurring_id))
            return find_recurring(db, recurring_id)

    def repeat(self, recurring_id: str) -> str:
        """Make the next round of a recurring spec if its time has come, in one transaction.

        Returns: the round's id; empty when none was made.
        """
        with self._write() as db:
            before = find_recurring(db, recurring_id)
            after, is_time = decide(before, situation(db, before), now_unix_ms())
            round_id = ""
            if is_time:
                round_id = make_next_round(db, before)
                after = replace(after, last_round_id=round_id)
            if after != before:
                names = ("due_unix_ms", "last_round_id", "detail")
                changes = {name: getattr(after, name) for name in names}
                db.execute(update_recurring(recurring_id).values(changes))
            return round_id

    def note_expert(self, participant: str, version: str) -> None:
        """Remember since when a participant's expert is as it is; the same version is no news."""
        key = EXPERTS.c.participant == participant
        with self.database.read() as db:
            if db.scalar(select(EXPERTS.c.version).where(key)) == version:
                return
        with self._write() as db:
            values = {"version": version, "changed_unix_ms": now_unix_ms()}
            if not db.execute(update(EXPERTS).where(key).values(values)).rowcount:
                db.execute(insert(EXPERTS).values({"participant": participant, **values}))
