"""Files named by their sha256: complete ones are durable and never change, partial ones resume."""

import os
import re
import shutil
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from protos.chunks import sha256_of
from protos.errors import CofuseError

_PROBE_BYTES: Final = 4096
_DIGEST = re.compile(r"[0-9a-f]{64}")


def checked_digest(sha256: str) -> str:
    """Return `sha256` when it is one: it becomes part of a path."""
    if not _DIGEST.fullmatch(sha256):
        raise CofuseError(
            "bad_request", f"sha256: found {sha256[:80]!r}, wanted 64 lower-case hex digits"
        )
    return sha256


class Artifacts:
    """A directory of complete files (objects/) and of each sender's partial ones (incoming/)."""

    def __init__(self, root: Path) -> None:
        self._objects = root / "objects"
        self._incoming = root / "incoming"
        for folder in (self._objects, self._incoming):
            folder.mkdir(parents=True, exist_ok=True)
        self._writing: set[Path] = set()
        self._lock = threading.Lock()

    def path(self, sha256: str) -> Path:
        """Where the file is or would be."""
        digest = checked_digest(sha256)
        return self._objects / digest[:2] / digest

    def has(self, sha256: str) -> bool:
        """Whether the whole file is here."""
        return self.path(sha256).exists()

    def received_bytes(self, sha256: str, sender: str) -> int:
        """How far `sender` has come with a file that is not complete yet."""
        partial = self._partial(sha256, sender)
        return partial.stat().st_size if partial.exists() else 0

    def receive(
        self,
        sha256: str,
        sender: str,
        *,
        size_bytes: int,
        offset_bytes: int,
        chunks: Iterable[bytes],
    ) -> int:
        """Append `chunks` to the sender's partial file; complete it when all bytes are there.

        Returns: bytes received in all. What arrived before an interruption stays for the next
            call, so a broken upload costs at most the chunk in flight.
        Raises: CofuseError wrong_offset, too_large or wrong_digest (the partial file is dropped).
        """
        partial = self._partial(sha256, sender)
        if self.has(sha256):
            return size_bytes
        with self._lock:
            if partial in self._writing:
                raise CofuseError("wrong_offset", "another upload of this file is still open")
            self._writing.add(partial)
        try:
            here = self.received_bytes(sha256, sender)
            if offset_bytes != here:
                raise CofuseError("wrong_offset", f"found offset {offset_bytes}, wanted {here}")
            received = self._append(partial, chunks, here, size_bytes)
            if received == size_bytes:
                self._complete(partial, sha256)
            return received
        finally:
            with self._lock:
                self._writing.discard(partial)

    def add(self, source: Path, sha256: str) -> None:
        """Copy a file of this machine in; `sha256` is checked."""
        if self.has(sha256):
            return
        partial = self._partial(sha256, "coordinator")
        shutil.copyfile(source, partial)
        _fsync(partial)
        self._complete(partial, sha256)

    def check_writable(self) -> None:
        """Write a small file through to the disk and remove it.

        Raises: OSError when the disk is full, read-only or broken.
        """
        probe = self._incoming / ".writable"
        try:
            with probe.open("wb") as file:
                file.write(bytes(_PROBE_BYTES))
                file.flush()
                os.fsync(file.fileno())
        finally:
            probe.unlink(missing_ok=True)

    def _partial(self, sha256: str, sender: str) -> Path:
        return self._incoming / f"{checked_digest(sha256)}.{sender}"

    def _append(self, partial: Path, chunks: Iterable[bytes], here: int, size_bytes: int) -> int:
        with partial.open("ab") as file:
            try:
                for chunk in chunks:
                    if here + len(chunk) > size_bytes:
                        raise CofuseError(
                            "bad_request", f"found more bytes than the {size_bytes} announced"
                        )
                    file.write(chunk)
                    here += len(chunk)
            finally:
                file.flush()
                os.fsync(file.fileno())
        return here

    def _complete(self, partial: Path, sha256: str) -> None:
        found = sha256_of(partial)
        if found != sha256:
            partial.unlink()
            raise CofuseError("wrong_digest", f"found sha256 {found}, wanted {sha256}")
        final = self.path(sha256)
        final.parent.mkdir(exist_ok=True)
        partial.rename(final)
        _fsync(final.parent)


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
