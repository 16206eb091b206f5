"""How a step of the round core becomes rows; inside the caller's transaction."""

import json
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from sqlalchemy import Connection, insert, select, update

from coordinator.audit import COORDINATOR, actor, record_part, record_state
from coordinator.clock import now_unix_ms
from coordinator.happenings import Happening
from coordinator.queries import (
    find_contributions,
    find_round,
    next_pivot_name,
    plain,
    round_number,
    tell,
    update_contribution,
)
from coordinator.round_state import Part, Round
from coordinator.rounds import State, step
from coordinator.tables import CONTRIBUTIONS, ROUNDS, ContributionRow, RoundRow
from trust.ca import Identity


def submit(
    db: Connection,
    request_id: str,
    by: Identity,
    spec_json: str,
    deadline_ms: int,
    order_json: str = "",
) -> str:
    """Store a new round, or find the one this request made before; return its id."""
    known = db.scalar(select(ROUNDS.c.number).where(ROUNDS.c.request_id == request_id))
    if known is not None:
        return f"rnd-{known}"
    created = now_unix_ms()
    values = {
        "request_id": request_id,
        "submitted_by": by.name,
        "spec_json": spec_json,
        "state": State.SUBMITTED,
        "created_unix_ms": created,
        "deadline_unix_ms": created + deadline_ms,
        "detail": "",
        "pivot_name": "",
        "order_json": order_json,
    }
    number = db.execute(insert(ROUNDS).values(values)).inserted_primary_key[0]  # type: ignore[index]
    tell(db, f"rnd-{number}", "state", {"state": State.SUBMITTED, "detail": ""})
    record_state(db, by.uri, f"rnd-{number}", State.SUBMITTED, "")
    return f"rnd-{number}"


def core_of(row: RoundRow, parts: Sequence[ContributionRow]) -> Round:
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


def decide_step(db: Connection, round_id: str, happening: Happening) -> tuple[Round, Round]:
    """The round before and after. For a word of one participant its row alone is read."""
    only = getattr(happening, "participant", None)
    before = core_of(find_round(db, round_id), find_contributions(db, round_id, only))
    return before, step(before, happening, now_unix_ms())[0]


def take_step(db: Connection, round_id: str, happening: Happening, by: str = COORDINATOR) -> Round:
    """Let a happening change a round; write what changed, its story, and who made it happen."""
    before, after = decide_step(db, round_id, happening)
    if after != before:
        _save_round(db, before, after, by)
        old = {part.participant: part for part in before.parts}
        changed = [part for part in after.parts if part != old.get(part.participant)]
        for part in changed:
            if part.participant in old:
                _save_part(db, after, old[part.participant], part)
        new = [_part_values(after, part) for part in changed if part.participant not in old]
        if new:
            db.execute(insert(CONTRIBUTIONS), new)
    return after


def _save_round(db: Connection, before: Round, after: Round, by: str) -> None:
    names = ("state", "detail", "attempt", "lease_unix_ms", "losses")
    changes = {n: getattr(after, n) for n in names if getattr(after, n) != getattr(before, n)}
    if "detail" in changes:
        changes["detail"] = plain(after.detail)
    if after.state is not before.state:
        tell(db, after.round_id, "state", {"state": after.state, "detail": after.detail})
        record_state(db, by, after.round_id, after.state, after.detail)
        if after.state is State.FUSING:
            changes["pivot_name"] = next_pivot_name(db)
    elif after.attempt > before.attempt:
        detail = f"fusion worker {after.attempt} follows. {after.detail}".strip()
        tell(db, after.round_id, "note", {"detail": detail})
    if changes:
        number = round_number(after.round_id)
        db.execute(update(ROUNDS).where(ROUNDS.c.number == number).values(changes))


def _part_values(round_: Round, part: Part) -> dict[str, Any]:
    values = {field.name: getattr(part, field.name) for field in fields(Part)}
    return {"round_id": round_.round_id, **values, "detail": plain(part.detail)}


def _save_part(db: Connection, round_: Round, before: Part, after: Part) -> None:
    row = _part_values(round_, after)
    db.execute(update_contribution(round_.round_id, after.participant).values(row))
    told: dict[str, Any] = {"participant": after.participant}
    if after.status != before.status:
        by = actor("participant", after.participant)
        made = {"sha256": after.sha256, "size_bytes": after.size_bytes} if after.sha256 else {}
        record_part(db, by, round_.round_id, after.status, **told, **made)
    if after.status == "committed" != before.status:
        told |= {"status": "committed", "size_bytes": after.size_bytes}
        tell(db, round_.round_id, "contribution", told)
    elif after.status != before.status:
        told |= {"status": after.status, "detail": after.detail}
        tell(db, round_.round_id, "contribution", told)
    elif after.attempt > before.attempt:
        detail = f"is asked again, attempt {after.attempt}. {after.detail}".strip()
        tell(db, round_.round_id, "note", {**told, "detail": detail})
