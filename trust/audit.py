"""Who keeps an audit chain in a folder: appends, syncs, signs, and mends what a crash left.

The files are those of trust/audit_files.py, which anybody may read.
"""

import fcntl
import hashlib
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from trust.audit_files import (
    CHECKPOINTS,
    KEY,
    append,
    cut_torn,
    last_head,
    now_unix_ms,
    read_checkpoints,
    segment_name,
    segments,
)
from trust.chain import START, AuditError, Entry, Head, make_line
from trust.checkpoints import CHECKPOINT_EVERY, CHECKPOINT_S, Checkpoint, make_checkpoint
from trust.keys import load_private, new_key

SEGMENT_BYTES: Final = 64 << 20
REPAIRED: Final = "audit.repaired"
"""The act of the record that follows a torn line, which a crash had left and we have cut off."""
_LOCK: Final = "audit.lock"


@dataclass(slots=True)
class _Tail:
    """Where the next record goes."""

    segment: Path
    size: int
    head: Head


class AuditLog:
    """Appends to the chain of a folder. For many threads and processes: they take turns."""

    def __init__(self, folder: Path, owner: str, *, segment_bytes: int = SEGMENT_BYTES) -> None:
        """Open the chain or begin one; a line that a crash tore is cut off, and that is recorded.

        Args: owner: URI of whose chain it is, the actor of our own records. segment_bytes: a
            file of this size gets a successor.
        Raises: AuditError when the end of the chain is not what was written. KeyFileError, OSError.
        """
        self._folder = folder
        self._owner = owner
        self._segment_bytes = segment_bytes
        folder.mkdir(mode=0o750, parents=True, exist_ok=True)
        self._mutex = threading.Lock()
        self._tail: _Tail | None = None
        self._signed = 0
        self._unsigned_since: float | None = 0.0  # of another process's records nobody knows when
        with self._alone():
            if not (folder / KEY).exists():
                new_key(folder / KEY)
            self._key = load_private(folder / KEY)
            checkpoints = folder / CHECKPOINTS
            cut_torn(checkpoints)
            signed = read_checkpoints(checkpoints)
            self._settle()
            self._check_end(signed[-1] if signed else None)

    @property
    def head(self) -> Head:
        """The last record, and its hash."""
        with self._alone():
            return self._settle().head

    def append(self, *entries: Entry) -> Head:
        """Write records down, in order; they are on disk when this returns.

        Raises: OSError; then what was written of them counts, at most. AuditError, TypeError: an
            entry is none, and nothing was written.
        """
        with self._alone():
            tail = self._settle()
            self._write(tail, entries)
            if self._due(tail.head):
                self._sign(tail.head)
            return tail.head

    def sign_if_due(self) -> Head:
        """Sign the head when a record has waited for it long enough; call this now and then."""
        with self._alone():
            head = self._settle().head
            if self._due(head):
                self._sign(head)
            return head

    def sign(self) -> Head:
        """Sign the head now, unless it is signed."""
        with self._alone():
            head = self._settle().head
            if head.seq > self._signed:
                self._sign(head)
            return head

    # everything below is called by whoever is alone

    @contextmanager
    def _alone(self) -> Iterator[None]:
        with self._mutex, (self._folder / _LOCK).open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _settle(self) -> _Tail:
        """The tail as it is now: another process, or a write that failed, may have moved it."""
        found = segments(self._folder)
        newest = found[-1] if found else self._folder / segment_name(1)
        size = newest.stat().st_size if found else 0
        if self._tail is not None and (self._tail.segment, self._tail.size) == (newest, size):
            return self._tail
        torn = cut_torn(newest)
        head = next((h for path in reversed(found) if (h := last_head(path)) is not None), START)
        self._tail = _Tail(newest, newest.stat().st_size if found else 0, head)
        if torn:
            data = {"bytes": len(torn), "sha256": hashlib.sha256(torn).hexdigest()}
            repaired = Entry(actor=self._owner, act=REPAIRED, obj=newest.name, data=data)
            self._write(self._tail, [repaired])
        return self._tail

    def _write(self, tail: _Tail, entries: Iterable[Entry]) -> None:
        head, now, lines = tail.head, now_unix_ms(), []
        for entry in entries:
            line, head = make_line(entry, head, now)
            lines.append(line + b"\n")
        if tail.size >= self._segment_bytes:
            tail.segment, tail.size = self._folder / segment_name(tail.head.seq + 1), 0
        append(tail.segment, b"".join(lines))
        tail.size, tail.head = tail.segment.stat().st_size, head
        if self._unsigned_since is None:
            self._unsigned_since = time.monotonic()

    def _due(self, head: Head) -> bool:
        if head.seq == self._signed:
            return False
        since = self._unsigned_since or 0.0
        return (
            head.seq - self._signed >= CHECKPOINT_EVERY or time.monotonic() - since >= CHECKPOINT_S
        )

    def _sign(self, head: Head) -> None:
        made = make_checkpoint(self._key, head, now_unix_ms())
        append(self._folder / CHECKPOINTS, made.line() + b"\n")
        self._signed, self._unsigned_since = head.seq, None

    def _check_end(self, signed: Checkpoint | None) -> None:
        """Refuse to go on below what was signed."""
        head = self._settle().head
        if signed is None:
            return
        self._signed = signed.seq
        if signed.seq > head.seq or (signed.seq == head.seq and signed.head != head.h):
            raise AuditError(
                f"{self._folder}: found a chain that ends with record {head.seq}, wanted record "
                f"{signed.seq} as it was signed: its end was cut off or changed. Find out who did "
                "it; keep the folder as evidence, and move it away for a new chain to begin"
            )
