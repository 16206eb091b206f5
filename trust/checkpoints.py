"""Signed checkpoints of an audit chain, and the verdict over both.

A chain alone can be written anew from any record on, or end early. A checkpoint says, under the
key of the chain's owner, which head it had: below it nothing can be changed or cut off unseen.
"""

import base64
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from trust.canonical import canonical
from trust.chain import (
    MAX_LINE_BYTES,
    START,
    VERSION,
    AuditError,
    Head,
    follow,
    read_record,
    utc,
)
from trust.keys import SignatureError, kid, sign, verify

CHECKPOINT_EVERY: Final = 256
"""Records after which a checkpoint is due."""
CHECKPOINT_S: Final = 60.0
"""Seconds that a record may stay without one, while somebody looks after the chain."""
MAX_UNSIGNED: Final = 4 * CHECKPOINT_EVERY
"""Records in a row without a checkpoint that pass: several are written at once, and writers die."""
_PURPOSE: Final = b"cofuse audit checkpoint 1\n"


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """The holder of a key says: my chain had this head."""

    seq: int
    head: str
    ts: str
    kid: str
    sig: str

    def line(self) -> bytes:
        """As it is kept."""
        names = ("seq", "head", "ts", "kid", "sig")
        return canonical({"v": VERSION, **{name: getattr(self, name) for name in names}})


@dataclass(frozen=True, slots=True)
class Broken:
    """Where a chain breaks first."""

    seq: int
    says: str


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a chain amounts to."""

    first: int
    """Number of the first record read; 0 when there was none."""
    head: Head
    """The last record that follows from it."""
    signed: int
    """The last record that a good checkpoint covers; 0: none."""
    broken: Broken | None


def make_checkpoint(key: Ed25519PrivateKey, head: Head, unix_ms: int) -> Checkpoint:
    """Sign a head."""
    ts = utc(unix_ms)
    sig = base64.b64encode(sign(key, _signed_bytes(head.seq, head.h, ts))).decode()
    return Checkpoint(head.seq, head.h, ts, kid(key.public_key()), sig)


def read_checkpoint(line: bytes) -> Checkpoint:
    """A line as the checkpoint it states; its signature is not checked here.

    Raises: AuditError.
    """
    try:
        found = json.loads(line[: MAX_LINE_BYTES + 1])
        made = Checkpoint(*(found[name] for name in ("seq", "head", "ts", "kid", "sig")))
        texts = (made.head, made.ts, made.kid, made.sig)
        if type(made.seq) is int and all(isinstance(t, str) for t in texts) and made.line() == line:
            return made
    except (ValueError, TypeError, KeyError, RecursionError):
        pass
    raise AuditError("found a line that is no checkpoint")


def verify_chain(
    lines: Iterable[bytes],
    checkpoints: Sequence[Checkpoint],
    key: Ed25519PublicKey | None,
    *,
    whole: bool = True,
) -> Verdict:
    """Read a chain whole and name the first record that cannot be believed.

    Args: lines: in order, without line feeds. checkpoints: of the same chain; they count only when
        `key` made them. whole: it must begin with record 1; else it is an excerpt.
    """
    wanted = {checkpoint.seq for checkpoint in checkpoints}
    head, begins, broken = START, 0, None
    heads: dict[int, str] = {}
    for line in lines:
        try:
            if not begins:
                head = START if whole else _before(line)
                begins = head.seq + 1
            head = follow(line, head)
        except AuditError as error:
            broken = Broken(head.seq + 1, str(error))
            break
        if head.seq in wanted:
            heads[head.seq] = head.h
    else:
        broken = _cut_off(checkpoints, key, head)
    signed, doubt = _signatures(checkpoints, key, heads, begins, head)
    if doubt is not None and (broken is None or doubt.seq < broken.seq):
        broken = doubt
    return Verdict(begins, head, signed, broken)


def _before(line: bytes) -> Head:
    """The head that an excerpt says it follows."""
    record = read_record(line)
    return Head(record["seq"] - 1, record["prev"])


def _cut_off(
    checkpoints: Sequence[Checkpoint], key: Ed25519PublicKey | None, head: Head
) -> Broken | None:
    """Whether a good checkpoint knows of records after the last one."""
    good = [c.seq for c in checkpoints if c.seq > head.seq and _is_good(c, key)]
    if not good:
        return None
    says = f"record {max(good)} was signed, but the last one here is {head.seq}: the end is cut off"
    return Broken(head.seq + 1, says)


def _signatures(
    checkpoints: Sequence[Checkpoint],
    key: Ed25519PublicKey | None,
    heads: Mapping[int, str],
    begins: int,
    head: Head,
) -> tuple[int, Broken | None]:
    """The last record that is signed as it stands, and the first one that is not but should be."""
    if key is None or not begins:
        return 0, None
    signed = 0
    last = begins - 1
    for checkpoint in sorted(checkpoints, key=lambda c: c.seq):
        if checkpoint.seq not in heads or checkpoint.kid != kid(key):
            continue  # another key's word is none: what it covers counts as not signed
        if not _is_good(checkpoint, key):
            says = f"the checkpoint of record {checkpoint.seq} is not signed by key {kid(key)[:16]}"
            return signed, Broken(checkpoint.seq, says)
        if heads[checkpoint.seq] != checkpoint.head:
            says = f"record {checkpoint.seq} is not the one that was signed: written anew"
            return signed, Broken(last + 1, says)
        if checkpoint.seq - last > MAX_UNSIGNED:
            break
        signed = last = checkpoint.seq
    if head.seq - last > MAX_UNSIGNED:
        says = f"more than {MAX_UNSIGNED} records have no checkpoint: some were removed"
        return signed, Broken(last + 1, says)
    return signed, None


def _is_good(checkpoint: Checkpoint, key: Ed25519PublicKey | None) -> bool:
    if key is None or checkpoint.kid != kid(key):
        return False
    payload = _signed_bytes(checkpoint.seq, checkpoint.head, checkpoint.ts)
    try:
        verify(key, payload, base64.b64decode(checkpoint.sig, validate=True))
    except (SignatureError, ValueError):
        return False
    return True


def _signed_bytes(seq: int, head: str, ts: str) -> bytes:
    return _PURPOSE + canonical({"seq": seq, "head": head, "ts": ts})
