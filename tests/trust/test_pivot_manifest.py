"""A manifest says what its signer said, of the pivot that was asked for, and for a time only."""

import random
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st

from trust.canonical import canonical
from trust.dsse import parse_canonical, seal, unseal
from trust.keys import kid
from trust.pivot_manifest import (
    PAYLOAD_TYPE,
    Input,
    Manifest,
    ManifestError,
    Parent,
    PivotFile,
    check_current,
    check_offer,
    open_manifest,
    seal_manifest,
    utc,
)

KEY, OTHER = (Ed25519PrivateKey.from_private_bytes(bytes([n]) * 32) for n in (1, 2))
NOW = datetime(2026, 5, 1, 12, tzinfo=UTC)
FILES = (
    PivotFile(name="config.json", sha256="a" * 64, size_bytes=3),
    PivotFile(name="model.safetensors", sha256="b" * 64, size_bytes=5),
)


def manifest(**changes: Any) -> Manifest:
    values: dict[str, Any] = {
        "name": "pivot-3",
        "root": "pivot-0",
        "parent": Parent(name="pivot-2", content_sha256="c" * 64),
        "files": FILES,
        "created": utc(NOW),
        "round_id": "rnd-3",
        "method": "logits/unified",
        "restores": "",
        "inputs": (Input(participant="st-mary", sha256="d" * 64, size_bytes=9),),
        "evals": {"bpb": {"heart": "1.25"}},
        "issued": utc(NOW),
        "expires": utc(NOW + timedelta(days=90)),
        "signer": kid(KEY.public_key()),
    }
    return Manifest(**{**values, **changes})


SEALED = seal_manifest(manifest(), KEY)
STATEMENT = parse_canonical(unseal(SEALED, PAYLOAD_TYPE, {kid(KEY.public_key()): KEY.public_key()}))


def test_what_was_signed_is_read_again() -> None:
    assert open_manifest(SEALED, KEY.public_key()) == manifest()
    check_current(manifest(), "pivot-3", NOW)
    check_offer(manifest(), [(f.name, f.sha256, f.size_bytes) for f in FILES])
    offered = [
        ("manifest.dsse.json", "e" * 64, 7),
        *((f.name, f.sha256, f.size_bytes) for f in FILES),
    ]
    check_offer(manifest(), offered)


def test_the_content_has_one_name_however_often_it_is_issued() -> None:
    again = {"issued": utc(NOW + timedelta(days=9)), "expires": utc(NOW + timedelta(days=99))}
    assert manifest(**again).content_sha256 == manifest().content_sha256
    for change in (
        {"name": "pivot-4"},
        {"files": FILES[:1]},
        {"parent": None},
        {"inputs": ()},
        {"evals": {}},
        {"method": "x"},
    ):
        assert manifest(**change).content_sha256 != manifest().content_sha256


def signed(**changes: Any) -> bytes:
    """A statement that the right key signed, though it is not one of ours."""
    return seal(PAYLOAD_TYPE, canonical({**STATEMENT, **changes}), KEY)


def predicate(**changes: Any) -> bytes:
    return signed(predicate={**STATEMENT["predicate"], **changes})


@pytest.mark.parametrize(
    "raw",
    [
        SEALED.replace(b"eyJ", b"eyK", 1),
        seal(PAYLOAD_TYPE, canonical(STATEMENT), OTHER),
        seal("other/type", canonical(STATEMENT), KEY),
        seal(PAYLOAD_TYPE, b"{}", KEY),
        seal(PAYLOAD_TYPE, b"[]", KEY),
        seal(PAYLOAD_TYPE, b"nothing", KEY),
        signed(more=1),
        signed(predicateType="cofuse/pivot/2"),
        signed(subject=[]),
        signed(subject={}),
        signed(subject=[{**STATEMENT["subject"][0], "name": "../x"}]),
        signed(subject=STATEMENT["subject"] * 2),
        signed(subject=[{**STATEMENT["subject"][0], "name": "manifest.dsse.json"}]),
        predicate(signer="0" * 64),
        predicate(name="pivot-03"),
        predicate(name="pivot-3\n"),
        predicate(more=1),
        predicate(expires="tomorrow"),
        predicate(parent="pivot-2"),
        predicate(evals={"bpb": {"heart": 1}}),
        b"",
    ],
)
def test_what_is_no_manifest_of_the_signer_is_refused(raw: bytes) -> None:
    with pytest.raises(ManifestError):
        open_manifest(raw, KEY.public_key())


@pytest.mark.parametrize(
    ("name", "days", "says"),
    [
        ("pivot-4", 0, "asked for pivot-4"),
        ("pivot-3", 90, "expired"),
        ("pivot-3", 365, "expired"),
        ("pivot-3", -1, "set the clock"),
    ],
)
def test_another_pivot_or_another_time_is_refused(name: str, days: int, says: str) -> None:
    with pytest.raises(ManifestError, match=says):
        check_current(manifest(), name, NOW + timedelta(days=days))


def test_a_day_that_does_not_exist_is_no_time() -> None:
    found = open_manifest(predicate(expires="2026-02-31T00:00:00Z"), KEY.public_key())
    with pytest.raises(ManifestError, match="one that exists"):
        check_current(found, "pivot-3", NOW)


@pytest.mark.parametrize(
    "offered",
    [
        [("config.json", "a" * 64, 3)],
        [("config.json", "a" * 64, 3), ("model.safetensors", "b" * 64, 6)],
        [("config.json", "a" * 64, 3), ("model.safetensors", "c" * 64, 5)],
        [("config.json", "a" * 64, 3), ("model.safetensors", "b" * 64, 5), ("x.py", "a" * 64, 3)],
    ],
)
def test_other_files_than_the_listed_are_refused(offered: Any) -> None:
    with pytest.raises(ManifestError, match="not the files"):
        check_offer(manifest(), offered)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32).map(random.Random))
def test_fuzzed_statements_are_refused_or_mean_what_they_say(order: random.Random) -> None:
    """Signed, so that what is fuzzed gets past the signature."""
    whole = canonical(STATEMENT)
    for _ in range(50):
        data = bytearray(whole)
        for _ in range(order.randint(1, 2)):
            at = order.randrange(len(data))
            data[at : at + order.randrange(3)] = order.choice(
                [b"", b"0", b"a", b'"', b"{}", b"[]", b"null", b",", order.randbytes(2)]
            )
        try:
            found = open_manifest(seal(PAYLOAD_TYPE, bytes(data), KEY), KEY.public_key())
        except ManifestError:
            continue
        again = unseal(seal_manifest(found, KEY), PAYLOAD_TYPE, {found.signer: KEY.public_key()})
        assert again == bytes(data)
