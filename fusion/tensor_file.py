"""Safetensors files that are written and read piece by piece, and believed in nothing.

A file is a JSON header (dtype, shape and place of each array, and one header of ours), then the
arrays. Nothing in it runs. Every size is checked against the file's before anything is read.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, Final, Generic, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from fusion.contribution import CODEC_VERSION, ContributionError
from trust.safetensors_header import HeaderError, TensorEntry, read_header

_DTYPES: Final[Mapping[str, str]] = {
    "I64": "int64",
    "F32": "float32",
    "F16": "float16",
    "U16": "uint16",
    "U8": "uint8",
}
_METADATA: Final = ("format", "header")
_NAMES: Final = {name: code for code, name in _DTYPES.items()}
_UNREADABLE: Final = (
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    OverflowError,
    RecursionError,
)


class Header(Protocol):
    """A frozen dataclass of int and str fields, codec_version among them."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def codec_version(self) -> int:
        """Which layout the arrays have."""
        ...


_Header = TypeVar("_Header", bound=Header)


@dataclass(frozen=True, slots=True)
class Entry:
    """One array of a file."""

    dtype: str
    """Numpy's name."""
    shape: tuple[int, ...]
    begin: int = 0
    """Where its bytes start, after the JSON header."""

    @property
    def row_bytes(self) -> int:
        """Bytes of one step along the first side."""
        return math.prod(self.shape[1:]) * np.dtype(self.dtype).itemsize

    @property
    def end(self) -> int:
        """Where its bytes end."""
        return self.begin + math.prod(self.shape) * np.dtype(self.dtype).itemsize


class TensorWriter:
    """Writes arrays of known shapes slice by slice; the file appears whole, or not at all."""

    def __init__(self, path: Path, arrays: Mapping[str, Entry], header: Header) -> None:
        """Lay the file out. Args: arrays: dtype and shape of each, widest dtype first."""
        self._path, self._partial = path, path.with_name(path.name + ".partial")
        self._arrays: dict[str, Entry] = {}
        end = 0
        for name, entry in arrays.items():
            self._arrays[name] = placed = Entry(entry.dtype, entry.shape, end)
            end = placed.end
        table: dict[str, Any] = {
            name: {
                "dtype": _NAMES[entry.dtype],
                "shape": entry.shape,
                "data_offsets": [entry.begin, entry.end],
            }
            for name, entry in self._arrays.items()
        }
        table["__metadata__"] = {
            "format": type(header).__name__,
            "header": json.dumps(asdict(header)),
        }
        raw = json.dumps(table).encode()
        raw += b" " * (-len(raw) % 8)  # so that the arrays lie where their types like to
        self._start = 8 + len(raw)
        self._file = self._partial.open("wb")
        self._file.write(len(raw).to_bytes(8, "little") + raw)
        self._file.truncate(self._start + end)

    def put(self, name: str, values: NDArray[Any], row: int = 0) -> None:
        """Write values as the rows of an array from `row` on."""
        entry = self._arrays[name]
        room = (entry.shape[0] if entry.shape else 1) - row
        fits = values.shape[1:] == entry.shape[1:] and sum(values.shape[:1]) <= room
        if values.dtype != entry.dtype or not fits:
            raise ValueError(
                f"{name} holds {entry.dtype} {entry.shape}, got {values.dtype} {values.shape} at "
                f"row {row}"
            )
        self._file.seek(self._start + entry.begin + row * entry.row_bytes)
        np.ascontiguousarray(values).tofile(self._file)

    def __enter__(self) -> TensorWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Put the file in its place; after an error leave nothing."""
        with self._file as file:
            if error is None:
                file.flush()
                os.fsync(file.fileno())
        if error is None:
            os.replace(self._partial, self._path)
        else:
            self._partial.unlink(missing_ok=True)


class TensorFile(Generic[_Header]):
    """A file of somebody else's: its layout is checked here, its arrays are read by slices."""

    def __init__(self, path: Path, header_type: type[_Header]) -> None:
        """Read dtypes, shapes and header, and touch no array. Raises: ContributionError."""
        self.path = path
        try:
            found = read_header(path, metadata=_METADATA)
            self._start = found.data_start
            self.arrays = {name: _entry(entry) for name, entry in found.tensors.items()}
            self.header = _parse_header(found.metadata, header_type)
        except HeaderError as error:
            raise (truncated if error.code == "truncated" else malformed)(str(error)) from error
        except _UNREADABLE as error:
            raise malformed(f"unreadable header ({type(error).__name__}: {error})") from error

    def rows(self, name: str, start: int = 0, stop: int | None = None) -> NDArray[Any]:
        """Read rows start..stop-1 of an array; all of it when not told."""
        entry = self.arrays[name]
        sides = entry.shape or (1,)
        stop = sides[0] if stop is None else stop
        shape = (stop - start, *sides[1:])
        # Read, not mapped: pages of a map would count as ours until the whole file is in memory.
        with self.path.open("rb") as file:
            file.seek(self._start + entry.begin + start * entry.row_bytes)
            values = np.fromfile(file, entry.dtype, math.prod(shape))
        if values.size != math.prod(shape):
            size = self.path.stat().st_size
            raise truncated(f"{size} bytes, its header promises {self._start + entry.end}")
        return values.reshape(shape if entry.shape else ())


def _entry(found: TensorEntry) -> Entry:
    return Entry(_DTYPES[found.dtype], found.shape, found.begin)


def _parse_header(metadata: Mapping[str, str], header_type: type[_Header]) -> _Header:
    if metadata["format"] != header_type.__name__:
        raise ValueError(f"format {metadata['format']!r}, wanted {header_type.__name__!r}")
    values = json.loads(metadata["header"])
    kinds = {field.name: {"int": int, "str": str}[str(field.type)] for field in fields(header_type)}
    if values.get("codec_version") != CODEC_VERSION:
        found = str(values.get("codec_version"))[:20]
        raise ValueError(f"codec version {found}, this reads {CODEC_VERSION}")
    if values.keys() != kinds.keys():
        raise ValueError(f"header keys {sorted(values)[:20]}, wanted {sorted(kinds)}")
    for name, kind in kinds.items():
        if type(values[name]) is not kind or (kind is int and values[name] < 0):
            raise ValueError(f"header {name} is {values[name]!r}")
    return header_type(**values)


def malformed(found: str) -> ContributionError:
    """Say what is wrong in a file whose maker can only make it again."""
    return ContributionError("malformed", f"{found}: export the contribution again")


def truncated(found: str) -> ContributionError:
    """Say that a file ends early."""
    return ContributionError("truncated", f"{found}: upload the file again")
