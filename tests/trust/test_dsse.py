"""Only what a known key signed is ever looked into."""

import base64
import json
import random
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st

from trust.canonical import canonical
from trust.dsse import (
    MAX_ENVELOPE_BYTES,
    EnvelopeError,
    pae,
    parse_canonical,
    seal,
    unseal,
)
from trust.keys import kid, verify

KEY, OTHER = (Ed25519PrivateKey.from_private_bytes(bytes([n]) * 32) for n in (1, 2))
KEYS = {kid(KEY.public_key()): KEY.public_key()}
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(1 - 2**53, 2**53 - 1) | st.text(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text("abz_0", max_size=5), inner, max_size=3)
    ),
    max_leaves=8,
)
ENVELOPE = seal("t", b'{"a":1}', KEY)


def test_the_signed_bytes_are_those_of_the_specification() -> None:
    """The example of the DSSE specification."""
    wanted = b"DSSEv1 29 http://example.com/HelloWorld 11 hello world"
    assert pae("http://example.com/HelloWorld", b"hello world") == wanted


def test_a_signature_is_over_the_pae_and_names_its_key() -> None:
    envelope = json.loads(seal("t", b"hello", KEY))
    (signature,) = envelope["signatures"]
    assert base64.b64decode(envelope["payload"]) == b"hello"
    assert signature["keyid"] == kid(KEY.public_key())
    verify(KEY.public_key(), b"DSSEv1 1 t 5 hello", base64.b64decode(signature["sig"]))


@given(st.binary(max_size=50), st.text(max_size=10))
def test_what_was_sealed_comes_out_again(payload: bytes, kind: str) -> None:
    assert unseal(seal(kind, payload, KEY), kind, KEYS) == payload


def with_(**changes: Any) -> bytes:
    return canonical({**json.loads(ENVELOPE), **changes})


def signature(**changes: Any) -> bytes:
    return with_(signatures=[{**json.loads(ENVELOPE)["signatures"][0], **changes}])


@pytest.mark.parametrize(
    "raw",
    [
        seal("t", b'{"a":1}', OTHER),
        signature(keyid=kid(OTHER.public_key())),
        signature(sig=base64.b64encode(bytes(64)).decode()),
        signature(sig=""),
        signature(sig=1),
        with_(payload=base64.b64encode(b'{"a":2}').decode()),
        with_(payload="e30"),
        with_(payloadType="u"),
        with_(signatures=[]),
        with_(signatures=[json.loads(ENVELOPE)["signatures"][0]] * 9),
        with_(signatures={}),
        with_(more=1),
        ENVELOPE.replace(b":", b": ", 1),
        ENVELOPE[:-1] + b',"payloadType":"t"}',
        ENVELOPE + b" " * MAX_ENVELOPE_BYTES,
        b"[" * MAX_ENVELOPE_BYTES,
        b"",
        b"[]",
    ],
)
def test_what_nobody_known_signed_is_refused(raw: bytes) -> None:
    with pytest.raises(EnvelopeError):
        unseal(raw, "t", KEYS)


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2**32).map(random.Random))
def test_fuzzed_envelopes_are_refused_or_hold_what_was_signed(order: random.Random) -> None:
    for _ in range(30):
        data = bytearray(ENVELOPE)
        for _ in range(order.randint(1, 3)):
            at = order.randrange(len(data))
            data[at : at + order.randrange(4)] = order.randbytes(order.randrange(3))
        try:
            payload = unseal(bytes(data), "t", KEYS)
        except EnvelopeError:
            continue
        assert payload == b'{"a":1}'


@given(st.binary(max_size=60))
def test_any_bytes_are_refused(raw: bytes) -> None:
    with pytest.raises(EnvelopeError):
        unseal(raw, "t", KEYS)


@given(VALUES)
def test_each_value_has_one_spelling_which_alone_is_read(value: Any) -> None:
    raw = canonical(value)
    assert parse_canonical(raw) == value
    assert raw == canonical(json.loads(raw))
    with pytest.raises(EnvelopeError):
        parse_canonical(raw + b" ")


@pytest.mark.parametrize("raw", [b'{"a":1,"a":1}', b"1.0", b"NaN", b'"\\u0041"', b"\xff", b"1e2"])
def test_other_spellings_are_refused(raw: bytes) -> None:
    with pytest.raises(EnvelopeError):
        parse_canonical(raw)
