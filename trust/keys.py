"""Keys that sign objects: Ed25519, made where they stay. TLS has its own keys (trust/ca.py).

A key is two files: the private one (mode 0600), and beside it the public one, `.pub`, to give away.
"""

import hashlib
import os
import stat
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Final

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
    load_pem_public_key,
)

from trust.files import replace_with, write_new

PUBLIC_SUFFIX: Final = ".pub"
_OTHERS: Final = stat.S_IRWXG | stat.S_IRWXO


class KeyFileError(ValueError):
    """A file does not hold the key it should, or others may read it."""


class SignatureError(ValueError):
    """A signature was not made by the key, over these bytes."""


def new_key(path: Path) -> str:
    """Make a private key at `path` and its public key beside it; both are on disk afterwards.

    Returns: the key's id.
    Raises: FileExistsError when a key is there already; it is never overwritten.
    """
    key = Ed25519PrivateKey.generate()
    pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    save_private(pem, path)
    save_public(key.public_key(), path.with_suffix(PUBLIC_SUFFIX))
    return kid(key.public_key())


def save_private(pem: bytes, path: Path) -> None:
    """Write a private key, whole, for its owner alone. Raises: FileExistsError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}.new")
    try:
        write_new(draft, pem, 0o600)
        path.hardlink_to(draft)  # a rename would overwrite
    finally:
        draft.unlink(missing_ok=True)


def save_public(key: Ed25519PublicKey, path: Path) -> None:
    """Write a public key as PEM, whole."""
    pem = key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    replace_with(path, pem, 0o644)


def load_private(path: Path) -> Ed25519PrivateKey:
    """Read a private key that only its owner can read.

    Raises: KeyFileError, OSError.
    """
    check_private(path)
    key = _parsed(path, partial(load_pem_private_key, password=None))
    if not isinstance(key, Ed25519PrivateKey):
        raise KeyFileError(f"{path}: found another kind of key, wanted an Ed25519 private key")
    return key


def check_private(path: Path) -> None:
    """Return when only the owner can read a key. Raises: KeyFileError, OSError."""
    mode = path.stat().st_mode
    if mode & _OTHERS:
        raise KeyFileError(
            f"{path}: found mode {stat.S_IMODE(mode):o}, wanted 600; others may have read this "
            f"key: replace it, or if you are sure that nobody did: chmod 600 {path}"
        )


def load_public(path: Path) -> Ed25519PublicKey:
    """Read a public key.

    Raises: KeyFileError, OSError.
    """
    key = _parsed(path, load_pem_public_key)
    if not isinstance(key, Ed25519PublicKey):
        raise KeyFileError(f"{path}: found another kind of key, wanted an Ed25519 public key")
    return key


def kid(key: Ed25519PublicKey) -> str:
    """A key's id: the sha256, in hex, of its 32 raw bytes."""
    return hashlib.sha256(key.public_bytes(Encoding.Raw, PublicFormat.Raw)).hexdigest()


def sign(key: Ed25519PrivateKey, payload: bytes) -> bytes:
    """The 64 bytes of a signature. What is signed must say what it is: see trust/chain.py."""
    return key.sign(payload)


def verify(key: Ed25519PublicKey, payload: bytes, signature: bytes) -> None:
    """Return when the key has signed the payload.

    Raises: SignatureError.
    """
    try:
        key.verify(signature, payload)
    except InvalidSignature:
        raise SignatureError(
            f"found a signature that key {kid(key)[:16]} did not make over these bytes; "
            "they were changed, or another key signed them"
        ) from None


def _parsed(path: Path, parse: Callable[[bytes], object]) -> object:
    try:
        return parse(path.read_bytes())
    except (ValueError, TypeError) as error:
        raise KeyFileError(f"{path}: found no key ({error}), wanted one in PEM") from error
