"""The coordinator's word for a pivot: every one has a manifest, signed and not expired.

A manifest is a file of its pivot like the others: bytes first, then the row that names it. What it
says of the pivot is said once; issued again, it only counts for longer.
"""

import hashlib
import json
import logging
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from coordinator.artifacts import Artifacts
from coordinator.audit import COORDINATOR
from coordinator.clock import now_unix_ms
from coordinator.store import ContributionRow, PivotRow, Store
from protos.errors import CofuseError
from protos.messages import FileRef
from trust.keys import kid, load_private, load_public, new_key, save_public
from trust.pivot_folder import check_contents
from trust.pivot_manifest import (
    LIFETIME,
    MANIFEST_FILE,
    SIGNER_FILE,
    Input,
    Manifest,
    ManifestError,
    Parent,
    PivotFile,
    moment_of,
    open_manifest,
    seal_manifest,
    utc,
)
from trust.statements import Receipt, sign

_LOG = logging.getLogger(__name__)
SIGNER_KEY: Final = "pivot-key.pem"
_TRIES: Final = 5


def ensure_key(tls_key: Path, ca: Path) -> Path:
    """Make the signing key beside the TLS key unless it is there, its public half beside ca.pem.

    Returns: the private key's path. Raises: KeyFileError, OSError.
    """
    path = tls_key.with_name(SIGNER_KEY)
    if not path.exists():
        new_key(path)
    key, public = load_private(path).public_key(), ca.with_name(SIGNER_FILE)
    if not public.exists() or kid(load_public(public)) != kid(key):
        save_public(key, public)
    return path


class Signer:
    """Signs pivots, and keeps their manifests from expiring."""

    def __init__(self, store: Store, artifacts: Artifacts, key: Path) -> None:
        """Args: key: as ensure_key made it. Raises: KeyFileError, OSError."""
        self._store = store
        self._artifacts = artifacts
        self._key = load_private(key)
        self.kid = kid(self._key.public_key())

    def sign(self, row: PivotRow) -> tuple[FileRef, ...]:
        """Write the manifest of a pivot that is about to be stored.

        Returns: its files, the manifest among them. Raises: CofuseError bad_request when no
            receiver would take it.
        """
        files = [file for file in row.files if file.name != MANIFEST_FILE]
        try:
            if len({file.name for file in files}) < len(files):
                raise ManifestError("a name comes twice among its files")
            check_contents({file.name: self._artifacts.path(file.sha256) for file in files})
            return (*files, self._keep(self._describe(row, files)))
        except (ManifestError, ValueError) as error:
            raise CofuseError("bad_request", f"{row.name}: {error}".rstrip(".")) from error

    def renew(self) -> None:
        """Sign every pivot that has no manifest yet, or one past half its life, or another's."""
        for row in self._store.pivots():
            try:
                self._current(row)
            except (CofuseError, OSError) as error:  # a damaged one must not take the others along
                _LOG.warning("%s cannot be signed, and nobody will take it: %s", row.name, error)

    def manifest(self, row: PivotRow) -> Manifest | None:
        """What was signed of a pivot; None when it is not signed by this key."""
        files = {file.name: file for file in row.files}
        if MANIFEST_FILE not in files:
            return None
        raw = self._artifacts.path(files[MANIFEST_FILE].sha256).read_bytes()
        try:
            return open_manifest(raw, self._key.public_key())
        except ManifestError as error:
            _LOG.warning("%s is signed anew: %s", row.name, error)
            return None

    def receipt(self, kept: ContributionRow) -> str:
        """Sign that a contribution is on disk and counted; asked again, it is the same text."""
        return sign(
            Receipt(
                sha256=kept.sha256,
                round_id=kept.round_id,
                participant=kept.participant,
                size_bytes=kept.size_bytes,
                committed_unix_ms=kept.committed_unix_ms,
            ),
            self._key,
        )

    def roll_back(self, name: str, by: str = COORDINATOR) -> PivotRow:
        """Publish what a pivot was made from once more, as the newest; repeating changes nothing.

        A number that only rises is what keeps others from passing an old pivot off as new: so the
        way back is a new number with the old files.
        Raises: CofuseError unknown_pivot, or wrong_state when it was made from none.
        """
        row = self._store.pivot(name)
        if not row.parent:
            raise CofuseError("wrong_state", f"{name} was imported: there is nothing to go back to")
        target = self._store.pivot(row.parent)
        done = [p for p in self._store.pivots() if p.parent == name and not p.round_id]
        for _ in range(_TRIES if not done else 0):
            new = replace(
                target,
                name=self._store.free_pivot_name(),
                parent=name,
                round_id="",
                created_unix_ms=now_unix_ms(),
            )
            try:
                return self._store.add_pivot(
                    name=new.name,
                    parent=name,
                    round_id="",
                    files=self.sign(new),
                    evals_json=new.evals_json,
                    by=by,
                )
            except CofuseError as error:  # a round has taken the name meanwhile
                _LOG.info("another name for the rollback: %s", error)
        if not done:
            raise CofuseError("store_unavailable", "other pivots took every name")
        return done[-1]

    def _current(self, row: PivotRow) -> Manifest:
        """The manifest of a stored pivot, signed (again) where it must be."""
        found = self.manifest(row)
        now = datetime.now(UTC)
        if found is not None and moment_of(found.expires) - now > LIFETIME / 2:
            return found
        files = [file for file in row.files if file.name != MANIFEST_FILE]
        manifest = self._describe(row, files) if found is None else self._issued(found)
        self._store.replace_manifest(row.name, self._keep(manifest))
        return manifest

    def _issued(self, manifest: Manifest) -> Manifest:
        now = datetime.now(UTC)
        again = {"issued": utc(now), "expires": utc(now + LIFETIME), "signer": self.kid}
        return manifest.model_copy(update=again)

    def _describe(self, row: PivotRow, files: Sequence[FileRef]) -> Manifest:
        above = self._store.pivot(row.parent) if row.parent else None
        parent = self._current(above) if above else None
        # Who has a parent and no round was rolled back to: it is what its parent was made from.
        restores = above.parent if above and not row.round_id else ""
        described = Manifest(
            name=row.name,
            root=parent.root if parent else row.name,
            parent=None if parent is None else _named(parent),
            files=tuple(PivotFile(**file.model_dump()) for file in files),
            created=utc(datetime.fromtimestamp(row.created_unix_ms / 1000, UTC)),
            round_id=row.round_id,
            method="rollback" if restores else self._method(row.round_id),
            restores=restores,
            inputs=self._inputs(row.round_id),
            evals=own_scores(json.loads(row.evals_json)),
            issued=utc(datetime.now(UTC)),
            expires=utc(datetime.now(UTC)),
            signer=self.kid,
        )
        return self._issued(described)

    def _method(self, round_id: str) -> str:
        if not round_id:
            return "import"
        spec = json.loads(self._store.round(round_id).spec_json)
        return f"{spec.get('kind', '')}/{spec.get('method', '')}"

    def _inputs(self, round_id: str) -> tuple[Input, ...]:
        parts = self._store.contributions(round_id) if round_id else []
        return tuple(
            Input(participant=part.participant, sha256=part.sha256, size_bytes=part.size_bytes)
            for part in parts
            if part.status == "committed"
        )

    def _keep(self, manifest: Manifest) -> FileRef:
        """Make the signed manifest an artifact."""
        raw = seal_manifest(manifest, self._key)
        sha256 = hashlib.sha256(raw).hexdigest()
        with tempfile.NamedTemporaryFile(prefix="manifest-") as file:
            file.write(raw)
            file.flush()
            self._artifacts.add(Path(file.name), sha256)
        self._store.add_artifact(sha256, "coordinator", "PIVOT", len(raw))
        return FileRef(name=MANIFEST_FILE, sha256=sha256, size_bytes=len(raw))


def _named(parent: Manifest) -> Parent:
    return Parent(name=parent.name, content_sha256=parent.content_sha256)


def own_scores(evals: dict[str, Any]) -> dict[str, dict[str, str]]:
    """The pivot's own row of the tables in evals.json: by measure and domain, as decimal texts."""
    own = evals.get("pivot", "")
    return {
        measure: {domain: f"{value:.6g}" for domain, value in evals[measure][own].items()}
        for measure in ("bpb", "accuracy", "letter", "written")
        if own in evals.get(measure, {})
    }


Sign = Callable[[PivotRow], tuple[FileRef, ...]]
"""Signer.sign, for those who only need that."""
