"""Tokenised documents end to end, in memory or in a file larger than memory.

A token file is one file, little-endian: a header (magic, bytes of a token, number of tokens,
number of documents), the tokens, zeros up to a multiple of 8, and offsets[D + 1] as uint64:
document d is tokens[offsets[d]:offsets[d + 1]].
"""

import os
import shutil
import struct
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Final

import numpy as np
from numpy.typing import ArrayLike, NDArray

MIN_TOKENS: Final = 2
"""A document of one token predicts nothing."""
_MAGIC: Final = b"cofuse tokens 1\n"
_HEADER: Final = struct.Struct("<16sQQQ")
_DTYPES: Final[dict[int, np.dtype[Any]]] = {2: np.dtype("<u2"), 4: np.dtype("<u4")}


@dataclass(frozen=True, slots=True)
class Documents:
    """Token ids of documents, one after the other, and where each begins."""

    tokens: NDArray[Any]
    """[N] integers."""
    offsets: NDArray[np.uint64]
    """[D + 1]: 0, the ends of the documents; the last is N."""

    @classmethod
    def of(cls, documents: Iterable[Sequence[int]]) -> "Documents":
        """Keep the documents in memory. Raises: ValueError for one of fewer than two tokens."""
        parts = [_checked(i, document, 2**32) for i, document in enumerate(documents)]
        ends = np.cumsum([0, *(len(part) for part in parts)])
        return cls(np.concatenate([np.empty(0, np.int64), *parts]), ends.astype(np.uint64))

    def __len__(self) -> int:
        """Count the documents."""
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> NDArray[Any]:
        """Return the token ids of one document."""
        if not 0 <= index < len(self):
            raise IndexError(f"document {index} of {len(self)}")
        return self.tokens[int(self.offsets[index]) : int(self.offsets[index + 1])]


class TokenFile:
    """Documents on disk: written in one pass, read through a memory map."""

    @staticmethod
    def write(
        path: Path, documents: Iterable[Sequence[int]], *, vocab_size: int = 2**32
    ) -> Documents:
        """Write the documents as they come, and open what was written.

        The file appears under its name only when it is whole; memory holds one document.
        Args: documents: token ids, at least two each; vocab_size: up to 65 536 a token takes two
            bytes, else four.
        Raises: ValueError for a document too short, or an id outside the vocabulary.
        """
        dtype = _DTYPES[2 if vocab_size <= 2**16 else 4]
        draft = path.with_name(path.name + ".partial")
        with draft.open("wb") as file, tempfile.TemporaryFile(dir=path.parent) as offsets:
            file.write(bytes(_HEADER.size))
            count, tokens = _append_all(file, offsets, documents, dtype, vocab_size)
            file.write(bytes(-file.tell() % 8))
            offsets.seek(0)
            shutil.copyfileobj(offsets, file)
            file.seek(0)
            file.write(_HEADER.pack(_MAGIC, dtype.itemsize, tokens, count))
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
        return TokenFile.open(path)

    @staticmethod
    def open(path: Path) -> Documents:
        """Map a token file into memory; nothing but its header is read.

        Raises: ValueError when it is not a token file, or not a whole one.
        """
        size = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(_HEADER.size)
        if len(head) < _HEADER.size or not head.startswith(_MAGIC):
            raise ValueError(f"{path} is not a token file; write it with TokenFile.write")
        _, width, tokens, count = _HEADER.unpack(head)
        end = _HEADER.size + tokens * width
        begin = end + -end % 8
        if width not in _DTYPES or size != begin + 8 * (count + 1):
            raise ValueError(
                f"token file {path} has {size} bytes, but its header tells of {tokens} tokens of "
                f"{width} bytes in {count} documents; restore it, or write it anew"
            )
        return Documents(
            np.memmap(path, _DTYPES[width], "r", _HEADER.size, (tokens,)) if tokens else _NOTHING,
            np.memmap(path, np.dtype("<u8"), "r", begin, (count + 1,)),
        )


_NOTHING: Final = np.empty(0, np.uint32)


def _append_all(
    file: IO[bytes],
    offsets: IO[bytes],
    documents: Iterable[Sequence[int]],
    dtype: np.dtype[Any],
    vocab_size: int,
) -> tuple[int, int]:
    """Write tokens and offsets; returns the number of documents and of tokens."""
    count = tokens = 0
    offsets.write(struct.pack("<Q", 0))
    for document in documents:
        ids = _checked(count, document, vocab_size)
        file.write(ids.astype(dtype).tobytes())
        count, tokens = count + 1, tokens + len(ids)
        offsets.write(struct.pack("<Q", tokens))
    return count, tokens


def _checked(index: int, document: ArrayLike, vocab_size: int) -> NDArray[np.int64]:
    ids = np.asarray(document)
    if ids.ndim != 1 or len(ids) < MIN_TOKENS:
        raise ValueError(
            f"document {index} has shape {ids.shape}; wanted at least {MIN_TOKENS} tokens, since "
            "one alone predicts nothing; leave it out"
        )
    if ids.dtype.kind not in "iu" or ids.min() < 0 or ids.max() >= vocab_size:
        raise ValueError(
            f"document {index} holds {ids.dtype} from {ids.min()} to {ids.max()}; wanted integers "
            f"in [0, {vocab_size}); give the vocabulary size of the tokenizer that made it"
        )
    return ids.astype(np.int64)
