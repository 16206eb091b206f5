"""Files named by their sha256: complete ones are durable and never change, partial ones resume."""

import hashlib
import logging
import re
import secrets
import shutil
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Final

from coordinator.incoming import Partial, Piece, storage_error
from coordinator.objects import Directory, Objects
from protos.chunks import RunningHash, read_chunks, sha256_of
from protos.config import ConfigError
from protos.errors import CofuseError
from protos.files import make_folder, sync

_PROBE_BYTES: Final = 4096
_LOG = logging.getLogger(__name__)
_DIGEST = re.compile(r"[0-9a-f]{64}")
RESERVE_BYTES: Final = 2**30
"""Left free on the disk: a full one must still take the database's and the audit's writes."""
MAX_PARTIALS: Final = 16
"""Unfinished files of one sender."""
_CACHED_LISTS: Final = 64
"""Files whose running digests are remembered: 32 bytes a MiB."""


def checked_digest(sha256: str) -> str:
    """Return `sha256` when it is one: it becomes part of a path."""
    if not _DIGEST.fullmatch(sha256):
        raise CofuseError(
            "bad_request", f"sha256: found {sha256[:80]!r}, wanted 64 lower-case hex digits"
        )
    return sha256


class Artifacts:
    """Complete files (objects.py) and each sender's partial ones (incoming.py, below `root`)."""

    def __init__(
        self, root: Path, objects: Objects | None = None, *, reserve_bytes: int = RESERVE_BYTES
    ) -> None:
        """Args: objects: where complete files lie; default: below `root`."""
        self._incoming = root / "incoming"
        make_folder(self._incoming)
        self.objects: Objects = objects or Directory(root)
        self._reserve_bytes = reserve_bytes
        self._partials: dict[str, Partial] = {}
        self._digests: OrderedDict[str, list[bytes]] = OrderedDict()
        self._lock = threading.Lock()

    def has(self, sha256: str) -> bool:
        """Whether the whole file is here. Asking brings it back from the trash."""
        digest = checked_digest(sha256)
        return self.objects.has(digest) or self.objects.move(digest, "trash", "objects")

    def path(self, sha256: str) -> Path:
        """A local path to read the file from.

        Raises: CofuseError unknown_artifact when it is not here (any more).
        """
        if self.has(sha256):
            try:
                return self.objects.fetch(sha256)
            except FileNotFoundError:  # quarantined meanwhile
                pass
        raise CofuseError("unknown_artifact", f"no whole file {sha256} is in the store")

    def received_bytes(self, sha256: str, sender: str) -> int:
        """How far `sender` has come with a file that is not complete yet."""
        path = self._partial_path(sha256, sender)
        return self._open(path).received_bytes if path.exists() else 0

    def receive(
        self,
        sha256: str,
        sender: str,
        *,
        size_bytes: int,
        offset_bytes: int,
        pieces: Iterable[Piece],
        prefix_sha256: bytes = b"",
    ) -> Iterator[int]:
        """Append to the sender's partial file; yield the bytes received in all after each piece.

        What arrived before an interruption stays for the next call.
        Raises: CofuseError wrong_offset, wrong_chunk, bad_request, storage_full, too_many_uploads.
        """
        partial = self._open(self._partial_path(sha256, sender))
        self._check_room(sender, partial, size_bytes - offset_bytes)
        yield from partial.receive(
            pieces, offset_bytes=offset_bytes, size_bytes=size_bytes, prefix_sha256=prefix_sha256
        )

    def complete(self, sha256: str, sender: str, size_bytes: int) -> None:
        """Make the sender's file, of which all bytes are here, durable under its name.

        Raises: CofuseError truncated_upload, wrong_digest (the partial file is dropped),
            storage_full, storage_unreachable.
        """
        partial = self._open(self._partial_path(sha256, sender))
        if (received := partial.received_bytes) < size_bytes:
            raise CofuseError("truncated_upload", f"found {received} bytes, wanted {size_bytes}")
        partial.finish(sha256, size_bytes, self.objects.add)
        self._forget(partial)

    def add(self, source: Path, sha256: str) -> None:
        """Copy a file of this machine in; `sha256` is checked.

        Raises: CofuseError wrong_digest, storage_full.
        """
        if self.has(sha256):
            return
        # A name of its own: two threads may add one file at the same time.
        copy = self._incoming / f"{checked_digest(sha256)}.coordinator-{secrets.token_hex(4)}"
        try:
            shutil.copyfile(source, copy)
            sync(copy)
            if (found := sha256_of(copy)) != sha256:
                copy.unlink()
                raise CofuseError("wrong_digest", f"found sha256 {found}, wanted {sha256}")
            self.objects.add(copy, sha256)
        except OSError as error:
            raise storage_error(error) from error

    def check_writable(self) -> None:
        """Write a small file through to the disk and remove it; then ask the object store.

        Raises: OSError when the disk is full, read-only or broken; CofuseError storage_unreachable.
        """
        probe = self._incoming / ".writable"
        try:
            probe.write_bytes(bytes(_PROBE_BYTES))
            sync(probe)
        finally:
            probe.unlink(missing_ok=True)
        self.objects.check_writable()

    def running_digests(self, sha256: str) -> list[bytes]:
        """The file's running digest (protos/chunks.py) after each of its chunks.

        The first time the whole file is read for it, so a damaged one is never served.
        Raises: CofuseError unknown_artifact, damaged_artifact (it is then in quarantine).
        """
        with self._lock:
            if known := self._digests.get(sha256):
                self._digests.move_to_end(sha256)
                return known
        found = self.verify(sha256)
        with self._lock:
            self._digests[sha256] = found
            while len(self._digests) > _CACHED_LISTS:
                self._digests.popitem(last=False)
        return found

    def verify(self, sha256: str, pause: Callable[[float], object] | None = None) -> list[bytes]:
        """Read a file whole; put it into quarantine when it no longer fits its name.

        Args: pause: called now and then with the seconds just spent reading.
        Returns: its running digests. Raises: as running_digests.
        """
        digest: RunningHash = hashlib.sha256()
        found = []
        begun = time.perf_counter()
        for data in read_chunks(self.path(sha256), past_cache=True):
            digest.update(data)
            found.append(digest.digest())
            if pause is not None and len(found) % 16 == 0:
                pause(time.perf_counter() - begun)
                begun = time.perf_counter()
        if digest.hexdigest() != sha256:
            self.objects.move(sha256, "objects", "quarantine")
            with self._lock:
                self._digests.pop(sha256, None)
            _LOG.critical("the file %s is damaged on disk and now in quarantine", sha256)
            raise CofuseError(
                "damaged_artifact", f"the store's copy of {sha256} has sha256 {digest.hexdigest()}"
            )
        return found

    def drop_partials(self, *, older_than_s: float) -> list[str]:
        """Delete unfinished files that nothing was added to for so long; return their names."""
        dropped = []
        for path in self._partial_files():
            try:
                old = time.time() - path.stat().st_mtime > older_than_s
            except FileNotFoundError:
                continue
            if old:
                partial = self._open(path)
                partial.drop()
                self._forget(partial)
                dropped.append(path.name)
        return dropped

    def _partial_path(self, sha256: str, sender: str) -> Path:
        return self._incoming / f"{checked_digest(sha256)}.{sender}"

    def _open(self, path: Path) -> Partial:
        with self._lock:
            return self._partials.setdefault(path.name, Partial(path))

    def _forget(self, partial: Partial) -> None:
        with self._lock:
            self._partials.pop(partial.path.name, None)

    def _partial_files(self, sender: str = "*") -> Iterator[Path]:
        found = self._incoming.glob(f"*.{sender}")
        return (path for path in found if path.suffix != ".journal")

    def _check_room(self, sender: str, partial: Partial, needed_bytes: int) -> None:
        if not partial.path.exists() and len(list(self._partial_files(sender))) >= MAX_PARTIALS:
            raise CofuseError(
                "too_many_uploads", f"found {MAX_PARTIALS} unfinished uploads of yours"
            )
        free = shutil.disk_usage(self._incoming).free
        if free - needed_bytes < self._reserve_bytes:
            raise CofuseError(
                "storage_full",
                f"{needed_bytes} bytes are to come and {free} are free, "
                f"of which {self._reserve_bytes} stay in reserve",
            )


def open_artifacts(data_dir: Path, url: str | None) -> Artifacts:
    """The artifact store of a coordinator.toml. Raises: ConfigError."""
    root = data_dir / "artifacts"
    if url is None:
        return Artifacts(root)
    try:
        from coordinator.object_store import ObjectStore
    except ImportError as error:
        raise ConfigError(f"artifacts: {url} needs obstore; install cofuse[s3]") from error
    return Artifacts(root, ObjectStore(url, root / "cache"))
