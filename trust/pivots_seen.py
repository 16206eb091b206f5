"""The newest pivot that was ever accepted, so that nobody passes off an older one as new.

One JSON file, outside every model folder: whoever can replace a model cannot turn this back.
"""

import fcntl
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Final

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from trust.files import replace_with
from trust.pivot_manifest import Manifest, ManifestError, Name, Sha256

PIVOTS_SEEN: Final = "pivots-seen.json"
"""The file's name: in a participant's data folder, or beside a researcher's key."""
MAX_SEEN_BYTES: Final = 16 << 20


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class _Lineage(_Strict):
    """One signer's pivots of one root."""

    version: int = Field(ge=0)
    """The highest."""
    pivots: dict[Name, Sha256]
    """Each one's content_sha256."""


class _Seen(_Strict):
    lineages: dict[Annotated[str, Field(max_length=100)], _Lineage] = {}
    """By "signer's kid/root"."""


def check_seen(path: Path, manifest: Manifest, *, older: bool = False) -> None:
    """Refuse a pivot that takes us back, or that is another one than we know by its name.

    Args: path: the file of note_seen; none yet is no objection. older: our keeper means it: an
        older version is let through, but never another content.
    Raises: ManifestError.
    """
    lineage = _read(path).lineages.get(_key(manifest))
    if lineage is None:
        return
    if lineage.version > manifest.version and not older:
        raise ManifestError(
            f"{manifest.name} is older than pivot-{lineage.version}, which was accepted before: "
            "take the newest, or say that the older one is meant (pull --older; older_pivots in "
            "participant.toml)"
        )
    known = lineage.pivots.get(manifest.name, manifest.content_sha256)
    if known != manifest.content_sha256:
        raise ManifestError(
            f"two different pivots bear the name {manifest.name}: accepted was content "
            f"{known[:16]}, found {manifest.content_sha256[:16]}: use neither, tell the operator"
        )


def note_seen(path: Path, manifest: Manifest) -> None:
    """Remember an accepted pivot; it is on disk when this returns. Raises: ManifestError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with _alone(path):
        seen, key = _read(path), _key(manifest)
        before = seen.lineages.get(key, _Lineage(version=0, pivots={}))
        after = _Lineage(
            version=max(before.version, manifest.version),
            pivots={**before.pivots, manifest.name: manifest.content_sha256},
        )
        if after != before:
            text = _Seen(lineages={**seen.lineages, key: after}).model_dump_json(indent=1)
            replace_with(path, f"{text}\n".encode(), 0o644)


def _key(manifest: Manifest) -> str:
    return f"{manifest.signer}/{manifest.root}"


def _read(path: Path) -> _Seen:
    try:
        with path.open("rb") as file:
            return _Seen.model_validate(json.loads(file.read(MAX_SEEN_BYTES)))
    except FileNotFoundError:
        return _Seen()
    except (ValueError, ValidationError, RecursionError) as error:
        raise ManifestError(
            f"{path} cannot be read ({type(error).__name__}), so nobody knows which pivots were "
            "accepted before: restore it, or move it away to begin anew"
        ) from None


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    with path.with_name(f".{path.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
