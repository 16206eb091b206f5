"""What the audit chain says of rounds, against what the tables say: I5 and I7 of fsck."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from sqlalchemy import Connection, select

from coordinator.audit import BEGAN, COORDINATOR, STATE, checkpoints, lines
from coordinator.rounds import State
from coordinator.tables import CONTRIBUTIONS, EVENTS
from trust.chain import AuditError, read_record
from trust.checkpoints import Broken, verify_chain

_ASKED: Final = frozenset({"researcher", "operator"})
_ITSELF: Final = frozenset({"coordinator"})
MAY_ENTER: Final[Mapping[State, frozenset[str]]] = {
    State.SUBMITTED: _ASKED,
    State.APPROVED: frozenset({"operator", "coordinator"}),  # itself where approval = "auto"
    State.REJECTED: frozenset({"operator"}),
    State.CANCELLED: _ASKED,
    State.COLLECTING: _ITSELF,
    State.FUSING: _ITSELF,
    State.EVALUATING: _ITSELF,
    State.PUBLISHED: _ITSELF,
    State.FAILED: _ITSELF,
    State.EXPIRED: _ITSELF,
}
"""Roles that may bring a round into a state; a participant may into none."""
Change = tuple[str, str]
"""A round's id, and its new state or `participant status`."""


@dataclass(frozen=True, slots=True)
class Audited:
    """What a chain says, as far as it can be believed."""

    broken: Broken | None
    last: int
    """Number of the last record."""
    after_event: int
    """Events up to this one are older than the chain."""
    told: Sequence[Change]
    """Changes that the story tells of, in order."""
    kept: Sequence[tuple[Change, int]]
    """Changes that the chain holds, with the record's number."""
    unauthorised: Sequence[tuple[int, str]]
    receipts: Sequence[tuple[str, str, str]]
    """Contributions that count: round, participant, sha256."""
    intents: frozenset[tuple[str, str, str]]
    """Contributions that the chain says were committed."""


def read_audit(db: Connection, key: Ed25519PublicKey | None) -> Audited:
    """Read the chain and the story at one moment."""
    found = _Found()
    try:
        verdict = verify_chain(found.watch(lines(db)), checkpoints(db), key)
        broken, last = verdict.broken, verdict.head.seq
    except AuditError as error:
        broken, last = Broken(0, f"a checkpoint: {error}"), 0
    told = _told(db, found.after_event)
    counted = select(CONTRIBUTIONS).where(CONTRIBUTIONS.c.status == "committed")
    fresh = {change for change in told if change[1].endswith(" committed")}
    receipts = [
        (row.round_id, row.participant, row.sha256)
        for row in db.execute(counted)
        if (row.round_id, f"{row.participant} committed") in fresh
    ]
    return Audited(
        broken=broken,
        last=last,
        after_event=found.after_event,
        told=told,
        kept=found.kept,
        unauthorised=found.unauthorised,
        receipts=receipts,
        intents=frozenset(found.intents),
    )


class _Found:
    """What passes by while the chain is verified."""

    def __init__(self) -> None:
        self.after_event = 0
        self.kept: list[tuple[Change, int]] = []
        self.unauthorised: list[tuple[int, str]] = []
        self.intents: set[tuple[str, str, str]] = set()

    def watch(self, raw: Iterator[bytes]) -> Iterator[bytes]:
        """Hand the lines on, once their record is noted."""
        for line in raw:
            yield line  # the verdict comes first: what it refuses is not asked for more
            record = read_record(line)
            try:
                self._note(record)
            except (KeyError, TypeError, ValueError):
                self.unauthorised.append((record["seq"], "it is no record of this program"))

    def _note(self, record: Mapping[str, Any]) -> None:
        act, data, by = record["act"], record["data"], str(record["actor"])
        role = by.removeprefix("cofuse://").partition("/")[0]
        if act == BEGAN:
            self.after_event = int(data["after_event"])
        elif act == STATE:
            state = data["state"]
            self.kept.append(((record["obj"], state), record["seq"]))
            if role not in MAY_ENTER[State(state)]:
                says = f"{by} brought {record['obj']} into {state}, without the right to"
                self.unauthorised.append((record["seq"], says))
        elif act.startswith("contribution."):
            status, name = act.removeprefix("contribution."), data["participant"]
            self.kept.append(((record["obj"], f"{name} {status}"), record["seq"]))
            if by != f"cofuse://participant/{name}":
                says = f"{by} answered {record['obj']} for {name}, without the right to"
                self.unauthorised.append((record["seq"], says))
            if status == "committed":
                self.intents.add((record["obj"], name, data["sha256"]))
        elif act == "pivot.promoted" and role != "operator":
            says = f"{by} promoted {record['obj']}, without the right to"
            self.unauthorised.append((record["seq"], says))
        elif act == "pivot.imported" and role != "operator" and by != COORDINATOR:
            self.unauthorised.append(
                (record["seq"], f"{by} imported {record['obj']}, without right")
            )


def _told(db: Connection, after_event: int) -> list[Change]:
    """Changes of states and contributions as the story tells them."""
    query = (
        select(EVENTS)
        .where(EVENTS.c.seq > after_event, EVENTS.c.kind.in_(("state", "contribution")))
        .order_by(EVENTS.c.seq)
    )
    changes = []
    for row in db.execute(query):
        body = json.loads(row.body_json)
        what = body["state"] if row.kind == "state" else f"{body['participant']} {body['status']}"
        changes.append((row.round_id, what))
    return changes
