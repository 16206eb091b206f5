"""An audit chain in a folder: appended and synced by whoever keeps it, read by anybody, offline.

`NNNNNNNNNNNN.jsonl` holds the records from number N on, `checkpoints.jsonl` what was signed,
`audit.key` (mode 0600) and `audit.pub` the key. An export is such a folder without the private key.
"""

import fcntl
import hashlib
import os
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from trust.chain import MAX_LINE_BYTES, START, AuditError, Entry, Head, make_line, read_record
from trust.checkpoints import (
    CHECKPOINT_EVERY,
    CHECKPOINT_S,
    Checkpoint,
    Verdict,
    make_checkpoint,
    read_checkpoint,
    verify_chain,
)
from trust.keys import PUBLIC_SUFFIX, load_private, load_public, new_key

SEGMENT_BYTES: Final = 64 << 20
KEY: Final = "audit.key"
PUBLIC_KEY: Final = f"audit{PUBLIC_SUFFIX}"
CHECKPOINTS: Final = "checkpoints.jsonl"
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
            _cut_torn(checkpoints)
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
        newest = found[-1] if found else self._folder / _segment_name(1)
        size = newest.stat().st_size if found else 0
        if self._tail is not None and (self._tail.segment, self._tail.size) == (newest, size):
            return self._tail
        torn = _cut_torn(newest)
        head = next((h for path in reversed(found) if (h := _last_head(path)) is not None), START)
        self._tail = _Tail(newest, newest.stat().st_size if found else 0, head)
        if torn:
            data = {"bytes": len(torn), "sha256": hashlib.sha256(torn).hexdigest()}
            repaired = Entry(actor=self._owner, act=REPAIRED, obj=newest.name, data=data)
            self._write(self._tail, [repaired])
        return self._tail

    def _write(self, tail: _Tail, entries: Iterable[Entry]) -> None:
        head, now, lines = tail.head, time.time_ns() // 1_000_000, []
        for entry in entries:
            line, head = make_line(entry, head, now)
            lines.append(line + b"\n")
        if tail.size >= self._segment_bytes:
            tail.segment, tail.size = self._folder / _segment_name(tail.head.seq + 1), 0
        _append(tail.segment, b"".join(lines))
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
        made = make_checkpoint(self._key, head, time.time_ns() // 1_000_000)
        _append(self._folder / CHECKPOINTS, made.line() + b"\n")
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


def segments(folder: Path) -> list[Path]:
    """The files that hold records, in order."""
    return sorted(path for path in folder.glob("*.jsonl") if path.stem.isdigit())


def read_lines(paths: Iterable[Path]) -> Iterator[bytes]:
    """Every whole line; one that is just being written, or was torn, does not count."""
    for path in paths:
        with path.open("rb") as file:
            while line := file.readline(MAX_LINE_BYTES + 2):
                if line.endswith(b"\n"):
                    yield line[:-1]
                elif len(line) > MAX_LINE_BYTES:
                    yield line  # too long: no record
                    break


def read_checkpoints(path: Path) -> list[Checkpoint]:
    """What was signed, in the order of signing.

    Raises: AuditError.
    """
    try:
        return [read_checkpoint(line) for line in read_lines([path])] if path.exists() else []
    except AuditError as error:
        raise AuditError(f"{path}: {error}; it was changed, or is no such file") from None


def check(path: Path, *, whole: bool = True) -> Verdict:
    """Verify a folder, or one of its files: offline, and without changing anything.

    Args: whole: the folder must begin with record 1; one file never needs to.
    Raises: AuditError for unreadable checkpoints. KeyFileError, OSError.
    """
    folder = path if path.is_dir() else path.parent
    key = load_public(folder / PUBLIC_KEY) if (folder / PUBLIC_KEY).exists() else None
    signed = read_checkpoints(folder / CHECKPOINTS)
    if path.is_dir():
        return verify_chain(read_lines(segments(path)), signed, key, whole=whole)
    # A file may have successors: what was signed after it is not missing from it.
    last = _last_head(path) or START
    return verify_chain(
        read_lines([path]), [c for c in signed if c.seq <= last.seq], key, whole=False
    )


def write_export(
    folder: Path, lines: Iterable[bytes], checkpoints: Iterable[Checkpoint], public_key: bytes
) -> None:
    """Lay an excerpt down as a folder that check() reads.

    Raises: AuditError when there are no lines. FileExistsError.
    """
    lines = list(lines)
    if not lines:
        raise AuditError("found no record in that range, wanted one at least")
    folder.mkdir(parents=True)
    first = read_record(lines[0])["seq"]
    last = read_record(lines[-1])["seq"]
    covered = [made.line() for made in checkpoints if first <= made.seq <= last]
    _append(folder / _segment_name(first), b"".join(line + b"\n" for line in lines))
    _append(folder / CHECKPOINTS, b"".join(line + b"\n" for line in covered))
    _append(folder / PUBLIC_KEY, public_key)


def _segment_name(first: int) -> str:
    return f"{first:012d}.jsonl"


def _last_head(path: Path) -> Head | None:
    """The head of a file's last line; None when it is empty.

    Raises: AuditError.
    """
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - MAX_LINE_BYTES - 2))
        end = file.read().rstrip(b"\n")
    if not end:
        return None
    try:
        record = read_record(end[end.rfind(b"\n") + 1 :])
    except AuditError as error:
        raise AuditError(
            f"{path}: the last line: {error}. Find out who changed it; keep the folder as "
            "evidence, and move it away for a new chain to begin"
        ) from None
    return Head(record["seq"], record["h"])


def _cut_torn(path: Path) -> bytes:
    """Cut off what follows the last line feed: it was never synced whole; return it."""
    if not path.exists():
        return b""
    with path.open("r+b") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - MAX_LINE_BYTES - 2))
        end = file.read()
        torn = end[end.rfind(b"\n") + 1 :]
        if torn:
            file.truncate(size - len(torn))
            file.flush()
            os.fsync(file.fileno())
    return torn


def _append(path: Path, content: bytes) -> None:
    """Add bytes to a file, and bring them, and a new file's name, to disk."""
    fresh = not path.exists()
    handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o640)
    with os.fdopen(handle, "ab") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    if fresh:
        directory = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)
