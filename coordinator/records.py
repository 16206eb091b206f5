"""Everything the coordinator has written down, read at one moment: for fsck and for backups."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from sqlalchemy import Connection, select

from coordinator.queries import pivot_row, round_row
from coordinator.schema import known_schemas, schema_of
from coordinator.store_errors import StoreError
from coordinator.tables import CONTRIBUTIONS, EVENTS, PIVOTS, ROUNDS, PivotRow, RoundRow
from protos.spec import PUBLIC_SETS


class Needed(NamedTuple):
    """A file that must be there."""

    sha256: str
    size_bytes: int | None
    """None where only the digest was written down."""
    what: str
    """For people: whose, and what for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Records:
    """The rows of one moment."""

    rounds: tuple[RoundRow, ...]
    contributions: tuple[Any, ...]
    states: dict[str, list[str]]
    """The states each round went through, by round id."""
    pivots: tuple[PivotRow, ...]

    def needed(self) -> Iterator[Needed]:
        """Every file that a pivot, a receipt or a round refers to; some more than once."""
        for pivot in self.pivots:
            for file in pivot.files:
                yield Needed(file.sha256, file.size_bytes, f"{file.name} of {pivot.name}")
        for part in self.contributions:
            if part.sha256:
                what = f"contribution of {part.participant} to {part.round_id}"
                yield Needed(part.sha256, part.size_bytes, what)
        for row in self.rounds:
            spec = json.loads(row.spec_json)
            for field in PUBLIC_SETS:
                if pinned := spec.get(field):
                    yield Needed(pinned.removeprefix("sha256:"), None, f"{field} of {row.round_id}")


def read_records(db: Connection) -> Records:
    """Read what there is; `db` should see one moment.

    Raises: StoreError when the schema is not this release's.
    """
    if (found := schema_of(db)) != (wanted := known_schemas()[0]):
        raise StoreError(
            f"found schema {found}, wanted {wanted}. Start the coordinator of this release once: "
            "it makes a copy of the database and upgrades it"
        )
    rounds = db.execute(select(ROUNDS).order_by("number")).mappings()
    contributions = select(CONTRIBUTIONS).order_by("round_id", "participant")
    pivots = db.execute(select(PIVOTS).order_by("created_unix_ms")).mappings()
    return Records(
        rounds=tuple(round_row(row) for row in rounds),
        contributions=tuple(db.execute(contributions).all()),
        states=_states(db),
        pivots=tuple(pivot_row(row) for row in pivots),
    )


def _states(db: Connection) -> dict[str, list[str]]:
    states: dict[str, list[str]] = {}
    for row in db.execute(select(EVENTS).where(EVENTS.c.kind == "state").order_by("seq")):
        states.setdefault(row.round_id, []).append(json.loads(row.body_json)["state"])
    return states
