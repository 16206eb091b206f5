"""What one party signs for another to keep: releases, receipts, approvals, orders, promotions.

Each is an in-toto statement about one file, named by its sha256, in a DSSE envelope. The type says
what is said, so that a receipt never passes for an approval, whoever holds the key.
"""

import base64
import json
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Final, TypeVar

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from trust.canonical import canonical
from trust.dsse import EnvelopeError, parse_canonical, seal, unseal
from trust.keys import kid
from trust.pivot_manifest import PAYLOAD_TYPE, STATEMENT_TYPE, Sha256, Time

Name = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9-]{0,39}$")]
Line = Annotated[str, StringConstraints(max_length=500)]
_PublicKey = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]


class StatementError(ValueError):
    """Something was not signed by whom it should be, or says what cannot be read."""


class Statement(BaseModel):
    """What is said of one file."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)
    predicate_type: ClassVar[str]

    sha256: Sha256
    """The file that it is about."""


class Release(Statement):
    """A participant's guard: this file, and no other, is our contribution to this round."""

    predicate_type: ClassVar[str] = "cofuse/release/1"
    round_id: Name
    participant: Name
    kind: Line
    """As the policy names it: logits, grown, pairs, weights."""
    size_bytes: int = Field(ge=0)
    submitted_by: Line
    model: Sha256
    """Names the model that it tells of (participant/budget.py)."""
    prompt_set: str
    """Its sha256; empty for weights."""
    positions: int = Field(ge=0)
    policy_sha256: str
    """Of the policy.toml that allowed it."""
    key: _PublicKey
    """Of the key that signs, raw and in hex: the first one that is seen is the one to keep."""


class Receipt(Statement):
    """A coordinator: this contribution, sealed as it came, is on disk and counted."""

    predicate_type: ClassVar[str] = "cofuse/receipt/1"
    round_id: Name
    participant: Name
    size_bytes: int = Field(ge=0)
    committed_unix_ms: int = Field(ge=0)


class Approval(Statement):
    """A person of an institution: these sealed bytes may leave, or may not."""

    predicate_type: ClassVar[str] = "cofuse/approval/2"
    round_id: Line
    approved: bool
    by: Line
    why: Line
    gates: Line
    """The canary gate's figures, as the person saw them."""
    unix_ms: int = Field(ge=0)


class Order(Statement):
    """Who may submit rounds: hold this one. The file is the spec's text."""

    predicate_type: ClassVar[str] = "cofuse/order/1"
    spec: Annotated[str, StringConstraints(max_length=30_000)]
    """JSON of protos/spec.py, or of protos/recurring.py."""
    recurring: bool
    """Whether it orders rounds by the calendar: each with a newer pivot, and else the same."""
    submitted_by: Line
    """URI of the identity that signs."""
    nonce: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_-]{1,64}$")]
    """The request's id: an order is carried out once."""
    issued: Time
    not_after: Time


class Promotion(Statement):
    """An operator: this pivot may be used. The digest is of its manifest's content."""

    predicate_type: ClassVar[str] = "cofuse/promotion/1"
    pivot: Name
    by: Line
    """URI of the identity that signs."""
    issued: Time


_Kind = TypeVar("_Kind", bound=Statement)
MAX_STATEMENT_BYTES: Final = 128 * 1024


def sign(statement: Statement, key: Ed25519PrivateKey) -> str:
    """Sign a statement; return the envelope, which is JSON text."""
    return seal(PAYLOAD_TYPE, payload_of(statement), key).decode("utf-8")


def verify(kind: type[_Kind], raw: str, *keys: Ed25519PublicKey) -> _Kind:
    """The statement that one of `keys` has signed. Raises: StatementError."""
    try:
        payload = unseal(raw.encode("utf-8"), PAYLOAD_TYPE, {kid(key): key for key in keys})
    except (EnvelopeError, UnicodeEncodeError) as error:
        raise StatementError(f"{kind.predicate_type}: {error}") from None
    return parse_payload(kind, payload)


def verify_release(raw: str, known: Ed25519PublicKey | None) -> tuple[Release, Ed25519PublicKey]:
    """A release, and the key that signed it: `known`, or where none is, the one that it names.

    Raises: StatementError.
    """
    key = known or _named_key(raw)
    release = verify(Release, raw, key)
    if release.key != raw_hex(key):
        raise StatementError(f"signed by key {kid(key)[:16]}, but names another")
    return release, key


def raw_hex(key: Ed25519PublicKey) -> str:
    """A public key's 32 bytes, in hex."""
    return key.public_bytes(Encoding.Raw, PublicFormat.Raw).hex()


def payload_of(statement: Statement) -> bytes:
    """The bytes that are signed: an in-toto statement in its one spelling."""
    subject = {"name": statement.predicate_type, "digest": {"sha256": statement.sha256}}
    return canonical(
        {
            "_type": STATEMENT_TYPE,
            "subject": [subject],
            "predicateType": statement.predicate_type,
            "predicate": statement.model_dump(exclude={"sha256"}),
        }
    )


def parse_payload(kind: type[_Kind], payload: bytes) -> _Kind:
    """Read what payload_of wrote, once a signature was found good. Raises: StatementError."""
    try:
        found: Mapping[str, Any] = parse_canonical(payload)
        (subject,) = found["subject"]
        says = kind.model_validate({**found["predicate"], **subject["digest"]})
        if payload_of(says) != payload:
            raise ValueError("it says more, or is of another type")
    except (EnvelopeError, ValidationError, ValueError, LookupError, TypeError) as error:
        words = " ".join(str(error).split())[:200]
        raise StatementError(f"found no statement of {kind.predicate_type}: {words}") from None
    return says


def _named_key(raw: str) -> Ed25519PublicKey:
    """The key that a release names, before anything in it is believed."""
    try:
        if len(raw) > MAX_STATEMENT_BYTES:
            raise ValueError(f"{len(raw)} characters")
        payload = base64.b64decode(json.loads(raw)["payload"], validate=True)
        named = json.loads(payload)["predicate"]["key"]
        return Ed25519PublicKey.from_public_bytes(bytes.fromhex(named))
    except (ValueError, LookupError, TypeError, RecursionError, UnsupportedAlgorithm) as error:
        raise StatementError(f"found no signed release ({str(error)[:100]})") from None
