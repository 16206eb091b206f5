"""The coordinator's memory of rounds by the calendar, and of what their experts have learned."""

from dataclasses import replace

from sqlalchemy import insert, select, update

from coordinator.audit import COORDINATOR, actor, record
from coordinator.clock import now_unix_ms
from coordinator.recurring import Recurring, Standing, decide
from coordinator.recurring_rows import (
    find_recurring,
    make_next_round,
    recurring_row,
    situation,
    update_recurring,
)
from coordinator.tables import EXPERTS, RECURRING
from coordinator.transactions import Transactions
from trust.chain import Entry


class RecurringTables(Transactions):
    """Recurring specs and the versions of experts."""

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
