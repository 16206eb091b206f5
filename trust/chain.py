"""The audit chain: numbered records, each with the hash of the one before it.

Pure: where lines are kept is for others (trust/audit.py: files). A record is one line of canonical
JSON (trust/canonical.py) without null. Whoever edits, removes or moves a line breaks the chain
at it.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Final, Literal, NamedTuple

from trust.canonical import canonical

VERSION: Final = 1
GENESIS: Final = "0" * 64
"""What the first record names as the hash before it."""
MAX_LINE_BYTES: Final = 64 * 1024
MAX_TEXT: Final = 2000
"""Characters of `why`; more is cut."""
_TEXTS: Final = ("ts", "actor", "act", "obj", "res", "why", "prev", "h")
_FIELDS: Final = frozenset(("v", "seq", "data", *_TEXTS))


class AuditError(ValueError):
    """A line is no record, or does not follow the one before it."""


class Head(NamedTuple):
    """The last record of a chain: its number, from 1, and its hash."""

    seq: int
    h: str


START: Final = Head(0, GENESIS)


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """Something that was done, before it is a record."""

    actor: str
    """Who: the URI of a certificate, or the program's own."""
    act: str
    """What, as thing.verb: release.intent, round.state."""
    obj: str
    """To what: a round, a pivot, a file."""
    res: Literal["ok", "deny"] = "ok"
    why: str = ""
    """The rule that allowed or denied it; words for people."""
    data: Mapping[str, Any] = field(default_factory=dict)


def make_line(entry: Entry, head: Head, unix_ms: int) -> tuple[bytes, Head]:
    """The record that follows `head`, as a line without its line feed, and the head it makes.

    Raises: AuditError when it would be longer than a line may be. TypeError as canonical().
    """
    said = {
        "v": VERSION,
        "seq": head.seq + 1,
        "ts": utc(unix_ms),
        "actor": entry.actor,
        "act": entry.act,
        "obj": entry.obj,
        "res": entry.res,
        "why": entry.why[:MAX_TEXT],
        "data": dict(entry.data),
        "prev": head.h,
    }
    record = _plain(said)
    h = hashlib.sha256(canonical(record)).hexdigest()
    line = canonical({**record, "h": h})
    if len(line) > MAX_LINE_BYTES:
        raise AuditError(f"found a record of {len(line)} bytes, wanted at most {MAX_LINE_BYTES}")
    return line, Head(head.seq + 1, h)


def read_record(line: bytes) -> dict[str, Any]:
    """A line as the record it states; its own hash is checked, not what it follows.

    Raises: AuditError.
    """
    if len(line) > MAX_LINE_BYTES:
        raise AuditError(f"found a line of {len(line)} bytes, wanted at most {MAX_LINE_BYTES}")
    try:
        record = _plain(json.loads(line))
        if not isinstance(record, dict) or record.keys() != _FIELDS:
            raise AuditError(f"found no record, wanted the fields {' '.join(sorted(_FIELDS))}")
        if canonical(record) != line:
            raise AuditError("found another spelling of the record, wanted canonical JSON")
    except AuditError:
        raise
    except (ValueError, TypeError, RecursionError) as error:
        raise AuditError(f"found no record: {type(error).__name__}") from None
    whole = hashlib.sha256(canonical({k: v for k, v in record.items() if k != "h"})).hexdigest()
    if record["h"] != whole or record["v"] != VERSION or type(record["seq"]) is not int:
        raise AuditError("the record was changed: it does not have its own hash")
    return record


def follow(line: bytes, head: Head) -> Head:
    """The head that a line makes, when it follows `head`.

    Raises: AuditError saying what happened to the record that should have been here.
    """
    record, wanted = read_record(line), head.seq + 1
    if record["seq"] != wanted:
        raise AuditError(f"found record {record['seq']}, wanted {wanted}: removed or moved")
    if record["prev"] != head.h:
        raise AuditError("it does not name the hash of the record before it: one of them is false")
    return Head(wanted, record["h"])


def utc(unix_ms: int) -> str:
    """A moment as records state it: RFC 3339, UTC, milliseconds."""
    moment = datetime.fromtimestamp(unix_ms / 1000, UTC)
    return moment.strftime("%Y-%m-%dT%H:%M:%S.") + f"{unix_ms % 1000:03d}Z"


def _plain(value: Any) -> Any:
    """The value without what no record holds: lone surrogates are replaced, null is refused."""
    match value:
        case str():
            return value.encode("utf-8", "replace").decode("utf-8")
        case list() | tuple():
            return [_plain(item) for item in value]
        case dict():
            return {key: _plain(item) for key, item in value.items()}
        case None:
            raise TypeError("found null in a record, wanted texts, whole numbers, truth values")
    return value
