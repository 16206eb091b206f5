"""Recurring specs as rows, and the rounds they make; inside the caller's transaction."""

from typing import Any

from sqlalchemy import Connection, func, select, update

from coordinator.happenings import Decided
from coordinator.queries import find_round, pivot_row
from coordinator.recurring import Recurring, Situation, Standing, newest_pivot
from coordinator.round_rows import submit, take_step
from coordinator.rounds import FINAL, Event
from coordinator.tables import CONTRIBUTIONS, EXPERTS, PIVOTS, RECURRING
from protos.errors import CofuseError
from protos.recurring import RecurringSpec
from trust.ca import Identity


def make_next_round(db: Connection, recurring: Recurring) -> str:
    """Submit and approve the round: whoever started the recurring spec approved its rounds."""
    spec = RecurringSpec.model_validate_json(recurring.spec_json).round
    rows = db.execute(select(PIVOTS).order_by(PIVOTS.c.created_unix_ms)).mappings()
    pivots = [pivot_row(row) for row in rows]
    waiting = {row.name for row in pivots if row.waits_for}
    pivot = newest_pivot(spec.pivot, {row.name: row.parent for row in pivots}, waiting)
    by = Identity("operator", recurring.submitted_by)  # no other role may start one
    round_id = submit(
        db,
        f"{recurring.recurring_id}/{recurring.due_unix_ms}",
        by,
        spec.model_copy(update={"pivot": pivot}).model_dump_json(),
        int(spec.deadline_minutes * 60_000),
        recurring.order_json,
    )
    take_step(db, round_id, Decided(Event.APPROVE, f"by {recurring.recurring_id}"), by.uri)
    return round_id


def situation(db: Connection, recurring: Recurring) -> Situation:
    """What decides whether the next round is made."""
    last = recurring.last_round_id
    changed = db.execute(select(EXPERTS.c.participant, EXPERTS.c.changed_unix_ms))
    fused = db.execute(
        select(CONTRIBUTIONS.c.participant, func.max(CONTRIBUTIONS.c.committed_unix_ms))
        .where(
            CONTRIBUTIONS.c.status == "committed",
            CONTRIBUTIONS.c.round_id.in_(select(PIVOTS.c.round_id)),
        )
        .group_by(CONTRIBUTIONS.c.participant)
    )
    return Situation(
        last_is_open=bool(last) and find_round(db, last).state not in FINAL,
        changed_unix_ms={name: at for name, at in changed},
        fused_unix_ms={name: at for name, at in fused},
    )


def find_recurring(db: Connection, recurring_id: str) -> Recurring:
    """One recurring spec.

    Raises: CofuseError unknown_recurring.
    """
    head, _, number = recurring_id.partition("-")
    if head == "rec" and number.isascii() and number.isdigit() and len(number) < 10:
        query = select(RECURRING).where(RECURRING.c.number == int(number))
        if row := db.execute(query).mappings().first():
            return recurring_row(row)
    raise CofuseError("unknown_recurring", f"there is no recurring spec {recurring_id[:60]!r}")


def recurring_row(row: Any) -> Recurring:
    """A row of RECURRING as the rest of the program knows it."""
    names = ("submitted_by", "spec_json", "due_unix_ms", "last_round_id", "detail", "order_json")
    return Recurring(
        recurring_id=f"rec-{row['number']}",
        state=Standing(row["state"]),
        **{name: row[name] for name in names},
    )


def update_recurring(recurring_id: str) -> Any:
    """An UPDATE of one recurring spec; give it `.values(...)`."""
    number = int(recurring_id.removeprefix("rec-"))
    return update(RECURRING).where(RECURRING.c.number == number)
