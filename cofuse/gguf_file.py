"""GGUF, the one-file format of llama.cpp and of what is built on it: written a tensor at a time.

Layout (version 3, little endian): "GGUF", version, counts; keys with typed values; for each tensor
name, sizes innermost first, type and offset; then the tensors, each at a multiple of 32 bytes.
Source: the GGUF specification of ggml (docs/gguf.md). Shapes: R = rows, C = columns of a matrix.
"""

import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Final, Self

import numpy as np
from numpy.typing import NDArray

BLOCK: Final = 32
"""Values of a row that share a scale, in the quantised types."""
_ALIGNMENT: Final = 32
_MAGIC: Final = b"GGUF"
_VERSION: Final = 3
Value = bool | int | float | str | Sequence[str] | Sequence[int]


@dataclass(frozen=True, slots=True)
class TensorType:
    """How values are stored: `size` bytes for every `block` values of a row."""

    code: int
    block: int
    size: int
    encode: Callable[[NDArray[np.float32]], bytes]

    def nbytes(self, values: int) -> int:
        """Bytes of that many values, a multiple of `block`."""
        return values // self.block * self.size


def quantize_q4_0(values: NDArray[np.float32]) -> bytes:
    """Four bits a value: each block of 32 has a float16 scale, the value of most size at -8.

    Restored as (code - 8) * scale, to within one scale (half of one but at the far positive end).
    """
    blocks = values.reshape(-1, BLOCK)
    far = np.take_along_axis(blocks, np.abs(blocks).argmax(axis=1, keepdims=True), axis=1)
    scale = (far / -8).astype(np.float32)
    with np.errstate(divide="ignore"):
        inverse = np.where(scale == 0, 0, 1 / scale)
    codes = np.clip(blocks * inverse + 8.5, 0, 15).astype(np.uint8)
    halves = codes[:, : BLOCK // 2] | (codes[:, BLOCK // 2 :] << 4)
    packed = np.concatenate([scale.astype(np.float16).view(np.uint8), halves], axis=1)
    return packed.tobytes()


def quantize_q8_0(values: NDArray[np.float32]) -> bytes:
    """Eight bits a value: each block of 32 has a float16 scale, its largest size at 127."""
    blocks = values.reshape(-1, BLOCK)
    scale = (np.abs(blocks).max(axis=1, keepdims=True) / 127).astype(np.float32)
    with np.errstate(divide="ignore"):
        inverse = np.where(scale == 0, 0, 1 / scale)
    codes = np.rint(blocks * inverse).astype(np.int8)
    packed = np.concatenate([scale.astype(np.float16).view(np.uint8), codes.view(np.uint8)], axis=1)
    return packed.tobytes()


F32: Final = TensorType(0, 1, 4, lambda values: values.astype("<f4").tobytes())
F16: Final = TensorType(1, 1, 2, lambda values: values.astype("<f2").tobytes())
Q4_0: Final = TensorType(2, BLOCK, 18, quantize_q4_0)
Q8_0: Final = TensorType(8, BLOCK, 34, quantize_q8_0)


class GgufFile:
    """A file being written: keys and tensors are announced first, then the tensors in that order.

    Raises: ValueError when a tensor comes that was not announced as the next.
    """

    def __init__(
        self,
        path: Path,
        keys: Mapping[str, Value],
        tensors: Mapping[str, tuple[tuple[int, ...], TensorType]],
    ) -> None:
        self._left = list(tensors.items())
        self._file: BinaryIO = path.open("wb")
        self._file.write(_MAGIC + struct.pack("<IQQ", _VERSION, len(tensors), len(keys)))
        for key, value in keys.items():
            self._file.write(_text(key) + _typed(value))
        offset = 0
        for name, (shape, kind) in tensors.items():
            sizes = struct.pack(f"<{len(shape)}Q", *reversed(shape))
            self._file.write(_text(name) + struct.pack("<I", len(shape)) + sizes)
            self._file.write(struct.pack("<IQ", kind.code, offset))
            offset += _padded(kind.nbytes(int(np.prod(shape))))
        self._pad()

    def put(self, name: str, values: NDArray[np.float32]) -> None:
        """Write the next tensor."""
        wanted, (shape, kind) = self._left.pop(0) if self._left else ("nothing", ((), F32))
        if (name, values.shape) != (wanted, shape):
            raise ValueError(f"{name} {values.shape} comes where {wanted} {shape} was announced")
        self._file.write(kind.encode(np.ascontiguousarray(values)))
        self._pad()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        self._file.close()

    def _pad(self) -> None:
        at = self._file.tell()
        self._file.write(b"\0" * (_padded(at) - at))


def _padded(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def _text(value: str) -> bytes:
    raw = value.encode()
    return struct.pack("<Q", len(raw)) + raw


def _typed(value: Value) -> bytes:
    """The code of a value's type, and the value."""
    if isinstance(value, bool):
        return struct.pack("<I?", 7, value)
    if isinstance(value, int):
        return struct.pack("<II", 4, value)
    if isinstance(value, float):
        return struct.pack("<If", 6, value)
    if isinstance(value, str):
        return struct.pack("<I", 8) + _text(value)
    of_texts = bool(value) and isinstance(value[0], str)
    head = struct.pack("<IIQ", 9, 8 if of_texts else 5, len(value))
    parts = (_text(v) if isinstance(v, str) else struct.pack("<i", v) for v in value)
    return head + b"".join(parts)
