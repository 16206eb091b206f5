"""What a pivot is, signed: every file's digest, where it comes from, and until when it counts.

An in-toto statement in a DSSE envelope. It lies among the pivot's files, is fetched first, and is
all that is believed before the others are. A manifest may be issued again, with a later expiry;
what it says of the pivot itself never changes, and `content_sha256` is the name of that.
"""

import hashlib
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any, Final, Literal

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from trust.canonical import canonical
from trust.dsse import EnvelopeError, parse_canonical, seal, unseal
from trust.keys import kid

MANIFEST_FILE: Final = "manifest.dsse.json"
SIGNER_FILE: Final = "pivot-signer.pem"
"""The signer's public key, beside ca.pem wherever that lies."""
LIFETIME: Final = timedelta(days=90)
CLOCK_SKEW: Final = timedelta(minutes=5)
MAX_FILES: Final = 512
PAYLOAD_TYPE: Final = "application/vnd.in-toto+json"
STATEMENT_TYPE: Final = "https://in-toto.io/Statement/v1"
PREDICATE_TYPE: Final = "cofuse/pivot/1"

Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
Name = Annotated[str, StringConstraints(pattern=r"^pivot-(0|[1-9][0-9]{0,8})$")]
FileName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")]
Time = Annotated[str, StringConstraints(pattern=r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ$")]
Line = Annotated[str, StringConstraints(max_length=200)]


class ManifestError(ValueError):
    """A pivot is not what its signer vouches for; the message says what helps."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class PivotFile(_Strict):
    """One file of a pivot."""

    name: FileName
    sha256: Sha256
    size_bytes: int = Field(ge=0)


class Parent(_Strict):
    """The pivot that this one was made from."""

    name: Name
    content_sha256: Sha256


class Input(_Strict):
    """A contribution that went into a pivot."""

    participant: Line
    sha256: Sha256
    size_bytes: int = Field(ge=0)


class Manifest(_Strict):
    """What the signer says of one pivot."""

    name: Name
    root: Name
    """The first pivot of its lineage."""
    parent: Parent | None
    files: tuple[PivotFile, ...] = Field(min_length=1, max_length=MAX_FILES, strict=False)
    created: Time
    round_id: Line
    """Empty for one that was imported, or rolled back to."""
    method: Line
    """"import", "rollback", or kind and method of the round."""
    restores: Literal[""] | Name
    """The pivot whose files these are again; empty unless rolled back to."""
    inputs: tuple[Input, ...] = Field(max_length=4096, strict=False)
    evals: dict[str, dict[str, Line]]
    """The pivot's own scores by measure and domain; decimal numbers, as texts."""
    issued: Time
    expires: Time
    signer: Sha256
    """The kid of the key that signs."""

    @property
    def version(self) -> int:
        """The number in its name: a later pivot's is higher."""
        return int(self.name.rpartition("-")[2])

    @property
    def content_sha256(self) -> str:
        """Digest of all that stays when the manifest is issued again."""
        lasting = self.model_dump(exclude={"issued", "expires", "signer"})
        return hashlib.sha256(canonical(lasting)).hexdigest()


def utc(moment: datetime) -> str:
    """RFC 3339, to the second."""
    return moment.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def moment_of(text: str) -> datetime:
    """The moment that utc() wrote. Raises: ManifestError for a day that does not exist."""
    try:
        return datetime.strptime(text, "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=UTC)
    except ValueError:
        raise ManifestError(f"found the time {text!r}, wanted one that exists") from None


def seal_manifest(manifest: Manifest, key: Ed25519PrivateKey) -> bytes:
    """Sign a manifest whose `signer` is the key's kid; return the envelope."""
    assert manifest.signer == kid(key.public_key())
    predicate = manifest.model_dump(exclude={"files"})
    subject = [
        {
            "name": file.name,
            "digest": {"sha256": file.sha256},
            "annotations": {"size_bytes": file.size_bytes},
        }
        for file in manifest.files
    ]
    statement = {
        "_type": STATEMENT_TYPE,
        "subject": subject,
        "predicateType": PREDICATE_TYPE,
        "predicate": predicate,
    }
    return seal(PAYLOAD_TYPE, canonical(statement), key)


def open_manifest(raw: bytes, signer: Ed25519PublicKey) -> Manifest:
    """Check the signature, then read what was signed; whether it counts today is not asked.

    Raises: ManifestError.
    """
    wanted = kid(signer)
    try:
        manifest = _manifest(parse_canonical(unseal(raw, PAYLOAD_TYPE, {wanted: signer})))
    except (EnvelopeError, ValidationError, LookupError, TypeError, AttributeError) as error:
        says = " ".join(str(error).split())[:300]
        raise ManifestError(
            f"the manifest is not to be believed: {says}; if the coordinator has a new key, get "
            f"its {SIGNER_FILE} from the operator and compare the fingerprint"
        ) from None
    names = [file.name for file in manifest.files]
    if len(set(names)) < len(names) or MANIFEST_FILE in names:
        raise ManifestError("the manifest names a file twice, or itself: tell the operator")
    if manifest.signer != wanted:
        raise ManifestError(f"signed by {wanted[:16]}, but says {manifest.signer[:16]}")
    return manifest


def check_current(manifest: Manifest, name: str, now: datetime) -> None:
    """Refuse another pivot than the one asked for, and a manifest that does not count today.

    Raises: ManifestError.
    """
    if manifest.name != name:
        raise ManifestError(f"asked for {name}, found the manifest of {manifest.name}")
    if moment_of(manifest.issued) > now + CLOCK_SKEW:
        raise ManifestError(
            f"{name}: its manifest is of {manifest.issued}, here it is {utc(now)}: set the clock"
        )
    if moment_of(manifest.expires) <= now:
        raise ManifestError(
            f"{name}: its manifest expired {manifest.expires}, here it is {utc(now)}: fetch it "
            "again; a coordinator that runs issues it anew in time"
        )


def check_offer(manifest: Manifest, offered: Sequence[tuple[str, str, int]]) -> None:
    """Refuse files (name, sha256, size) that are not exactly the manifest's. Raises ManifestError.

    The manifest's own file may be among them.
    """
    wanted = {(file.name, file.sha256, file.size_bytes) for file in manifest.files}
    found = {file for file in offered if file[0] != MANIFEST_FILE}
    if odd := sorted(name for name, _, _ in found ^ wanted):
        raise ManifestError(
            f"{manifest.name}: {', '.join(dict.fromkeys(odd[:6]))}: not the files that its "
            "manifest lists; tell the operator"
        )


def _manifest(statement: dict[str, Any]) -> Manifest:
    kinds = (statement["_type"], statement["predicateType"])
    if len(statement) != 4 or kinds != (STATEMENT_TYPE, PREDICATE_TYPE):
        raise ManifestError(f"a statement of {str(kinds)[:100]}, wanted {PREDICATE_TYPE}")
    files = []
    for subject in statement["subject"]:
        if subject.keys() != {"name", "digest", "annotations"}:
            raise ManifestError(f"a file with {sorted(subject)[:8]}")
        files.append({"name": subject["name"], **subject["digest"], **subject["annotations"]})
    return Manifest.model_validate({**statement["predicate"], "files": files})
