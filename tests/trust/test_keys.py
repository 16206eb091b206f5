import stat
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from hypothesis import given, settings
from hypothesis import strategies as st

from trust.keys import (
    KeyFileError,
    SignatureError,
    kid,
    load_private,
    load_public,
    new_key,
    sign,
    verify,
)

KEY, OTHER = (Ed25519PrivateKey.generate() for _ in range(2))


def test_a_key_is_its_owners_alone_and_its_public_half_is_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "keys" / "site.key"
    made = new_key(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert (
        made == kid(load_private(path).public_key()) == kid(load_public(path.with_suffix(".pub")))
    )
    assert sorted(p.name for p in path.parent.iterdir()) == ["site.key", "site.pub"]


def test_a_key_is_never_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "site.key"
    made = new_key(path)
    with pytest.raises(FileExistsError):
        new_key(path)
    assert kid(load_private(path).public_key()) == made


@given(payload=st.binary(max_size=64), at=st.integers(0, 63), bit=st.integers(0, 7))
@settings(deadline=None)
def test_a_signature_holds_for_its_bytes_and_key_alone(payload: bytes, at: int, bit: int) -> None:
    key, other = KEY, OTHER
    made = sign(key, payload)
    verify(key.public_key(), payload, made)
    broken = bytes(b ^ (1 << bit) * (i == at) for i, b in enumerate(made))
    for says in (
        (key.public_key(), payload + b"x", made),
        (key.public_key(), payload, broken),
        (key.public_key(), payload, made[:-1]),
        (other.public_key(), payload, made),
    ):
        with pytest.raises(SignatureError):
            verify(*says)


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660])
def test_a_private_key_that_others_may_read_is_refused(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "site.key"
    new_key(path)
    path.chmod(mode)
    with pytest.raises(KeyFileError, match="chmod 600"):
        load_private(path)


def test_what_is_no_ed25519_key_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "site.key"
    nist = ec.generate_private_key(ec.SECP256R1())
    pem = nist.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    for content in (b"", b"nothing", pem):
        path.write_bytes(content)
        path.chmod(0o600)
        with pytest.raises(KeyFileError, match="wanted"):
            load_private(path)
        with pytest.raises(KeyFileError, match="wanted"):
            load_public(path)
