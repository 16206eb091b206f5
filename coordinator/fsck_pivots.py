"""What the pivots' manifests say, against what the tables say: a part of I3 of fsck."""

from collections.abc import Iterator

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from coordinator.artifacts import Artifacts
from coordinator.records import Records
from coordinator.tables import PivotRow
from trust.pivot_manifest import (
    MANIFEST_FILE,
    Manifest,
    ManifestError,
    check_offer,
    open_manifest,
)


def unsigned(records: Records, artifacts: Artifacts, signer: Ed25519PublicKey) -> Iterator[str]:
    """What no receiver would take: each pivot whose manifest is not ours, or not true.

    One that has none is of an older release; the coordinator's next start signs it.
    Args: signer: the public half of the pivots' key.
    """
    manifests: dict[str, Manifest] = {}
    for pivot in records.pivots:
        if MANIFEST_FILE not in {file.name for file in pivot.files}:
            continue
        try:
            manifests[pivot.name] = _manifest(pivot, artifacts, signer)
        except (ManifestError, OSError) as error:
            yield f"{pivot.name}: {error}"
    for pivot in records.pivots:
        made, before = manifests.get(pivot.name), manifests.get(pivot.parent)
        if made is None or before is None:
            continue
        told = made.parent.content_sha256 if made.parent is not None else ""
        if told != before.content_sha256:
            yield f"{pivot.name}: its manifest names another {pivot.parent} than the one here"


def _manifest(pivot: PivotRow, artifacts: Artifacts, signer: Ed25519PublicKey) -> Manifest:
    """Raises: ManifestError, OSError."""
    files = {file.name: file for file in pivot.files}
    if not artifacts.has(files[MANIFEST_FILE].sha256):
        raise ManifestError("its manifest is lost")
    made = open_manifest(artifacts.path(files[MANIFEST_FILE].sha256).read_bytes(), signer)
    said = (made.name, made.parent.name if made.parent is not None else "")
    if said != (pivot.name, pivot.parent):
        raise ManifestError(f"its manifest is of {' from '.join(filter(None, said))}")
    check_offer(made, [(file.name, file.sha256, file.size_bytes) for file in pivot.files])
    return made
