"""Signed statements: the Dead Simple Signing Envelope, Ed25519, and JSON with one spelling.

What is signed is not the JSON but its type and bytes (PAE), so nothing is parsed before a known
key has vouched for it. Source: github.com/secure-systems-lab/dsse, protocol version 1.0.2.
"""

import base64
import binascii
import json
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, Final

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from trust.canonical import canonical
from trust.keys import SignatureError, kid, sign, verify

MAX_ENVELOPE_BYTES: Final = 1 << 20
MAX_SIGNATURES: Final = 8
_UNREADABLE: Final = (ValueError, TypeError, LookupError, AttributeError, RecursionError)


class EnvelopeError(ValueError):
    """An envelope cannot be read, or nobody whom we know has signed it."""


def parse_canonical(raw: bytes) -> Any:
    """Parse what canonical() wrote.

    Raises: EnvelopeError for any other spelling: no key comes twice, no number is rounded.
    """
    try:
        value = json.loads(raw)
        if canonical(value) != raw:
            raise ValueError("another spelling")
    except _UNREADABLE as error:
        raise EnvelopeError(f"found JSON that is not in its one spelling ({error})"[:200]) from None
    return value


def pae(payload_type: str, payload: bytes) -> bytes:
    """The bytes that are signed: type and payload, each with its length."""
    kind = payload_type.encode("utf-8")
    return b"DSSEv1 %d %b %d %b" % (len(kind), kind, len(payload), payload)


def seal(payload_type: str, payload: bytes, key: Ed25519PrivateKey) -> bytes:
    """Sign a payload; return the envelope."""
    signature = sign(key, pae(payload_type, payload))
    return canonical(
        {
            "payload": _base64(payload),
            "payloadType": payload_type,
            "signatures": [{"keyid": kid(key.public_key()), "sig": _base64(signature)}],
        }
    )


def unseal(raw: bytes, payload_type: str, keys: Mapping[str, Ed25519PublicKey]) -> bytes:
    """Return the payload of an envelope that one of `keys` (by kid) has signed.

    Raises: EnvelopeError.
    """
    if len(raw) > MAX_ENVELOPE_BYTES:
        raise EnvelopeError(f"found {len(raw)} bytes, wanted at most {MAX_ENVELOPE_BYTES}")
    envelope = parse_canonical(raw)
    try:
        if envelope.keys() != {"payload", "payloadType", "signatures"}:
            raise ValueError(f"keys {sorted(envelope)[:8]}")
        if envelope["payloadType"] != payload_type:
            raise ValueError(f"type {str(envelope['payloadType'])[:60]!r}, not {payload_type!r}")
        payload = _bytes(envelope["payload"])
        signatures = envelope["signatures"]
        if not isinstance(signatures, list) or not 0 < len(signatures) <= MAX_SIGNATURES:
            raise ValueError("no signatures, or too many")
        signed = {str(one["keyid"]): _bytes(one["sig"]) for one in signatures}
    except _UNREADABLE as error:
        raise EnvelopeError(f"found no envelope of ours ({error})"[:200]) from None
    message = pae(payload_type, payload)
    for name in signed.keys() & keys.keys():
        with suppress(SignatureError):
            verify(keys[name], message, signed[name])
            return payload
    raise EnvelopeError(
        f"found signatures of {', '.join(name[:16] for name in signed)}, wanted a good one of "
        f"{', '.join(name[:16] for name in keys)}"
    )


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")


def _bytes(text: str) -> bytes:
    try:
        data = base64.b64decode(text, validate=True)
    except binascii.Error as error:
        raise ValueError(f"no base64: {error}") from None
    if _base64(data) != text:
        raise ValueError("base64 in another spelling")
    return data
