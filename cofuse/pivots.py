"""Taking pivots home: what the coordinator signed is believed, and nothing else it sends."""

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from protos.errors import CofuseError, RemoteError
from protos.messages import FileRef
from trust.pivot_folder import Trust, receive, receive_manifest
from trust.pivot_manifest import Manifest, ManifestError


@dataclass(frozen=True, slots=True)
class PivotReceiver:
    """Where pivots come from, and how far they are believed."""

    files_of: Callable[[str], Sequence[FileRef]]
    """What the coordinator offers under a pivot's name."""
    get: Callable[[FileRef, Path], object]
    """Puts an offered file into a folder."""
    trust: Trust

    def download(self, name: str, folder: Path, *, older: bool) -> Path:
        """Bring a pivot to a folder. Raises: RemoteError untrusted_pivot; nothing has changed."""
        trust, folder = replace(self.trust, older=older), folder.resolve()
        with _believed():
            receive(name, self.files_of(name), self.get, folder, trust)
        return folder

    def manifest(self, name: str) -> Manifest:
        """What was signed of a pivot, however old it is. Raises: RemoteError untrusted_pivot."""
        trust = replace(self.trust, older=True)
        with _believed(), tempfile.TemporaryDirectory() as folder:
            return receive_manifest(name, self.files_of(name), self.get, Path(folder), trust)

    def lineage(self, name: str) -> list[Manifest]:
        """The manifests from the first pivot to this one, each the one that its child names.

        Raises: RemoteError untrusted_pivot.
        """
        line = [self.manifest(name)]
        while (parent := line[0].parent) is not None:
            found = self.manifest(parent.name)
            with _believed():
                if found.content_sha256 != parent.content_sha256 or found.root != line[0].root:
                    raise ManifestError(
                        f"{parent.name} is not the pivot that {line[0].name} was made from"
                    )
            line.insert(0, found)
        return line


@contextmanager
def _believed() -> Iterator[None]:
    try:
        yield
    except ManifestError as error:
        refusal = CofuseError("untrusted_pivot", str(error).rstrip("."))
        raise RemoteError("untrusted_pivot", str(refusal)) from error
