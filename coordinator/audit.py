"""The coordinator's audit chain: records in the database, in the transaction of what they tell of.

So no change is without its record and no record without its change, one commit brings both to disk,
and where the database goes (a backup, another machine) the chain goes along. What rolls it back,
a restored backup too, is seen by the participants, who remember its head.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from sqlalchemy import Connection, func, insert, select, update

from coordinator.clock import now_unix_ms
from coordinator.tables import ANCHORS, AUDIT, AUDIT_CHECKPOINTS, EVENTS
from trust.anchors import Anchor, acceptance, anchor_entry, witness
from trust.audit_files import KEY, PUBLIC_KEY, Chain
from trust.ca import Identity, Role
from trust.chain import START, Entry, Head, make_line
from trust.checkpoints import Checkpoint, read_checkpoint
from trust.keys import load_public

COORDINATOR: Final = Identity("coordinator", "coordinator").uri
"""Who does what nobody asked for: time passed, a fusion ended."""
BEGAN: Final = "audit.began"
STATE: Final = "round.state"
FOLDER: Final = "audit"
"""Of the data folder: the key that signs the chain."""


def actor(role: Role, name: str) -> str:
    """The URI of somebody whose certificate was checked already."""
    return Identity(role, name).uri


def head_of(db: Connection) -> Head:
    """The last record."""
    row = db.execute(select(AUDIT.c.seq, AUDIT.c.h).order_by(AUDIT.c.seq.desc()).limit(1)).first()
    return Head(*row) if row is not None else START


def record(db: Connection, *entries: Entry) -> None:
    """Append to the chain inside the caller's transaction, which must be the only writer's."""
    head, rows = head_of(db), []
    for entry in entries:
        line, head = make_line(entry, head, now_unix_ms())
        rows.append({"seq": head.seq, "h": head.h, "line": line.decode()})
    if rows:
        db.execute(insert(AUDIT), rows)


def begin(db: Connection) -> None:
    """Begin the chain of a database that has none; what was told before stays outside of it."""
    if head_of(db) == START:
        told = db.scalar(select(func.max(EVENTS.c.seq))) or 0
        record(db, Entry(actor=COORDINATOR, act=BEGAN, obj="events", data={"after_event": told}))


def record_state(db: Connection, by: str, round_id: str, state: str, why: str) -> None:
    """A round is in another state now."""
    record(db, Entry(actor=by, act=STATE, obj=round_id, why=why, data={"state": str(state)}))


def record_part(db: Connection, by: str, round_id: str, status: str, **data: Any) -> None:
    """A participant's part in a round has got another status."""
    record(db, Entry(actor=by, act=f"contribution.{status}", obj=round_id, data=data))


def anchors(db: Connection) -> dict[str, Anchor]:
    """The last head that was seen of each participant's chain."""
    return {
        row.participant: Anchor(row.seq, row.head, row.noted_unix_ms, row.alarm)
        for row in db.execute(select(ANCHORS))
    }


def take_anchor(db: Connection, participant: str, head: Head) -> Anchor:
    """Remember the head of a participant's chain; return what is remembered from now on."""
    row = db.execute(select(ANCHORS).where(ANCHORS.c.participant == participant)).first()
    before = Anchor(row.seq, row.head, row.noted_unix_ms, row.alarm) if row is not None else None
    after, is_due = witness(before, head, now_unix_ms())
    if after == before:
        return after
    values = {name: getattr(after, name) for name in ("seq", "head", "noted_unix_ms", "alarm")}
    if before is None:
        db.execute(insert(ANCHORS).values(participant=participant, **values))
    else:
        key = ANCHORS.c.participant == participant
        db.execute(update(ANCHORS).where(key).values(values))
    if is_due:
        record(db, anchor_entry(COORDINATOR, participant, before, after))
    return after


def accept_anchor(db: Connection, participant: str, why: str) -> bool:
    """End the alarm about a participant's chain; return whether there was one."""
    before = anchors(db).get(participant)
    if before is None or not before.alarm:
        return False
    record(db, acceptance(COORDINATOR, participant, before, why))
    db.execute(update(ANCHORS).where(ANCHORS.c.participant == participant).values(alarm=""))
    return True


def lines(db: Connection) -> Iterator[bytes]:
    """Every record as it was written, in order."""
    query = select(AUDIT.c.line).order_by(AUDIT.c.seq)
    for (line,) in db.execute(query.execution_options(yield_per=1000)):
        yield line.encode("utf-8", "replace")


def checkpoints(db: Connection) -> list[Checkpoint]:
    """What was signed, oldest first.

    Raises: AuditError.
    """
    query = select(AUDIT_CHECKPOINTS.c.line).order_by(AUDIT_CHECKPOINTS.c.seq)
    return [read_checkpoint(line.encode("utf-8", "replace")) for (line,) in db.execute(query)]


def put_checkpoint(db: Connection, made: Checkpoint) -> None:
    """Keep a signature; a head is signed once."""
    known = select(AUDIT_CHECKPOINTS.c.seq).where(AUDIT_CHECKPOINTS.c.seq == made.seq)
    if db.scalar(known) is None:
        db.execute(insert(AUDIT_CHECKPOINTS).values(seq=made.seq, line=made.line().decode()))


def chain_of(db: Connection, data_dir: Path) -> Chain:
    """The chain for verifying and exporting, while `db` is open.

    Raises: AuditError, KeyFileError, OSError.
    """
    private = data_dir / FOLDER / KEY
    return Chain(lambda: lines(db), checkpoints(db), audit_key(data_dir), private)


def audit_key(data_dir: Path) -> Ed25519PublicKey | None:
    """The key that the chain is signed with; None when it was never signed here.

    Raises: KeyFileError, OSError.
    """
    path = data_dir / FOLDER / PUBLIC_KEY
    return load_public(path) if path.exists() else None
