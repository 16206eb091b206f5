"""Keys that files are sealed to: made where they are opened, the public half given away.

A pair is ML-KEM-768 and X25519 together, so that a file recorded today stays closed to who may one
day break either; where the machine's OpenSSL has no ML-KEM, X25519 alone. Both halves of a pair lie
in one PEM file, one block each.
"""

import hashlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

from cryptography.exceptions import InvalidTag, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hpke
from cryptography.hazmat.primitives.asymmetric.mlkem import (
    MLKEM768PrivateKey,
    MLKEM768PublicKey,
)
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
    load_pem_public_key,
)

from trust.files import replace_with
from trust.keys import KeyFileError, check_private, save_private

RECIPIENT_FILE: Final = "fusion-worker.pem"
"""The fusion worker's public key, beside ca.pem wherever that lies."""
PRIVATE_FILE: Final = "key.pem"
HYBRID: Final = "MLKEM768_X25519"
CLASSIC: Final = "X25519"
_KEMS: Final = {HYBRID: hpke.KEM.MLKEM768_X25519, CLASSIC: hpke.KEM.X25519}
_BLOCK: Final = re.compile(rb"-----BEGIN [A-Z ]+-----[^-]+-----END [A-Z ]+-----\n?")
_MAX_FILE_BYTES: Final = 1 << 16


class OpenError(ValueError):
    """What was sealed cannot be opened by this key."""


@dataclass(frozen=True, slots=True)
class Recipient:
    """The public half: who may open what is sealed to it."""

    suite: str
    kid: str
    """The sha256, in hex, of its raw bytes."""
    _key: Any

    def seal(self, secret: bytes, info: bytes) -> bytes:
        """Encrypt a few bytes for the holder of the private half, who must know `info` as well."""
        return _suite(self.suite).encrypt(secret, self._key, info)


@dataclass(frozen=True, slots=True)
class Opener:
    """The private half."""

    recipient: Recipient
    _key: Any

    def open(self, sealed: bytes, info: bytes) -> bytes:
        """Decrypt what Recipient.seal made. Raises: OpenError."""
        try:
            return _suite(self.recipient.suite).decrypt(sealed, self._key, info)
        except (InvalidTag, ValueError) as error:
            raise OpenError(
                f"key {self.recipient.kid[:16]} does not open it: it was changed, or sealed to "
                "another key"
            ) from error


def new_pair(path: Path, *, suite: str | None = None) -> str:
    """Make a pair: the private half at `path`, for its owner alone; it is on disk afterwards.

    Args: suite: HYBRID or CLASSIC; default: the first that this machine can.
    Returns: the key's id.
    Raises: FileExistsError when a key is there already; it is never overwritten.
    """
    keys: list[Any] = [X25519PrivateKey.generate()]
    if suite != CLASSIC:
        try:
            keys.insert(0, MLKEM768PrivateKey.generate())
        except UnsupportedAlgorithm:
            if suite == HYBRID:
                raise
    form = (Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    save_private(b"".join(key.private_bytes(*form) for key in keys), path)
    return load_opener(path).recipient.kid


def save_recipient(private: Path, public: Path) -> None:
    """Write the public half of the pair at `private`, whole. Raises: KeyFileError, OSError."""
    form = (Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    keys = _blocks(private, partial(load_pem_private_key, password=None))
    replace_with(public, b"".join(key.public_key().public_bytes(*form) for key in keys), 0o644)


def load_recipient(path: Path) -> Recipient:
    """Read a public half. Raises: KeyFileError, OSError."""
    return _recipient(path, _blocks(path, load_pem_public_key))


def load_opener(path: Path) -> Opener:
    """Read a private half that only its owner can read. Raises: KeyFileError, OSError."""
    check_private(path)
    keys = _blocks(path, partial(load_pem_private_key, password=None))
    recipient = _recipient(path, [key.public_key() for key in keys])
    hybrid = recipient.suite == HYBRID
    return Opener(recipient, hpke.MLKEM768X25519PrivateKey(*keys) if hybrid else keys[0])


def _recipient(path: Path, keys: Sequence[Any]) -> Recipient:
    kid = hashlib.sha256(
        b"".join(key.public_bytes(Encoding.Raw, PublicFormat.Raw) for key in keys)
    ).hexdigest()
    match keys:
        case [MLKEM768PublicKey() as outer, X25519PublicKey() as inner]:
            return Recipient(HYBRID, kid, hpke.MLKEM768X25519PublicKey(outer, inner))
        case [X25519PublicKey() as only]:
            return Recipient(CLASSIC, kid, only)
    raise KeyFileError(f"{path}: found other keys, wanted ML-KEM-768 and X25519, or X25519 alone")


def _blocks(path: Path, load: Callable[[bytes], Any]) -> list[Any]:
    with path.open("rb") as file:
        text = file.read(_MAX_FILE_BYTES)
    blocks = _BLOCK.findall(text)
    try:
        if not 0 < len(blocks) <= 2:
            raise ValueError(f"{len(blocks)} PEM blocks")
        return [load(block) for block in blocks]
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise KeyFileError(f"{path}: found no key to seal with ({error}), wanted PEM") from error


def _suite(name: str) -> hpke.Suite:
    return hpke.Suite(_KEMS[name], hpke.KDF.HKDF_SHA256, hpke.AEAD.AES_256_GCM)
