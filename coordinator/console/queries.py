"""What pages read that no service's answer holds: each function is one look at the database."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from cryptography import x509
from sqlalchemy import func, select

from coordinator.queries import round_row
from coordinator.rounds import FINAL, State
from coordinator.store import RoundRow, Store
from coordinator.tables import (
    AUDIT,
    CONTRIBUTIONS,
    EVENTS,
    EXPERTS,
    INVITATIONS,
    REVOCATIONS,
    ROUNDS,
)

_NEWEST: Final = 500
"""Receipts of a page."""
_AT_ONCE: Final = 1000
"""Lines of the audit chain read in one look."""

Span = tuple[str, int, int]
"""A state or status, from when until when, unix ms."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundLine:
    """One round in the list."""

    row: RoundRow
    spec: Mapping[str, Any]
    committed: int
    spans: Sequence[Span]


def round_lines(
    store: Store, now_ms: int, *, states: Sequence[State] = (), limit: int = 500
) -> tuple[list[RoundLine], int]:
    """The newest rounds in some states (none: in any), newest first, and how many there are."""
    query = select(ROUNDS)
    if states:
        query = query.where(ROUNDS.c.state.in_(states))
    with store.database.snapshot() as db:
        total = db.scalar(select(func.count()).select_from(query.subquery())) or 0
        newest = query.order_by(ROUNDS.c.number.desc()).limit(limit)
        rows = [round_row(row) for row in db.execute(newest).mappings()]
        ids = [row.round_id for row in rows]
        count = (
            select(CONTRIBUTIONS.c.round_id, func.count())
            .where(CONTRIBUTIONS.c.status == "committed", CONTRIBUTIONS.c.round_id.in_(ids))
            .group_by(CONTRIBUTIONS.c.round_id)
        )
        counts = {round_id: committed for round_id, committed in db.execute(count)}
        changes: dict[str, list[tuple[str, int]]] = {}
        told = select(EVENTS.c.round_id, EVENTS.c.time_unix_ms, EVENTS.c.body_json).where(
            EVENTS.c.kind == "state", EVENTS.c.round_id.in_(ids)
        )
        for round_id, at, body in db.execute(told.order_by(EVENTS.c.seq)):
            changes.setdefault(round_id, []).append((json.loads(body)["state"], at))
    lines = [
        RoundLine(
            row=row,
            spec=json.loads(row.spec_json),
            committed=counts.get(row.round_id, 0),
            spans=spans(changes.get(row.round_id, []), now_ms),
        )
        for row in rows
    ]
    return lines, total


def spans(changes: Sequence[tuple[str, int]], now_ms: int) -> list[Span]:
    """How long each state lasted; the last one until now, or a moment when it is final. Pure."""
    ends = [at for _, at in changes[1:]]
    if changes:
        state, at = changes[-1]
        ends.append(at if state in FINAL else max(at, now_ms))
    return [(state, at, end) for (state, at), end in zip(changes, ends, strict=True)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Receipt:
    """A contribution that arrived."""

    round_id: str
    participant: str
    kind: str
    purpose: str
    size_bytes: int
    sha256: str
    committed_unix_ms: int


def receipts(store: Store) -> tuple[list[Receipt], dict[str, int]]:
    """The newest receipts, and the bytes that ever came from each participant."""
    held = CONTRIBUTIONS.c.status == "committed"
    newest = (
        select(CONTRIBUTIONS)
        .where(held)
        .order_by(CONTRIBUTIONS.c.committed_unix_ms.desc())
        .limit(_NEWEST)
    )
    sums = (
        select(CONTRIBUTIONS.c.participant, func.sum(CONTRIBUTIONS.c.size_bytes))
        .where(held)
        .group_by(CONTRIBUTIONS.c.participant)
    )
    with store.database.snapshot() as db:
        rows = db.execute(newest).mappings().all()
        numbers = {int(row["round_id"].partition("-")[2]) for row in rows}
        texts = select(ROUNDS.c.number, ROUNDS.c.spec_json).where(ROUNDS.c.number.in_(numbers))
        specs = {f"rnd-{number}": json.loads(text) for number, text in db.execute(texts)}
        totals = {name: int(total) for name, total in db.execute(sums)}
    found = [
        Receipt(
            round_id=row["round_id"],
            participant=row["participant"],
            kind=specs[row["round_id"]].get("kind", ""),
            purpose=specs[row["round_id"]].get("purpose", "general"),
            size_bytes=row["size_bytes"],
            sha256=row["sha256"],
            committed_unix_ms=row["committed_unix_ms"],
        )
        for row in rows
    ]
    return found, totals


def released(store: Store, participant: str, since_unix_ms: int) -> list[tuple[int, str, int]]:
    """What came from one participant since then: when, for which round, bytes; oldest first."""
    query = (
        select(
            CONTRIBUTIONS.c.committed_unix_ms, CONTRIBUTIONS.c.round_id, CONTRIBUTIONS.c.size_bytes
        )
        .where(
            CONTRIBUTIONS.c.status == "committed",
            CONTRIBUTIONS.c.participant == participant,
            CONTRIBUTIONS.c.committed_unix_ms > since_unix_ms,
        )
        .order_by(CONTRIBUTIONS.c.committed_unix_ms)
    )
    with store.database.read() as db:
        return [(at, round_id, size) for at, round_id, size in db.execute(query)]


def inputs(store: Store) -> dict[str, list[str]]:
    """The participants whose contributions were taken, by round."""
    query = (
        select(CONTRIBUTIONS.c.round_id, CONTRIBUTIONS.c.participant)
        .where(CONTRIBUTIONS.c.status == "committed")
        .order_by(CONTRIBUTIONS.c.participant)
    )
    found: dict[str, list[str]] = {}
    with store.database.read() as db:
        for round_id, participant in db.execute(query):
            found.setdefault(round_id, []).append(participant)
    return found


def audit_tail(store: Store, *, before: int = 0, limit: int = 200) -> list[dict[str, Any]]:
    """The last records of the audit chain before number `before` (0: the newest), newest first."""
    query = select(AUDIT.c.line).order_by(AUDIT.c.seq.desc()).limit(limit)
    if before:
        query = query.where(AUDIT.c.seq < before)
    with store.database.read() as db:
        return [json.loads(line) for line in db.scalars(query)]


def audit_lines(store: Store, after: int) -> list[tuple[int, str]]:
    """Records of the audit chain after number `after` as they were written, with their numbers."""
    query = select(AUDIT.c.seq, AUDIT.c.line).where(AUDIT.c.seq > after).order_by(AUDIT.c.seq)
    with store.database.read() as db:
        return [(seq, line) for seq, line in db.execute(query.limit(_AT_ONCE))]


def experts(store: Store) -> dict[str, int]:
    """Since when each participant's expert is as it is, unix ms."""
    with store.database.read() as db:
        found = db.execute(select(EXPERTS.c.participant, EXPERTS.c.changed_unix_ms))
        return {name: at for name, at in found}


def certificate_ends(store: Store) -> dict[str, int]:
    """When the certificates that invitations became end, by role/name, unix ms; the latest each."""
    query = select(INVITATIONS.c.role, INVITATIONS.c.name, INVITATIONS.c.certificate_pem)
    found: dict[str, int] = {}
    with store.database.read() as db:
        for role, name, pem in db.execute(query.where(INVITATIONS.c.used_unix_ms > 0)):
            ends = x509.load_pem_x509_certificate(pem.encode()).not_valid_after_utc
            key = f"{role}/{name}"
            found[key] = max(found.get(key, 0), int(ends.timestamp() * 1000))
    return found


def open_invitations(store: Store, now_ms: int) -> list[Mapping[str, Any]]:
    """Invitations that may still be used, the soonest to end first."""
    query = (
        select(
            INVITATIONS.c.invitation,
            INVITATIONS.c.role,
            INVITATIONS.c.name,
            INVITATIONS.c.expires_unix_ms,
        )
        .where(INVITATIONS.c.used_unix_ms == 0, INVITATIONS.c.expires_unix_ms > now_ms)
        .order_by(INVITATIONS.c.expires_unix_ms)
    )
    with store.database.read() as db:
        return [dict(row) for row in db.execute(query).mappings()]


def revocation_list(store: Store) -> list[Mapping[str, Any]]:
    """Everything that was revoked, newest first."""
    query = select(REVOCATIONS).order_by(REVOCATIONS.c.number.desc())
    with store.database.read() as db:
        return [dict(row) for row in db.execute(query).mappings()]
