"""Complete files in an object store by URL: S3 and what speaks it, Google Cloud, Azure."""

import contextlib
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final

import obstore
from obstore.exceptions import BaseError
from obstore.store import from_url

from coordinator.objects import Shelf, Stored
from protos.chunks import sha256_of
from protos.errors import CofuseError
from protos.files import replace

_PART_BYTES: Final = 16 * 1024 * 1024
_CACHED_BYTES: Final = 64 * 2**30
"""Local copies of objects; the least lately read go first."""
_PROBE_S: Final = 5.0
"""A store that takes longer for one small object is unreachable: whoever asks must not hang."""
_PROBE_EVERY_S: Final = 60.0
"""Stores charge by the request; after a failure each question is a new one."""
_PROBE: Final = "writable"
"""The object that is written to find out; on no shelf."""


class ObjectStore:
    """shelf/ab/abcd… below a URL, and a cache of whole local copies, for those who need a path.

    Credentials come from the environment (AWS_ACCESS_KEY_ID, …), never from coordinator.toml.
    """

    def __init__(
        self,
        url: str,
        cache: Path,
        *,
        cached_bytes: int = _CACHED_BYTES,
        probe_s: float = _PROBE_S,
        **options: Any,
    ) -> None:
        """Args: url: s3://bucket/prefix, gs://…, az://…; options: obstore's own."""
        self._store = from_url(url, **options)
        self._impatient = from_url(url, **{**options, **_within(probe_s, options)})
        self._writable_until_s = 0.0
        self._cache = cache
        self._cached_bytes = cached_bytes
        self._lock = threading.Lock()
        self._checked: set[str] = set()
        cache.mkdir(parents=True, exist_ok=True)

    @property
    def decays(self) -> bool:
        """No: the store looks after its copies, and what comes from it is checked."""
        return False

    def check_writable(self) -> None:
        """Write a small object, unless one was taken within the last minute.

        Raises: CofuseError storage_unreachable, a few seconds later at the latest.
        """
        if time.monotonic() < self._writable_until_s:
            return
        with _reachable():
            obstore.put(self._impatient, _PROBE, b"0")
        self._writable_until_s = time.monotonic() + _PROBE_EVERY_S

    def has(self, sha256: str) -> bool:
        """Whether it can be served."""
        with _reachable():
            try:
                obstore.head(self._store, _key("objects", sha256))
            except FileNotFoundError:
                return False
        return True

    def add(self, path: Path, sha256: str) -> None:
        """Upload a local file, then keep it as the cached copy."""
        with _reachable():
            obstore.put(self._store, _key("objects", sha256), path, chunk_size=_PART_BYTES)
            stored = obstore.head(self._store, _key("objects", sha256))["size"]
        if stored != path.stat().st_size:
            raise CofuseError(
                "storage_unreachable",
                f"the object store holds {stored} bytes of {path.stat().st_size}",
            )
        replace(path, self._cache / sha256)
        self._shrink()

    def fetch(self, sha256: str) -> Path:
        """A local copy, checked. Raises: FileNotFoundError; CofuseError damaged_artifact."""
        final = self._cache / sha256
        with self._lock:
            if sha256 not in self._checked and final.exists() and sha256_of(final) != sha256:
                final.unlink()  # this disk's fault: the store still has the file
            if not final.exists():
                self._download(sha256, final)
            self._checked.add(sha256)
            final.touch()
        return final

    def move(self, sha256: str, source: Shelf, target: Shelf) -> bool:
        """Put it on another shelf; whether it was on the first."""
        with _reachable():
            try:
                obstore.rename(self._store, _key(source, sha256), _key(target, sha256))
            except FileNotFoundError:
                return False
        if target != "objects":
            (self._cache / sha256).unlink(missing_ok=True)
        return True

    def remove(self, sha256: str, shelf: Shelf) -> None:
        """Delete it, if it is there."""
        with _reachable(), contextlib.suppress(FileNotFoundError):
            obstore.delete(self._store, _key(shelf, sha256))

    def walk(self, shelf: Shelf) -> Iterator[Stored]:
        """All files of a shelf."""
        now = datetime.now(UTC)
        with _reachable():
            for page in obstore.list(self._store, f"{shelf}/"):
                for entry in page:
                    age = now - entry["last_modified"]
                    yield Stored(entry["path"].rpartition("/")[2], age.total_seconds())

    def _download(self, sha256: str, final: Path) -> None:
        partial = final.with_suffix(".part")
        with _reachable(), partial.open("wb") as out:
            for piece in obstore.get(self._store, _key("objects", sha256)):
                out.write(piece)
        if (found := sha256_of(partial)) != sha256:
            partial.unlink()
            self.move(sha256, "objects", "quarantine")
            raise CofuseError(
                "damaged_artifact", f"the store's copy of {sha256} has sha256 {found}"
            )
        replace(partial, final)
        self._shrink()

    def _shrink(self) -> None:
        """Drop copies, least lately read first; a reader that has one open keeps its bytes."""
        copies = sorted(self._cache.iterdir(), key=lambda path: path.stat().st_mtime)
        total = sum(path.stat().st_size for path in copies)
        for path in copies[:-1]:
            if total <= self._cached_bytes:
                return
            total -= path.stat().st_size
            path.unlink()


def _within(limit_s: float, options: dict[str, Any]) -> dict[str, Any]:
    """Options of a client that gives up after so long, and tries once."""
    limit = timedelta(seconds=limit_s)
    client = {**options.get("client_options", {}), "timeout": limit, "connect_timeout": limit}
    return {"client_options": client, "retry_config": {"max_retries": 0, "retry_timeout": limit}}


def _key(shelf: Shelf, sha256: str) -> str:
    return f"{shelf}/{sha256[:2]}/{sha256}"


@contextlib.contextmanager
def _reachable() -> Iterator[None]:
    """Say in the catalogue's words that the store does not answer or does not let us in."""
    try:
        yield
    except FileNotFoundError:
        raise
    except BaseError as error:
        says = f"the object store answered: {str(error).splitlines()[0][:300]}"
        raise CofuseError("storage_unreachable", says) from error
