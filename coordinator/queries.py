"""Statements that several methods of the store share; each runs inside its caller's transaction."""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from sqlalchemy import Connection, insert, select, update

from coordinator.audit import COORDINATOR, record
from coordinator.clock import now_unix_ms
from coordinator.rounds import State
from coordinator.tables import (
    CONTRIBUTIONS,
    EVENTS,
    PIVOTS,
    ROUNDS,
    ContributionRow,
    PivotRow,
    RoundRow,
)
from protos.errors import CofuseError
from protos.messages import FileRef
from trust.chain import Entry
from trust.pivot_manifest import MANIFEST_FILE


def round_number(round_id: str) -> int:
    """The number in a round's id.

    Raises: CofuseError unknown_round when it is none.
    """
    head, _, number = round_id.partition("-")
    # As we write it, and no other spelling: "rnd-07" would be another key of the other tables.
    if head != "rnd" or not re.fullmatch(r"[1-9][0-9]{0,8}", number):
        raise CofuseError("unknown_round", f"found round id {round_id[:60]!r}, wanted rnd-<number>")
    return int(number)


def find_round(db: Connection, round_id: str) -> RoundRow:
    """One round.

    Raises: CofuseError unknown_round.
    """
    query = select(ROUNDS).where(ROUNDS.c.number == round_number(round_id))
    row = db.execute(query).mappings().first()
    if row is None:
        raise CofuseError("unknown_round", f"there is no round {round_id!r}")
    return round_row(row)


def round_row(row: Any) -> RoundRow:
    """A row of ROUNDS as the rest of the program knows it."""
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
        order_json=row["order_json"],
    )


def find_contributions(
    db: Connection, round_id: str, only: str | None = None
) -> list[ContributionRow]:
    """The named participants' parts in a round, by name; of `only` one of them where given."""
    query = (
        select(CONTRIBUTIONS)
        .where(CONTRIBUTIONS.c.round_id == round_id)
        .order_by(CONTRIBUTIONS.c.participant)
    )
    if only is not None:
        query = query.where(CONTRIBUTIONS.c.participant == only)
    found = db.execute(query)
    names = tuple(found.keys())  # once: a mapping makes its own for every row
    return [ContributionRow(**dict(zip(names, row, strict=True))) for row in found]


def names_in(round_id: str) -> Any:
    """A SELECT of the participants that a round names."""
    return select(CONTRIBUTIONS.c.participant).where(CONTRIBUTIONS.c.round_id == round_id)


def update_contribution(round_id: str, participant: str) -> Any:
    """An UPDATE of one participant's part; give it `.values(...)`."""
    return update(CONTRIBUTIONS).where(
        CONTRIBUTIONS.c.round_id == round_id, CONTRIBUTIONS.c.participant == participant
    )


def tell(db: Connection, round_id: str, kind: str, body: Mapping[str, Any]) -> None:
    """Add a line to a round's story."""
    row = {"round_id": round_id, "time_unix_ms": now_unix_ms(), "kind": kind}
    db.execute(insert(EVENTS).values({**row, "body_json": json.dumps(body)}))


def next_pivot_name(db: Connection) -> str:
    """A version no pivot and no round has taken: reserved with the round's own row."""
    taken = [*db.scalars(select(PIVOTS.c.name)), *db.scalars(select(ROUNDS.c.pivot_name))]
    return f"pivot-{max((int(name.split('-')[1]) for name in taken if name), default=0) + 1}"


def pivot_row(row: Any) -> PivotRow:
    """A row of PIVOTS as the rest of the program knows it."""
    return PivotRow(
        name=row["name"],
        parent=row["parent"],
        round_id=row["round_id"],
        files=tuple(FileRef(**file) for file in json.loads(row["files_json"])),
        evals_json=row["evals_json"],
        created_unix_ms=row["created_unix_ms"],
        promotions_needed=row["promotions_needed"],
        promoted_by=tuple(json.loads(row["promotions_json"])),
    )


def put_pivot(
    db: Connection,
    name: str,
    parent: str,
    round_id: str,
    files: Sequence[FileRef],
    evals_json: str,
    by: str = COORDINATOR,
    *,
    needed: int = 0,
) -> None:
    """Store a pivot once; another content under its name is refused.

    Args: needed: operators who must say yes to it. One who brings it, `by`, has said so with that.
    """
    files_json = json.dumps([file.model_dump() for file in files])
    found = db.execute(select(PIVOTS).where(PIVOTS.c.name == name)).mappings().first()
    if found is not None:
        if _content(pivot_row(found).files) != _content(files):
            raise CofuseError("bad_request", f"{name} exists with other files")
        return
    kept = db.scalar(select(ROUNDS.c.number).where(ROUNDS.c.pivot_name == name))
    if kept is not None and f"rnd-{kept}" != round_id:
        raise CofuseError("bad_request", f"{name} is the name of what rnd-{kept} will publish")
    texts = {"files_json": files_json, "evals_json": evals_json}
    row = {"name": name, "parent": parent, "round_id": round_id, **texts}
    role, _, who = by.removeprefix("cofuse://").partition("/")
    said = {who: ""} if needed and role == "operator" else {}
    waits = {"promotions_needed": needed, "promotions_json": json.dumps(said)}
    db.execute(insert(PIVOTS).values({**row, **waits, "created_unix_ms": now_unix_ms()}))
    act = "pivot.published" if round_id else "pivot.imported"
    data = {"parent": parent, "round": round_id, "files": {f.name: f.sha256 for f in files}}
    record(db, Entry(actor=by, act=act, obj=name, data=data))


def _content(files: Sequence[FileRef]) -> set[FileRef]:
    """Files without the manifest, of which each issue is another file."""
    return {file for file in files if file.name != MANIFEST_FILE}


def put_manifest(db: Connection, name: str, manifest: FileRef) -> None:
    """Let a stored pivot have another manifest file; nothing else of it changes."""
    found = db.execute(select(PIVOTS).where(PIVOTS.c.name == name)).mappings().one()
    kept = [file for file in pivot_row(found).files if file.name != MANIFEST_FILE]
    files_json = json.dumps([file.model_dump() for file in (*kept, manifest)])
    db.execute(update(PIVOTS).where(PIVOTS.c.name == name).values({"files_json": files_json}))


def plain(text: str) -> str:
    """Free text as every database takes it: PostgreSQL refuses NUL, and UTF-8 lone surrogates."""
    return (
        text.encode("utf-8", "replace").decode("utf-8").replace("\0", "\N{REPLACEMENT CHARACTER}")
    )
