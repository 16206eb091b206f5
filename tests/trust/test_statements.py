"""A statement is of its type and its signer, about one file, and says nothing more."""

import base64
import json
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st

from trust.canonical import canonical
from trust.dsse import seal
from trust.pivot_manifest import PAYLOAD_TYPE
from trust.statements import (
    Approval,
    Receipt,
    Release,
    StatementError,
    payload_of,
    raw_hex,
    sign,
    verify,
    verify_release,
)

KEY, OTHER = Ed25519PrivateKey.generate(), Ed25519PrivateKey.generate()
RECEIPT = Receipt(
    sha256="a" * 64, round_id="rnd-1", participant="a", size_bytes=5, committed_unix_ms=7
)
APPROVAL = Approval(
    sha256="a" * 64,
    round_id="rnd-1",
    approved=True,
    by="grace",
    why="",
    gates="auc 0.51",
    unix_ms=7,
)


def release(key: Ed25519PrivateKey) -> Release:
    return Release(
        sha256="b" * 64,
        round_id="rnd-1",
        participant="a",
        kind="logits",
        size_bytes=5,
        submitted_by="ada",
        model="c" * 64,
        prompt_set="",
        positions=3,
        policy_sha256="",
        key=raw_hex(key.public_key()),
    )


@pytest.mark.parametrize("said", [RECEIPT, APPROVAL, release(KEY)], ids=lambda s: type(s).__name__)
def test_what_is_signed_is_read_back_under_the_key_alone(said: Any) -> None:
    raw = sign(said, KEY)
    assert verify(type(said), raw, KEY.public_key()) == said
    assert verify(type(said), raw, OTHER.public_key(), KEY.public_key()) == said
    with pytest.raises(StatementError, match="wanted a good one of"):
        verify(type(said), raw, OTHER.public_key())


def test_signed_twice_it_is_the_same_receipt() -> None:
    assert sign(RECEIPT, KEY) == sign(RECEIPT, KEY)


def test_one_type_never_passes_for_another() -> None:
    with pytest.raises(StatementError, match="no statement of cofuse/approval/2"):
        verify(Approval, sign(RECEIPT, KEY), KEY.public_key())


def test_a_signed_statement_that_says_more_is_none() -> None:
    for change in ({"more": 1}, {"_type": "x"}, {"predicateType": "cofuse/approval/2"}):
        payload = canonical({**json.loads(payload_of(RECEIPT)), **change})
        raw = seal(PAYLOAD_TYPE, payload, KEY).decode()
        with pytest.raises(StatementError):
            verify(Receipt, raw, KEY.public_key())


def test_a_release_counts_under_the_first_key_that_was_seen() -> None:
    said, key = verify_release(sign(release(KEY), KEY), None)
    assert (said, key) == (release(KEY), KEY.public_key())
    assert verify_release(sign(release(KEY), KEY), KEY.public_key())[0] == said
    for raw, known in (
        (sign(release(OTHER), OTHER), KEY.public_key()),  # another key than the first one
        (sign(release(OTHER), KEY), None),  # names a key that did not sign
        (sign(release(OTHER), KEY), KEY.public_key()),  # signed by the first, names another
    ):
        with pytest.raises(StatementError):
            verify_release(raw, known)


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_foreign_text_is_refused_and_never_crashes(data: st.DataObject) -> None:
    good = sign(release(KEY), KEY)
    text = data.draw(st.text(max_size=40))
    place = data.draw(st.integers(0, len(good) - 1))
    inside = base64.b64encode(text.encode("utf-8", "replace")).decode()
    for raw in (text, good[:place] + text, json.dumps({"payload": inside})):
        with pytest.raises(StatementError):
            verify_release(raw, None)
