"""Ed25519 keys that sign objects: made where they stay, known by the digest of their public half.

TLS has keys of its own (trust/ca.py): who steals one of the two kinds still lacks the other.
"""

import hashlib
import os
from pathlib import Path

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

MAX_PEM_BYTES = 4096


class KeyFileError(ValueError):
    """A file holds no key that can be used; the message says what to do."""


def new_key(path: Path) -> str:
    """Make a private key (mode 0600) where none is yet; return its kid.

    Raises: FileExistsError when a key is there already; it is never overwritten.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    key = Ed25519PrivateKey.generate()
    pem = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    with open(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(pem)
        file.flush()
        os.fsync(file.fileno())
    try:
        os.link(draft, path)  # unlike a rename, a link refuses to replace what is there
    except FileExistsError:
        raise FileExistsError(
            f"found a key at {path}, wanted none: keep it, or move it away to start anew"
        ) from None
    finally:
        draft.unlink()
    return kid(key.public_key())


def load_private(path: Path) -> Ed25519PrivateKey:
    """Read a private key. Raises: KeyFileError; OSError."""
    try:
        key = serialization.load_pem_private_key(_pem(path), None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise KeyFileError(f"{path}: found no private key, wanted Ed25519 in PEM") from error
    if not isinstance(key, Ed25519PrivateKey):
        raise KeyFileError(f"{path}: found another key, wanted Ed25519: make it anew")
    return key


def load_public(path: Path) -> Ed25519PublicKey:
    """Read a public key. Raises: KeyFileError; OSError."""
    try:
        key = serialization.load_pem_public_key(_pem(path))
    except (ValueError, UnsupportedAlgorithm) as error:
        raise KeyFileError(f"{path}: found no public key, wanted Ed25519 in PEM") from error
    if not isinstance(key, Ed25519PublicKey):
        raise KeyFileError(f"{path}: found another key, wanted Ed25519: ask for it again")
    return key


def public_pem(key: Ed25519PublicKey) -> bytes:
    """The public key as others keep it."""
    form = serialization.PublicFormat.SubjectPublicKeyInfo
    return key.public_bytes(serialization.Encoding.PEM, form)


def kid(key: Ed25519PublicKey) -> str:
    """Lower-case hex of the SHA-256 of the public key's 32 bytes: what two people read aloud."""
    form = serialization.PublicFormat.Raw
    return hashlib.sha256(key.public_bytes(serialization.Encoding.Raw, form)).hexdigest()


def sign(key: Ed25519PrivateKey, message: bytes) -> bytes:
    """64 bytes of signature."""
    return key.sign(message)


def verify(key: Ed25519PublicKey, signature: bytes, message: bytes) -> bool:
    """Whether the key's holder signed the message."""
    try:
        key.verify(signature, message)
    except InvalidSignature:
        return False
    return True


def _pem(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(MAX_PEM_BYTES)
