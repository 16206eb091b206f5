"""The header of a safetensors file, read with limits before any library sees the file.

The format's own parser takes 75 MB of header, names that are paths and keys that come twice. This
one reads a strict subset of JSON (flat, no name twice, nothing it does not know), so that whatever
it lets through means the same to every parser. It touches no tensor.
"""

import json
import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Final, Literal

MAX_HEADER_BYTES: Final = 4 << 20
MAX_TENSORS: Final = 16_384
"""In one file; a model of more comes in several."""
MAX_DIMENSIONS: Final = 8
MAX_METADATA: Final = 64
"""Entries of a header's metadata, and in it at most so many KiB a value."""
MODEL_METADATA: Final = frozenset({"format"})
"""What a model's files may say of themselves."""
_DTYPES: Final = {
    8: ("F64", "I64", "U64"),
    4: ("F32", "I32", "U32"),
    2: ("F16", "BF16", "I16", "U16"),
    1: ("F8_E4M3", "F8_E5M2", "F8_E8M0", "I8", "U8", "BOOL"),
}
DTYPE_BYTES: Final[Mapping[str, int]] = MappingProxyType(
    {name: size for size, names in _DTYPES.items() for name in names}
)

_SPACE: Final = r"[ \t\r\n]*+"  # possessive: a run of spaces is looked at once
_NUMBER: Final = r"(?:0|[1-9][0-9]{0,17})"


def _spaced(*signs: str) -> str:
    return _SPACE.join(signs)


_PLACES: Final = _spaced(r"\[", f"({_NUMBER})", ",", f"({_NUMBER})", r"\]")
_MORE: Final = f"(?:{_spaced('', ',', _NUMBER)}){{0,{MAX_DIMENSIONS - 1}}}"
_SIDES: Final = _spaced(r"\[", f"((?:{_NUMBER}{_MORE})?)", r"\]")
_NAME: Final = r'"([A-Za-z0-9_][A-Za-z0-9_.:-]{0,255})"'
_DTYPE: Final = r'"([A-Z0-9_]{1,16})"'
_ENTRY: Final = (
    *(_NAME, ":", "{", '"dtype"', ":", _DTYPE, ",", '"shape"', ":", _SIDES),
    *(",", '"data_offsets"', ":", _PLACES, "}"),
)


def _compiled(pattern: str) -> re.Pattern[bytes]:
    return re.compile(pattern.encode())


_SPACES_RE: Final = _compiled(_SPACE)
_NAME_RE: Final = _compiled(_NAME)
_KEY_RE: Final = _compiled('"(dtype|shape|data_offsets)"')
_DTYPE_RE: Final = _compiled(_DTYPE)
_SIDES_RE: Final = _compiled(_SIDES)
_PLACES_RE: Final = _compiled(_PLACES)
_STRING_RE: Final = re.compile(rb'"(?:[^"\\\x00-\x1f]|\\.)*+"')
_USUAL_RE: Final = _compiled(_spaced(*_ENTRY))
"""A tensor as everybody writes it: one match instead of a dozen, which large files need."""

Code = Literal["truncated", "malformed"]


class HeaderError(ValueError):
    """A file is no safetensors file that we take; `code` says whether it only ends early."""

    def __init__(self, says: str, code: Code = "malformed") -> None:
        super().__init__(says)
        self.code: Code = code


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor of a file."""

    dtype: str
    """A key of DTYPE_BYTES."""
    shape: tuple[int, ...]
    begin: int
    """Where its bytes start and end, after the header."""
    end: int


@dataclass(frozen=True, slots=True)
class Header:
    """What a file says of itself."""

    data_start: int
    """Where in the file the first tensor may lie."""
    tensors: Mapping[str, TensorEntry]
    metadata: Mapping[str, str]


def read_header(
    path: Path,
    *,
    metadata: Collection[str] = MODEL_METADATA,
    schema: Mapping[str, tuple[str, tuple[int, ...]]] | None = None,
) -> Header:
    """Read a file's header and check that it describes the file to the last byte.

    Args: metadata: the keys that the metadata may have. schema: dtype and shape of each tensor,
        where the file must hold exactly these.
    Raises: HeaderError. OSError.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(8)
        length = int.from_bytes(head, "little")
        if len(head) < 8:
            raise HeaderError(f"{size} bytes, wanted 8 at least", "truncated")
        if length > MAX_HEADER_BYTES:
            raise HeaderError(f"a header of {length} bytes, wanted {MAX_HEADER_BYTES} at most")
        raw = file.read(length)
    if len(raw) < length:
        raise HeaderError(f"{size} bytes, wanted {8 + length} of header alone", "truncated")
    found = parse_header(raw, size - 8 - length, metadata=metadata)
    if schema is not None:
        check_schema(found, schema)
    return found


def parse_header(
    raw: bytes, data_bytes: int, *, metadata: Collection[str] = MODEL_METADATA
) -> Header:
    """Parse the JSON of a header. Args: data_bytes: what follows it in the file.

    Raises: HeaderError when it is anything else than the header of exactly such a file.
    """
    if len(raw) > MAX_HEADER_BYTES:
        raise HeaderError(f"a header of {len(raw)} bytes, wanted {MAX_HEADER_BYTES} at most")
    tensors: dict[str, TensorEntry] = {}
    told: dict[str, str] | None = None
    scan = _Scan(raw)
    scan.take(b"{")
    while not scan.ends(b"}", first=not tensors and told is None):
        if usual := scan.maybe(_USUAL_RE):
            name, dtype, sides, begin, end = usual.groups()
        else:
            name = scan.match(_NAME_RE, "a name of letters, digits and _ . : -")[1]
            scan.take(b":")
            if name == b"__metadata__" and told is None:
                told = _metadata(scan, metadata)
                continue
            dtype, sides, begin, end = _entry_in_any_order(scan)
        text = name.decode("ascii")
        if text in tensors or ".." in text or text == "__metadata__":
            raise HeaderError(f"the name {text!r} comes twice, or is a path")
        if len(tensors) == MAX_TENSORS:
            raise HeaderError(f"more than {MAX_TENSORS} tensors")
        tensors[text] = _entry(text, dtype.decode("ascii"), sides, int(begin), int(end))
    scan.finish()
    _check_dense(tensors, data_bytes)
    return Header(8 + len(raw), tensors, told or {})


def check_schema(header: Header, schema: Mapping[str, tuple[str, tuple[int, ...]]]) -> None:
    """Raise HeaderError unless the file holds exactly the tensors of the schema."""
    if odd := sorted(header.tensors.keys() ^ schema.keys()):
        raise HeaderError(f"{odd[:3]} are in the file or in the schema alone")
    for name, entry in header.tensors.items():
        if (entry.dtype, entry.shape) != schema[name]:
            raise HeaderError(f"{name} is {entry.dtype} {entry.shape}, wanted {schema[name]}")


class _Scan:
    """A place in the header that only moves on."""

    def __init__(self, raw: bytes) -> None:
        self._raw, self._at = raw, 0

    def match(self, pattern: re.Pattern[bytes], wanted: str) -> re.Match[bytes]:
        """Go past the pattern and the spaces before it."""
        found = self.maybe(pattern)
        if found is None:
            near = self._raw[self._at : self._at + 24]
            raise HeaderError(f"byte {self._at} of the header: found {near!r}, wanted {wanted}")
        return found

    def maybe(self, pattern: re.Pattern[bytes]) -> re.Match[bytes] | None:
        """Go past the pattern if it is there."""
        self._skip()
        if found := pattern.match(self._raw, self._at):
            self._at = found.end()
        return found

    def take(self, sign: bytes) -> None:
        """Go past one sign."""
        self._skip()
        if not self._raw.startswith(sign, self._at):
            near = self._raw[self._at : self._at + 24]
            says = f"byte {self._at} of the header: found {near!r}, wanted {sign.decode()!r}"
            raise HeaderError(says)
        self._at += len(sign)

    def ends(self, sign: bytes, *, first: bool) -> bool:
        """Whether an object ends here; else go past the comma before its next entry."""
        self._skip()
        if self._raw.startswith(sign, self._at):
            self._at += len(sign)
            return True
        if not first:
            self.take(b",")
        return False

    def finish(self) -> None:
        """Nothing but spaces may follow."""
        self._skip()
        if self._at < len(self._raw):
            raise HeaderError(f"{len(self._raw) - self._at} bytes after the header's end")

    def _skip(self) -> None:
        found = _SPACES_RE.match(self._raw, self._at)
        assert found is not None
        self._at = found.end()


def _metadata(scan: _Scan, allowed: Collection[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    scan.take(b"{")
    while not scan.ends(b"}", first=not found):
        key = _text(scan)
        scan.take(b":")
        if key not in allowed or key in found or len(found) == MAX_METADATA:
            wanted = ", ".join(sorted(allowed)) or "none"
            raise HeaderError(f"metadata {key[:60]!r}, wanted each once of: {wanted}")
        found[key] = _text(scan)
    return found


def _text(scan: _Scan) -> str:
    quoted = scan.match(_STRING_RE, "a string")[0]
    if len(quoted) > 1024 * MAX_METADATA:
        raise HeaderError(f"a metadata string of {len(quoted)} bytes, wanted 65536 at most")
    try:
        text = json.loads(quoted)
        assert isinstance(text, str)
        text.encode()  # a lone surrogate is no text
    except ValueError as error:
        raise HeaderError(f"a metadata string that is none ({type(error).__name__})") from None
    return text


def _entry(name: str, dtype: str, sides: bytes, begin: int, end: int) -> TensorEntry:
    shape = tuple(map(int, sides.split(b","))) if sides else ()
    if dtype not in DTYPE_BYTES:
        raise HeaderError(f"{name} is of the dtype {dtype}, wanted one of {list(DTYPE_BYTES)}")
    if end - begin != math.prod(shape) * DTYPE_BYTES[dtype]:
        raise HeaderError(f"{name} has {end - begin} bytes for {dtype} {shape}")
    return TensorEntry(dtype, shape, begin, end)


def _entry_in_any_order(scan: _Scan) -> tuple[bytes, bytes, bytes, bytes]:
    """Dtype, sides, begin and end of an entry whose keys another program ordered."""
    found: dict[bytes, tuple[bytes, ...]] = {}
    patterns = {
        b"dtype": (_DTYPE_RE, "a dtype"),
        b"shape": (_SIDES_RE, f"at most {MAX_DIMENSIONS} whole numbers"),
        b"data_offsets": (_PLACES_RE, "two whole numbers"),
    }
    scan.take(b"{")
    while not scan.ends(b"}", first=not found):
        key = scan.match(_KEY_RE, "dtype, shape or data_offsets")[1]
        if key in found:
            raise HeaderError(f"{key.decode()} comes twice")
        scan.take(b":")
        found[key] = scan.match(*patterns[key]).groups()
    if len(found) < len(patterns):
        raise HeaderError("a tensor wants dtype, shape and data_offsets, each once")
    begin, end = found[b"data_offsets"]
    return found[b"dtype"][0], found[b"shape"][0], begin, end


def _check_dense(tensors: Mapping[str, TensorEntry], data_bytes: int) -> None:
    """Every byte belongs to exactly one tensor: no holes, no overlaps, nothing behind."""
    end = 0
    for name, entry in sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].end)):
        if entry.begin != end:
            raise HeaderError(f"{name} starts at byte {entry.begin}, the tensors before end {end}")
        end = entry.end
    if end > data_bytes:
        raise HeaderError(f"{data_bytes} bytes of tensors, its header promises {end}", "truncated")
    if end < data_bytes:
        raise HeaderError(f"{data_bytes - end} bytes after the last tensor")
