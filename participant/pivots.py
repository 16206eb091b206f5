"""A round's pivot comes in: believed only as far as its signer vouches for it."""

from pathlib import Path
from typing import Final, Protocol

from participant.config import ParticipantConfig
from protos.messages import Assignment, FileRef
from trust.pivot_folder import Trust, receive
from trust.pivot_manifest import SIGNER_FILE, ManifestError
from trust.pivots_seen import PIVOTS_SEEN

WEIGHTS: Final = "model.safetensors"


class Fetches(Protocol):
    """Whoever brings public files."""

    def fetch(self, reference: FileRef, folder: Path) -> Path:
        """Bring a file into a folder, named as the reference says; check its digest."""
        ...


def fetch_pivot(
    config: ParticipantConfig, assignment: Assignment, client: Fetches, folder: Path
) -> None:
    """Bring the assignment's pivot to `folder`, before anything reads a file of it.

    Raises: ManifestError when manifest, version, time or a file is not what the signer says; what
        the client raises.
    """
    trust = Trust(
        signer=config.tls.ca.with_name(SIGNER_FILE),
        seen=config.data_dir / PIVOTS_SEEN,
        older=config.older_pivots,
    )
    name = assignment.spec.pivot
    manifest = receive(name, assignment.pivot, client.fetch, folder, trust)
    weights = {file.sha256 for file in manifest.files if file.name == WEIGHTS}
    if weights != {assignment.pivot_sha256}:
        raise ManifestError(
            f"the round asks for weights {assignment.pivot_sha256[:16]}, which are not those of "
            f"{name}: tell the operator"
        )
