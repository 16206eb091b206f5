"""The files of an audit chain: read by anybody, offline; written by trust/audit.py.

`NNNNNNNNNNNN.jsonl` holds the records from number N on, `checkpoints.jsonl` what was signed,
`audit.key` (mode 0600) and `audit.pub` the key. An export is such a folder without the private key.
"""

import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from trust.chain import MAX_LINE_BYTES, START, AuditError, Head, read_record
from trust.checkpoints import Checkpoint, Verdict, make_checkpoint, read_checkpoint, verify_chain
from trust.files import sync_folder
from trust.keys import PUBLIC_SUFFIX, load_private, load_public, save_public

KEY: Final = "audit.key"
PUBLIC_KEY: Final = f"audit{PUBLIC_SUFFIX}"
CHECKPOINTS: Final = "checkpoints.jsonl"


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


@dataclass(frozen=True, slots=True)
class Chain:
    """A chain to be read, wherever it is kept."""

    lines: Callable[[], Iterator[bytes]]
    checkpoints: Sequence[Checkpoint]
    public: Ed25519PublicKey | None
    """None: nothing says whose it is."""
    private: Path | None = None
    """Where the key is, for its owner's own exports."""
    excerpt: bool = False
    """One file of several: it need not begin with record 1."""

    def verify(self, *, whole: bool = True) -> Verdict:
        """Read all of it. Args: whole: it must begin with record 1, unless it is an excerpt."""
        return verify_chain(
            self.lines(), self.checkpoints, self.public, whole=whole and not self.excerpt
        )

    def export(self, out: Path, wanted: Callable[[Mapping[str, Any]], bool]) -> None:
        """Lay the records that are wanted down as a folder that open_chain() reads.

        The last one is signed anew when the key is here, so that the excerpt's end is sure.
        Raises: AuditError when there is none. FileExistsError, KeyFileError, OSError.
        """
        lines = [line for line in self.lines() if wanted(read_record(line))]
        if not lines:
            raise AuditError("found no record in that range, wanted one at least")
        first, last = (read_record(line) for line in (lines[0], lines[-1]))
        signed = [c for c in self.checkpoints if first["seq"] <= c.seq <= last["seq"]]
        if self.private is not None and self.private.exists():
            head = Head(last["seq"], last["h"])
            signed.append(make_checkpoint(load_private(self.private), head, now_unix_ms()))
        out.mkdir(parents=True)
        append(out / segment_name(first["seq"]), b"".join(line + b"\n" for line in lines))
        append(out / CHECKPOINTS, b"".join(made.line() + b"\n" for made in signed))
        if self.public is not None:
            save_public(self.public, out / PUBLIC_KEY)


def open_chain(path: Path) -> Chain:
    """The chain in a folder, or the part of it in one file; nothing is changed by reading it.

    Raises: AuditError for a folder that holds none, and for unreadable checkpoints. KeyFileError.
        OSError.
    """
    if not path.exists():
        raise AuditError(f"{path}: found no audit chain; it begins with the first start")
    folder = path if path.is_dir() else path.parent
    paths = segments(path) if path.is_dir() else [path]
    if not paths and not (folder / CHECKPOINTS).exists():
        raise AuditError(f"{path}: found no audit chain, wanted files such as {segment_name(1)}")
    signed = read_checkpoints(folder / CHECKPOINTS)
    if not path.is_dir():  # it may have successors: what was signed after it is not missing
        last = last_head(path) or START
        signed = [c for c in signed if c.seq <= last.seq]
    public = load_public(folder / PUBLIC_KEY) if (folder / PUBLIC_KEY).exists() else None
    return Chain(lambda: read_lines(paths), signed, public, folder / KEY, excerpt=not path.is_dir())


def check(path: Path, *, whole: bool = True) -> Verdict:
    """Verify a folder, or one of its files. Raises: as open_chain()."""
    return open_chain(path).verify(whole=whole)


def segment_name(first: int) -> str:
    """The file that begins with a record."""
    return f"{first:012d}.jsonl"


def last_head(path: Path) -> Head | None:
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


def cut_torn(path: Path) -> bytes:
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


def append(path: Path, content: bytes) -> None:
    """Add bytes to a file, and bring them, and a new file's name, to disk."""
    fresh = not path.exists()
    handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o640)
    with os.fdopen(handle, "ab") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    if fresh:
        sync_folder(path.parent)


def now_unix_ms() -> int:
    """The wall clock, in milliseconds."""
    return time.time_ns() // 1_000_000
