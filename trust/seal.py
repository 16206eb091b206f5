"""A sealed file: whoever carries or keeps it sees its header, and only the recipient the rest.

    FSEAL1 | length of the header, 4 bytes | header, JSON | chunks

Each file has a fresh content key. HPKE (RFC 9180) closes it for the recipient, bound to the rest of
the header; each chunk of 4 MiB is AES-256-GCM under it, its number the nonce, bound to the header,
its number, and whether it is the last. So a chunk changed, left out, swapped, added, or taken from
another file opens nothing, and neither does a header that was exchanged. Memory: three chunks.
"""

import base64
import binascii
import hashlib
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Annotated, Final, Literal

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from trust.canonical import canonical
from trust.dsse import EnvelopeError, parse_canonical
from trust.seal_keys import CLASSIC, HYBRID, Opener, OpenError, Recipient

MAGIC: Final = b"FSEAL1"
CHUNK_BYTES: Final = 4 * 1024 * 1024
TAG_BYTES: Final = 16
MAX_HEADER_BYTES: Final = 64 * 1024
MAX_BYTES: Final = 2**50
_KEY_BYTES: Final = 32
_LENGTH: Final = struct.Struct(">I")
_PLACE: Final = struct.Struct(">Q?")
SUFFIX: Final = ".sealed"


class SealError(ValueError):
    """A sealed file that cannot be opened; the message says why, and what helps."""


class Header(BaseModel):
    """What anybody may read of a sealed file."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    suite: Literal["MLKEM768_X25519", "X25519"]
    recipient: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
    """The kid of the key that opens it."""
    size_bytes: int = Field(ge=0, le=MAX_BYTES)
    """Of the file inside."""
    statement: Annotated[str, StringConstraints(max_length=32 * 1024)]
    """What the sender signed about the file inside, as it was signed; empty: nothing."""
    sealed_key: Annotated[str, StringConstraints(max_length=4096)]
    """The content key, closed for the recipient; base64."""


@dataclass(frozen=True, slots=True)
class Opened:
    """What came out of a sealed file."""

    header: Header
    sha256: str
    """Of the file inside."""


def seal_file(source: Path, out: Path, recipient: Recipient, statement: str = "") -> str:
    """Seal a file; `out` is whole when this returns, but not synced.

    Args: statement: goes along in the open, unchangeable.
    Returns: the sealed file's sha256. Raises: OSError; SealError when the source changes meanwhile.
    """
    key, size = os.urandom(_KEY_BYTES), source.stat().st_size
    draft = Header(
        suite=HYBRID if recipient.suite == HYBRID else CLASSIC,
        recipient=recipient.kid,
        size_bytes=size,
        statement=statement,
        sealed_key="",
    )
    closed = base64.b64encode(recipient.seal(key, _info(draft))).decode("ascii")
    raw = canonical(draft.model_copy(update={"sealed_key": closed}).model_dump())
    if len(raw) > MAX_HEADER_BYTES:
        raise SealError(f"found a header of {len(raw)} bytes, wanted at most {MAX_HEADER_BYTES}")
    start = MAGIC + _LENGTH.pack(len(raw)) + raw
    cipher, digest = AESGCM(key), hashlib.sha256(start)
    plain, secret = bytearray(CHUNK_BYTES), bytearray(CHUNK_BYTES + TAG_BYTES)
    with source.open("rb") as file, out.open("wb") as sealed:
        sealed.write(start)
        for index, length, bound in _places(start, size):
            _fill(file, memoryview(plain)[:length], source)
            piece = memoryview(secret)[: length + TAG_BYTES]
            cipher.encrypt_into(_nonce(index), memoryview(plain)[:length], bound, piece)
            digest.update(piece)
            sealed.write(piece)
        if file.read(1):
            raise SealError(f"{source}: it grew while it was sealed: seal it again")
    return digest.hexdigest()


def read_header(path: Path) -> Header:
    """Read what is in the open, and check that the file has the length it says.

    Raises: SealError, OSError.
    """
    with path.open("rb") as file:
        return _read_start(file)[0]


def open_file(path: Path, out: Path, opener: Opener) -> Opened:
    """Write what is inside to `out`, for this user alone; after an error nothing is left there.

    Raises: SealError when a byte is not as it was sealed, or it is sealed to another; OSError.
    """
    out.unlink(missing_ok=True)
    try:
        with path.open("rb") as file:
            header, start = _read_start(file)
            cipher = AESGCM(_content_key(header, opener))
            handle = os.open(out, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(handle, "wb") as plain:
                sha256 = _open_chunks(file, plain, cipher, _places(start, header.size_bytes))
    except BaseException:
        out.unlink(missing_ok=True)
        raise
    return Opened(header, sha256)


def _open_chunks(
    file: IO[bytes], out: IO[bytes], cipher: AESGCM, places: Iterator[tuple[int, int, bytes]]
) -> str:
    """Decrypt chunk by chunk; return the sha256 of what came out."""
    digest = hashlib.sha256()
    plain, secret = bytearray(CHUNK_BYTES), bytearray(CHUNK_BYTES + TAG_BYTES)
    for index, length, bound in places:
        piece, clear = memoryview(secret)[: length + TAG_BYTES], memoryview(plain)[:length]
        _fill(file, piece, Path(str(file.name)))
        try:
            cipher.decrypt_into(_nonce(index), piece, bound, clear)
        except InvalidTag:
            raise SealError(
                f"chunk {index} is not as it was sealed: changed, moved, or of another file; "
                "seal and send it again"
            ) from None
        digest.update(clear)
        out.write(clear)
    return digest.hexdigest()


def _read_start(file: IO[bytes]) -> tuple[Header, bytes]:
    """The header, and the bytes up to the first chunk. Nothing larger than a header is read."""
    fixed = file.read(len(MAGIC) + _LENGTH.size)
    if len(fixed) < len(MAGIC) + _LENGTH.size or not fixed.startswith(MAGIC):
        raise SealError("found no sealed file, wanted one that begins with FSEAL1: seal it first")
    (length,) = _LENGTH.unpack(fixed[len(MAGIC) :])
    if length > MAX_HEADER_BYTES:
        raise SealError(f"found a header of {length} bytes, wanted at most {MAX_HEADER_BYTES}")
    raw = file.read(length)
    if len(raw) < length:
        raise SealError("found a header that ends early: send the file again")
    try:
        header = Header.model_validate(parse_canonical(raw))
    except (EnvelopeError, ValidationError, RecursionError) as error:
        words = " ".join(str(error).split())[:200]
        raise SealError(f"found a header that is none of ours: {words}") from None
    chunks = max(1, -(-header.size_bytes // CHUNK_BYTES))
    wanted = len(fixed) + length + header.size_bytes + chunks * TAG_BYTES
    if (found := os.fstat(file.fileno()).st_size) != wanted:
        raise SealError(f"found {found} bytes, wanted {wanted}: send the file again, whole")
    return header, fixed + raw


def _content_key(header: Header, opener: Opener) -> bytes:
    if (wanted := opener.recipient.kid) != header.recipient:
        raise SealError(
            f"sealed to key {header.recipient[:16]}, wanted {wanted[:16]}: get the coordinator's "
            "fusion-worker.pem anew"
        )
    try:
        closed = base64.b64decode(header.sealed_key, validate=True)
        key = opener.open(closed, _info(header))
        if len(key) != _KEY_BYTES or header.suite != opener.recipient.suite:
            raise OpenError("it holds no key of ours")
    except (binascii.Error, OpenError) as error:
        raise SealError(f"the header is not as it was sealed ({error})") from None
    return key


def _info(header: Header) -> bytes:
    """What the closed key is bound to: everything in the header but itself."""
    rest = canonical(header.model_dump(exclude={"sealed_key"}))
    return MAGIC + hashlib.sha256(rest).digest()


def _places(start: bytes, size: int) -> Iterator[tuple[int, int, bytes]]:
    """Number, length and bound data of each chunk; an empty file has one empty chunk."""
    head, last = hashlib.sha256(start).digest(), max(0, -(-size // CHUNK_BYTES) - 1)
    for index in range(last + 1):
        length = min(CHUNK_BYTES, size - index * CHUNK_BYTES)
        yield index, length, head + _PLACE.pack(index, index == last)


def _nonce(index: int) -> bytes:
    return index.to_bytes(12, "big")


def _fill(file: IO[bytes], room: memoryview, path: Path) -> None:
    """Read exactly as many bytes as there is room for."""
    have = 0
    while have < len(room):
        read: int = file.readinto(room[have:])  # type: ignore[attr-defined]
        if not read:
            raise SealError(f"{path}: it ended early: send it again")
        have += read
