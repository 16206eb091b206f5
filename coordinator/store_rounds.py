"""The coordinator's memory of rounds: their states, contributions and stories."""

from collections.abc import Mapping
from typing import Any

from sqlalchemy import select

from coordinator.audit import COORDINATOR
from coordinator.happenings import Committed, Decided, Happening, Reported
from coordinator.queries import (
    find_contributions,
    find_round,
    names_in,
    round_row,
    tell,
)
from coordinator.round_rows import core_of, decide_step, submit, take_step
from coordinator.round_state import Round
from coordinator.rounds import FINAL, CommitRefusedError, Event
from coordinator.tables import EVENTS, ROUNDS, ContributionRow, EventRow, RoundRow
from coordinator.transactions import Transactions
from protos.errors import CofuseError
from trust.ca import Identity, Role


class RoundTables(Transactions):
    """Rounds, what each named participant has done for them, and what has happened to them."""

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

    def advance(
        self, round_id: str, event_: Event, detail: str = "", by: str = COORDINATOR
    ) -> RoundRow:
        """Move a round along its table and write it to its story, in one transaction.

        Raises: IllegalTransitionError when its state does not take the event.
        """
        self.step(round_id, Decided(event_, detail), by)
        return self.round(round_id)

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
