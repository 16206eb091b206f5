"""Where complete files lie: a directory here, or an object store by URL (object_store.py)."""

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final, Literal, NamedTuple, Protocol, TypeAlias

from protos.files import make_folder, sync

Shelf: TypeAlias = Literal["objects", "trash", "quarantine"]
"""objects: what is served. trash: what nobody needs, on its way out; asking brings it back.
quarantine: what no longer fits its name; kept to be looked at, never served."""
SHELVES: Final[tuple[Shelf, ...]] = ("objects", "trash", "quarantine")


class Stored(NamedTuple):
    """One file of a shelf."""

    sha256: str
    age_s: float
    """Since it came to this shelf."""


class Objects(Protocol):
    """Files by digest. What a method reports done survives a power cut."""

    @property
    def decays(self) -> bool:
        """Whether nobody else looks for files that no longer fit their names."""

    def check_writable(self) -> None:
        """Find out, within seconds, whether it takes files.

        Raises: CofuseError storage_unreachable.
        """

    def has(self, sha256: str) -> bool:
        """Whether it can be served."""

    def add(self, path: Path, sha256: str) -> None:
        """Take over a local file whose digest was checked."""

    def fetch(self, sha256: str) -> Path:
        """A local path to read it from, for as long as the process lives.

        Raises: FileNotFoundError.
        """

    def move(self, sha256: str, source: Shelf, target: Shelf) -> bool:
        """Put it on another shelf; whether it was on the first."""

    def remove(self, sha256: str, shelf: Shelf) -> None:
        """Delete it, if it is there."""

    def walk(self, shelf: Shelf) -> Iterator[Stored]:
        """All files of a shelf."""


class Directory:
    """objects/ab/abcd…, on a local disk."""

    def __init__(self, root: Path) -> None:
        self._root = root
        for shelf in SHELVES:
            make_folder(root / shelf)

    @property
    def decays(self) -> bool:
        """Yes: disks do."""
        return True

    def check_writable(self) -> None:
        """Nothing to ask: unfinished files lie on the same disk (artifacts.py writes there)."""

    def path(self, sha256: str, shelf: Shelf = "objects") -> Path:
        """Where the file is or would be."""
        return self._root / shelf / sha256[:2] / sha256

    def has(self, sha256: str) -> bool:
        """Whether it can be served."""
        return self.path(sha256).exists()

    def add(self, path: Path, sha256: str) -> None:
        """Take over a local file, which is on disk already."""
        self._place(path, self.path(sha256))

    def fetch(self, sha256: str) -> Path:
        """Its path. Raises: FileNotFoundError."""
        path = self.path(sha256)
        path.stat()
        return path

    def move(self, sha256: str, source: Shelf, target: Shelf) -> bool:
        """Put it on another shelf; whether it was on the first."""
        path = self.path(sha256, source)
        try:
            os.utime(path)  # its age starts anew
            self._place(path, self.path(sha256, target))
        except FileNotFoundError:
            return False
        return True

    def remove(self, sha256: str, shelf: Shelf) -> None:
        """Delete it, if it is there."""
        self.path(sha256, shelf).unlink(missing_ok=True)

    def walk(self, shelf: Shelf) -> Iterator[Stored]:
        """All files of a shelf."""
        now = time.time()
        for path in sorted((self._root / shelf).glob("??/*")):
            try:
                yield Stored(path.name, now - path.stat().st_mtime)
            except FileNotFoundError:  # moved meanwhile
                continue

    def _place(self, source: Path, final: Path) -> None:
        final.parent.mkdir(exist_ok=True)
        # Else a power cut could take the folder with the file. Each time: another thread may have
        # made it just now, and not come to this line yet.
        sync(final.parent.parent)
        source.rename(final)
        sync(final.parent)
