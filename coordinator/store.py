"""The coordinator's memory: rounds, contributions, events, participants, pivots.

Every method is one transaction: what it reports done is on disk.
"""

from collections.abc import Mapping

from sqlalchemy import insert, select, update

from coordinator.audit import anchors, checkpoints, head_of, put_checkpoint, record, take_anchor
from coordinator.clock import now_unix_ms
from coordinator.queries import find_contributions, round_row
from coordinator.round_rows import core_of
from coordinator.store_pivots import PivotTables
from coordinator.store_recurring import RecurringTables
from coordinator.store_rounds import RoundTables
from coordinator.tables import (
    PARTICIPANTS,
    PIVOTS,
    ROUNDS,
    ContributionRow,
    EventRow,
    ParticipantRow,
    PivotRow,
    RoundRow,
)
from coordinator.why import Facts, Seen
from trust.anchors import Anchor
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


class Store(RoundTables, PivotTables, RecurringTables):
    """All tables behind one interface for many threads; `changed` wakes whoever waits for news."""

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
