"""A pivot comes in: the manifest first, then its files, and nothing is parsed before all fit.

It is put together beside the place where it goes, and takes it by a rename: whatever is refused,
the pivot that was there before stays.
"""

import hashlib
import os
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Protocol, TypeVar

from trust.dsse import MAX_ENVELOPE_BYTES
from trust.keys import KeyFileError, load_public
from trust.model_config import (
    MAX_CONFIG_BYTES,
    SMALL_JSON,
    ConfigRefusedError,
    check_file_name,
    check_plain_yaml,
    check_small_json,
)
from trust.pivot_manifest import (
    MANIFEST_FILE,
    SIGNER_FILE,
    Manifest,
    ManifestError,
    check_current,
    check_offer,
    open_manifest,
)
from trust.pivots_seen import check_seen, note_seen
from trust.safetensors_header import HeaderError, read_header


class Offered(Protocol):
    """A file that somebody offers."""

    @property
    def name(self) -> str:
        """Its plain name."""
        ...

    @property
    def sha256(self) -> str:
        """Its digest, in hex."""
        ...

    @property
    def size_bytes(self) -> int:
        """Its size."""
        ...


_Offered = TypeVar("_Offered", bound=Offered)


@dataclass(frozen=True, slots=True, kw_only=True)
class Trust:
    """What a receiver believes, and what it remembers."""

    signer: Path
    """The coordinator's pivot-signer.pem."""
    seen: Path
    """Which pivots were accepted; outside every model folder."""
    older: bool = False
    """Whether an older version than one that was accepted will do."""

    def open(self, raw: bytes, name: str) -> Manifest:
        """Believe a manifest, or raise ManifestError: signer, name, time, and what was seen."""
        try:
            signer = load_public(self.signer)
        except (OSError, KeyFileError) as error:
            raise ManifestError(
                f"{self.signer}: no key to check pivots with ({error}): get {SIGNER_FILE} from the "
                "operator, put it there, and compare its fingerprint"
            ) from None
        manifest = open_manifest(raw, signer)
        check_current(manifest, name, datetime.now(UTC))
        check_seen(self.seen, manifest, older=self.older)
        return manifest


def receive(
    name: str,
    offered: Sequence[_Offered],
    get: Callable[[_Offered, Path], object],
    folder: Path,
    trust: Trust,
) -> Manifest:
    """Bring a pivot to `folder`, if all of it is what its signer vouches for.

    Args: get: puts an offered file into a folder, under its name. folder: a pivot in it is
        replaced; anything else is left alone.
    Raises: ManifestError; what `get` raises. Then `folder` is as it was.
    """
    _check_place(folder, trust)
    incoming = folder.with_name(f".{folder.name}.incoming")
    incoming.mkdir(parents=True, exist_ok=True)
    manifest = receive_manifest(name, offered, get, incoming, trust)
    check_offer(manifest, [(file.name, file.sha256, file.size_bytes) for file in offered])
    names = {file.name for file in offered}
    for path in list(incoming.iterdir()):  # of an older try
        if path.name not in names and path.suffix != ".part":
            path.unlink()
    for file in offered:
        if not _is_here(file, incoming, folder):
            get(file, incoming)
    for part in incoming.glob("*.part"):
        part.unlink()
    check_folder(incoming, manifest)
    note_seen(trust.seen, manifest)
    _replace(incoming, folder)
    return manifest


def receive_manifest(
    name: str,
    offered: Iterable[_Offered],
    get: Callable[[_Offered, Path], object],
    folder: Path,
    trust: Trust,
) -> Manifest:
    """Bring a pivot's manifest to `folder`, and believe it or raise ManifestError."""
    refs = [file for file in offered if file.name == MANIFEST_FILE]
    if len(refs) != 1 or refs[0].size_bytes > MAX_ENVELOPE_BYTES:
        raise ManifestError(
            f"{name} comes without a signed manifest: the operator starts this release's "
            "coordinator once, which signs what it has"
        )
    (folder / MANIFEST_FILE).unlink(missing_ok=True)
    get(refs[0], folder)
    return trust.open((folder / MANIFEST_FILE).read_bytes(), name)


def check_folder(folder: Path, manifest: Manifest) -> None:
    """Refuse a folder that is not the manifest's pivot, to the last byte. Raises: ManifestError.

    Names, sizes and digests first; only then the headers and settings are looked at.
    """
    wanted = {file.name: file for file in manifest.files}
    found = {path.name for path in folder.iterdir()} - {MANIFEST_FILE}
    if odd := sorted(found ^ wanted.keys()):
        raise ManifestError(f"{folder}: {', '.join(odd[:6])}: missing, or not in the manifest")
    for name, file in wanted.items():
        path = folder / name
        if path.is_symlink() or path.stat().st_size != file.size_bytes:
            raise ManifestError(f"{path} has another size than in the manifest: fetch it again")
        if _sha256(path) != file.sha256:
            raise ManifestError(f"{path} is not the file of the manifest: fetch it again")
    check_contents({name: folder / name for name in wanted})


def check_contents(files: dict[str, Path]) -> None:
    """Look at what parsers would read: names, headers of tensors, settings. Raises: ManifestError.

    Args: files: where the bytes of each of the pivot's files lie.
    """
    for name, path in files.items():
        try:
            if name != MANIFEST_FILE:
                check_file_name(name)
            if name.endswith(".safetensors"):
                read_header(path)
            elif name in SMALL_JSON:
                with path.open("rb") as file:
                    check_small_json(name, file.read(MAX_CONFIG_BYTES + 1))
            elif name.endswith(".yaml"):
                with path.open("rb") as file:
                    check_plain_yaml(name, file.read(MAX_CONFIG_BYTES + 1))
        except (HeaderError, ConfigRefusedError) as error:
            raise ManifestError(f"{name} of the pivot is not to be loaded: {error}") from None


def _check_place(folder: Path, trust: Trust) -> None:
    """Only a pivot, or nothing, is ever replaced. Raises: ManifestError."""
    if not folder.exists() or not any(folder.iterdir()):
        return
    try:
        raw = (folder / MANIFEST_FILE).read_bytes()
        known = {file.name for file in open_manifest(raw, load_public(trust.signer)).files}
    except (OSError, ValueError):
        known = set()
    others = sorted({path.name for path in folder.iterdir()} - known - {MANIFEST_FILE})
    if others:
        raise ManifestError(
            f"{folder} holds {', '.join(others[:4])}, which belongs to no pivot: give another "
            "folder, or move it away"
        )


def _is_here(file: Offered, incoming: Path, folder: Path) -> bool:
    """Whether a file need not be sent: an older try brought it, or the pivot before has it too."""
    path, before = incoming / file.name, folder / file.name
    if path.exists() and _sha256(path) == file.sha256:
        return True
    path.unlink(missing_ok=True)  # never written over: it may be a link to a file in use
    if before.exists() and _sha256(before) == file.sha256:
        os.link(before, path)
    return path.exists()


def _replace(incoming: Path, folder: Path) -> None:
    old = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    incoming.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
