"""Does everything the coordinator promised still hold? Reads only, also while it serves.

The invariants have the names of docs/operator.md. Those about things that this release does not
write down yet are named as not checked, never passed over in silence.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise, zip_longest
from typing import Final

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from coordinator.artifacts import Artifacts
from coordinator.database import Database
from coordinator.fsck_audit import Audited, Change, read_audit
from coordinator.fsck_pivots import unsigned
from coordinator.records import Needed, Records, read_records
from coordinator.rounds import FINAL, TRANSITIONS, State
from protos.chunks import sha256_of

GRACE_MS: Final = 30_000
"""How long after its deadline a round may take to end."""
CHECKED: Final = {
    "I0": "the database is sound",
    "I1": "every file that a receipt, a pivot or a round names is there, with its bytes",
    "I2": "no contribution is counted twice in a round, and no round made two pivots",
    "I3": "pivots descend from older ones, each made by the round that names it, and signed",
    "I4": "every round ends by its deadline and 30 s",
    "I5": "the audit chain is unbroken, and holds an intent for every receipt",
    "I7": "every state change is in the round's story, legal, and audited with who may do it",
}
UNCHECKED: Final = {
    "I6": "privacy budgets are the participants' own: cofuse participant fsck",
    "I8": "what lies in the clear is the participants' own: cofuse participant fsck",
}
LASTING: Final = frozenset({"I0", "I1", "I2", "I3", "I5", "I7"})
"""Those that time does not mend: a round past its deadline ends when the coordinator starts."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One promise that does not hold."""

    invariant: str
    says: str
    do: str


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a check found, and how much it looked at."""

    findings: tuple[Finding, ...]
    rounds: int
    pivots: int
    files: int
    """Different files that must be there."""
    size_bytes: int
    """Of those that are."""

    @property
    def lasting(self) -> tuple[Finding, ...]:
        """What will not mend by itself."""
        return tuple(f for f in self.findings if f.invariant in LASTING)


def fsck(
    database: Database,
    artifacts: Artifacts,
    now_unix_ms: int,
    *,
    hashes: bool = True,
    audit_key: Ed25519PublicKey | None = None,
    pivot_signer: Ed25519PublicKey | None = None,
) -> Verdict:
    """Check every invariant that the tables allow.

    Args: hashes: read every file whole; else only look for it and its size. audit_key: what signs
        the audit chain; without it only the chain itself is checked. pivot_signer: what signs the
        pivots; without it their manifests are not looked at.
    Raises: StoreError when the schema is not this release's.
    """
    with database.read() as connection:
        damage = database.dialect.damage(connection)
    if damage:  # what it would read could not be believed
        return Verdict((Finding("I0", damage, _RESTORE),), 0, 0, 0, 0)
    with database.snapshot() as connection:
        records = read_records(connection)
        audited = read_audit(connection, audit_key)
    sizes: dict[str, int] = {}
    findings = [
        *_files(records, artifacts, sizes, hashes=hashes),
        *_counted_once(records),
        *_lineage(records),
        *(_manifests(records, artifacts, pivot_signer) if pivot_signer is not None else ()),
        *_overdue(records, now_unix_ms),
        *_chain(audited),
        *_stories(records),
        *_authorised(audited),
    ]
    files = len({needed.sha256 for needed in records.needed()})
    return Verdict(
        tuple(findings), len(records.rounds), len(records.pivots), files, sum(sizes.values())
    )


_RESTORE: Final = "restore the newest backup: cofuse coordinator restore HOME BACKUP"


def _files(
    records: Records, artifacts: Artifacts, sizes: dict[str, int], *, hashes: bool
) -> Iterator[Finding]:
    """I1. `sizes` takes the bytes of each file that is there."""
    names: dict[str, list[Needed]] = {}
    for needed in records.needed():
        names.setdefault(needed.sha256, []).append(needed)
    for sha256, uses in names.items():
        what = ", ".join(needed.what for needed in uses[:3])
        wanted = next((n.size_bytes for n in uses if n.size_bytes is not None), None)
        if not artifacts.has(sha256):
            yield Finding("I1", f"missing: {sha256} ({what})", _REPLACE)
            continue
        path = artifacts.path(sha256)
        sizes[sha256] = path.stat().st_size
        if wanted is not None and sizes[sha256] != wanted:
            says = f"{sha256} has {sizes[sha256]} bytes, wanted {wanted} ({what})"
            yield Finding("I1", says, _REPLACE)
        elif hashes and (found := sha256_of(path)) != sha256:
            yield Finding("I1", f"{sha256} has sha256 {found} ({what})", _REPLACE)


_REPLACE: Final = "copy the file with that sha256 from a backup, or send it again where it was made"


def _counted_once(records: Records) -> Iterator[Finding]:
    """I2."""
    do = "withdraw one of the two participants, and fuse the round again"
    digests = Counter((c.round_id, c.sha256) for c in records.contributions if c.sha256)
    for (round_id, sha256), times in digests.items():
        if times > 1:
            yield Finding("I2", f"{round_id} holds {sha256[:12]} {times} times", do)
    do = "keep the one that the round names, and re-publish from it"
    for round_id, times in Counter(p.round_id for p in records.pivots if p.round_id).items():
        if times > 1:
            yield Finding("I2", f"{round_id} made {times} pivots", do)
    for name, times in Counter(r.pivot_name for r in records.rounds if r.pivot_name).items():
        if times > 1:
            yield Finding("I2", f"{times} rounds are to make {name}", do)


def _lineage(records: Records) -> Iterator[Finding]:
    """I3."""
    rounds = {row.round_id: row for row in records.rounds}
    names = {pivot.name for pivot in records.pivots}
    for pivot in records.pivots:
        if pivot.parent and pivot.parent not in names:
            says = f"{pivot.name} descends from {pivot.parent}, which is not there"
            yield Finding("I3", says, _RESTORE)
        elif pivot.round_id and _version(pivot.parent) >= _version(pivot.name):
            says = f"{pivot.name} descends from {pivot.parent}, which is not older"
            yield Finding("I3", says, _RESTORE)
        made_by = rounds.get(pivot.round_id)
        if pivot.round_id and (made_by is None or made_by.pivot_name != pivot.name):
            says = f"{pivot.name} says {pivot.round_id} made it, which does not name it"
            yield Finding("I3", says, _RESTORE)
        elif made_by is not None and made_by.state in FINAL - {State.PUBLISHED}:
            says = f"{pivot.name} is visible, but its round {pivot.round_id} is {made_by.state}"
            yield Finding("I3", says, "do not use this pivot; submit the round again")
    for row in records.rounds:
        if row.state is State.PUBLISHED and row.pivot_name not in names:
            says = f"{row.round_id} is PUBLISHED, but {row.pivot_name} is not there"
            yield Finding("I3", says, _RESTORE)


def _manifests(
    records: Records, artifacts: Artifacts, signer: Ed25519PublicKey
) -> Iterator[Finding]:
    """I3, as receivers check it."""
    do = "start the coordinator, which signs anew what is whole; else restore the newest backup"
    for says in unsigned(records, artifacts, signer):
        yield Finding("I3", says, do)


def _version(name: str) -> int:
    """The number in a pivot's name; one that has none is older than all that have."""
    number = name.rpartition("-")[2]
    return int(number) if number.isascii() and number.isdigit() else -1


def _overdue(records: Records, now_unix_ms: int) -> Iterator[Finding]:
    """I4."""
    for row in records.rounds:
        late_ms = now_unix_ms - row.deadline_unix_ms
        if row.state not in FINAL and late_ms > GRACE_MS:
            says = f"{row.round_id} is {row.state}, {late_ms // 1000} s after its deadline"
            do = "start the coordinator, which ends it; if it runs, look into its log"
            yield Finding("I4", says, do)


def _chain(audited: Audited) -> Iterator[Finding]:
    """I5."""
    if audited.broken is not None:
        says = f"the audit chain breaks at record {audited.broken.seq}: {audited.broken.says}"
        yield Finding("I5", says, _EVIDENCE)
    elif not audited.last:
        yield Finding("I5", "the audit chain has no record, and begins with one", _EVIDENCE)
    for round_id, participant, sha256 in audited.receipts:
        if (round_id, participant, sha256) not in audited.intents:
            says = f"{participant} has a receipt in {round_id} that the audit chain does not know"
            yield Finding("I5", says, _EVIDENCE)


_EVIDENCE: Final = (
    "keep a copy as evidence; compare with the participants' records of our head, and find out "
    "who can write to the database"
)


def _authorised(audited: Audited) -> Iterator[Finding]:
    """I7: the story and the chain tell the same, and each change was its actor's to make."""
    if audited.broken is None:
        kept = [change for change, _ in audited.kept]
        if kept != list(audited.told):
            pairs = zip_longest(kept, audited.told)
            says = next(
                f"the audit chain says {_words(one)} where the story says {_words(other)}"
                for one, other in pairs
                if one != other
            )
            yield Finding("I7", says, _EVIDENCE)
    for seq, says in audited.unauthorised:
        yield Finding("I7", f"record {seq} of the audit chain: {says}", _EVIDENCE)


def _words(change: Change | None) -> str:
    return " ".join(change) if change is not None else "nothing"


def _stories(records: Records) -> Iterator[Finding]:
    """I7, as far as the story alone tells."""
    legal = {(start, end) for (start, _), end in TRANSITIONS.items()}
    for row in records.rounds:
        told = records.states.get(row.round_id, [])
        wrong = [step for step in pairwise(told) if step[0] != step[1] and step not in legal]
        if told[:1] != [State.SUBMITTED]:
            says = f"{row.round_id} has a story that does not begin with SUBMITTED"
            yield Finding("I7", says, _RESTORE)
        elif told[-1] != row.state:
            says = f"{row.round_id} is {row.state}, but its story ends with {told[-1]}"
            yield Finding("I7", says, _RESTORE)
        elif wrong:
            says = f"{row.round_id} went from {' to '.join(wrong[0])}, which the table forbids"
            yield Finding("I7", says, _RESTORE)
