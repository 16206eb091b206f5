"""What people sign with the key of their certificate: orders of rounds, promotions of pivots.

A participant has the authority's certificate and so can tell by itself who submitted a round; the
coordinator only passes the order on. The envelope is DSSE; beside the signature stands the
certificate of the key (P-384, as all identities have).
"""

import base64
from collections.abc import Mapping
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, Final, TypeVar

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, load_pem_private_key

from trust.canonical import canonical
from trust.dsse import EnvelopeError, pae, parse_canonical
from trust.identity import CLOCK_SKEW, IdentityError, fingerprint, leaf_of, load_certificate
from trust.pivot_manifest import PAYLOAD_TYPE, moment_of, utc
from trust.statements import (
    Order,
    Promotion,
    Statement,
    StatementError,
    parse_payload,
    payload_of,
)

MAX_ORDER_BYTES: Final = 64 * 1024
MAX_LIFETIME: Final = timedelta(days=400)
_SUBMITTERS: Final = frozenset({"researcher", "operator"})
_ALGORITHM: Final = ec.ECDSA(hashes.SHA384())
_Kind = TypeVar("_Kind", bound=Statement)


def sign_as(statement: Statement, key: Path, certificate: Path) -> str:
    """Sign with an identity's key; return the envelope, which is JSON text. Raises: OSError."""
    private = load_pem_private_key(key.read_bytes(), None)
    assert isinstance(private, ec.EllipticCurvePrivateKey)
    leaf, payload = load_certificate(certificate.read_bytes()), payload_of(statement)
    signature = {
        "keyid": fingerprint(leaf.public_bytes(Encoding.DER)),
        "sig": _base64(private.sign(pae(PAYLOAD_TYPE, payload), _ALGORITHM)),
        "certificate": _base64(leaf.public_bytes(Encoding.DER)),
    }
    envelope = {
        "payload": _base64(payload),
        "payloadType": PAYLOAD_TYPE,
        "signatures": [signature],
    }
    return canonical(envelope).decode("utf-8")


def open_order(raw: str, authority: bytes, now: datetime) -> Order:
    """Read an order that counts now, signed under a certificate of the authority.

    Args: authority: its certificate, PEM.
    Raises: StatementError, saying what is wrong with it.
    """
    order, leaf = _open(Order, raw, authority)
    _check_times(order.issued, leaf, now)
    ends = _moment(order.not_after)
    if ends - _moment(order.issued) > MAX_LIFETIME:
        raise StatementError(f"for longer than {MAX_LIFETIME.days} days")
    if now > ends:
        raise StatementError(f"it counted until {order.not_after}, here it is {utc(now)}")
    _check_signer(leaf, order.submitted_by, _SUBMITTERS, "submit no round")
    return order


def open_promotion(raw: str, authority: bytes, now: datetime) -> Promotion:
    """Read an operator's yes to a pivot. Args, Raises: as open_order."""
    promotion, leaf = _open(Promotion, raw, authority)
    _check_times(promotion.issued, leaf, now)
    _check_signer(leaf, promotion.by, frozenset({"operator"}), "promote no pivot")
    return promotion


def _open(kind: type[_Kind], raw: str, authority: bytes) -> tuple[_Kind, x509.Certificate]:
    """Return what was signed, and the certificate that vouches for it. Raises: StatementError."""
    what = kind.predicate_type.split("/")[1]
    try:
        if len(raw) > MAX_ORDER_BYTES:
            raise ValueError(f"{len(raw)} characters, wanted at most {MAX_ORDER_BYTES}")
        payload, signature, leaf = _parts(parse_canonical(raw.encode("utf-8")))
        _check_chain(leaf, authority)
        key = leaf.public_key()
        assert isinstance(key, ec.EllipticCurvePublicKey)
        key.verify(signature, pae(PAYLOAD_TYPE, payload), _ALGORITHM)
    except InvalidSignature:
        raise StatementError(f"found no {what}: its certificate's key did not sign it") from None
    except (EnvelopeError, IdentityError, ValueError, LookupError, TypeError) as error:
        raise StatementError(f"found no {what} ({str(error)[:200]})") from None
    return parse_payload(kind, payload), leaf


def _check_signer(leaf: x509.Certificate, uri: str, roles: frozenset[str], act: str) -> None:
    """Raise StatementError unless the certificate is of who is named, in a role that may do it."""
    holder = leaf_of(leaf.public_bytes(Encoding.DER))
    if holder.identity.uri != uri or not holder.calls:
        raise StatementError(f"of {uri}, signed by {holder.identity.uri}")
    if holder.identity.role not in roles:
        raise StatementError(f"signed by {holder.identity.uri}, who may {act}")


def _parts(envelope: Mapping[str, Any]) -> tuple[bytes, bytes, x509.Certificate]:
    (signature,) = envelope["signatures"]
    keys = {"payload", "payloadType", "signatures"}
    if envelope.keys() != keys or envelope["payloadType"] != PAYLOAD_TYPE:
        raise ValueError("another kind of envelope")
    if signature.keys() != {"keyid", "sig", "certificate"}:
        raise ValueError(f"a signature with {sorted(signature)[:8]}")
    leaf = load_certificate(_bytes(signature["certificate"]))
    if signature["keyid"] != fingerprint(leaf.public_bytes(Encoding.DER)):
        raise ValueError("the certificate of another key")
    return _bytes(envelope["payload"]), _bytes(signature["sig"]), leaf


def _check_chain(leaf: x509.Certificate, authority: bytes) -> None:
    """Raise IdentityError unless the authority itself issued the certificate, for P-384."""
    try:
        leaf.verify_directly_issued_by(load_certificate(authority))
    except (InvalidSignature, ValueError, TypeError) as error:
        raise IdentityError(f"a certificate that our ca.pem did not sign: {error}") from None
    key = leaf.public_key()
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP384R1):
        raise IdentityError("a certificate of another key than P-384")


def _check_times(issued: str, leaf: x509.Certificate, now: datetime) -> None:
    """Raise StatementError unless it was signed by now, while the certificate counted."""
    moment = _moment(issued)
    if not leaf.not_valid_before_utc <= moment <= leaf.not_valid_after_utc:
        raise StatementError(f"issued {issued}, when its certificate did not count")
    if moment > now + CLOCK_SKEW:
        raise StatementError(f"issued {issued}, here it is {utc(now)}: set the clock")


def _moment(text: str) -> datetime:
    try:
        return moment_of(text)
    except ValueError as error:
        raise StatementError(str(error)) from None


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")


def _bytes(text: str) -> bytes:
    return base64.b64decode(text, validate=True)
