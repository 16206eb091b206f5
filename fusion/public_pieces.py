"""A vocabulary without what the public text does not hold.

A tokenizer that was made from private text has private words for its pieces: names, places. A
contribution needs a piece only to say which event an id is, and a piece that stands nowhere in the
public text is no event of it. Without its bytes it counts as OTHER, like any id that the other
side has no counterpart for.
"""

from collections.abc import Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

_FACTOR: Final = np.uint64(0x9E3779B97F4A7C15)
_TABLE_BITS: Final = 20
_BETWEEN: Final = b"\xff"
"""Between two documents: no byte of any UTF-8."""


def public_only(
    vocab_bytes: NDArray[np.uint8],
    vocab_offsets: NDArray[np.int64],
    texts: Sequence[str | bytes],
) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """The vocabulary [V] with the bytes of those pieces only that stand somewhere in the texts.

    Single bytes stay: they are the alphabet. A document may begin with one space more than it has.
    Returns: bytes and offsets [V+1], as they were given; the ids keep their places.
    """
    lengths = np.diff(vocab_offsets)
    keep = lengths <= 1
    whole = b"".join(
        _BETWEEN + b" " + (text.encode() if isinstance(text, str) else text) for text in texts
    )
    codes = np.frombuffer(whole, np.uint8).astype(np.uint64) + np.uint64(1)
    hashes = codes
    for length in range(2, min(int(lengths.max(initial=0)), len(whole)) + 1):
        hashes = hashes[:-1] * _FACTOR + codes[length - 1 :]
        here = np.flatnonzero(lengths == length)
        if here.size:
            starts = vocab_offsets[here]
            wanted = _hashes(vocab_bytes, starts, length)
            keep[here] = np.isin(wanted, _candidates(hashes, wanted))
    kept = np.where(keep, lengths, 0)
    offsets = np.concatenate([[0], np.cumsum(kept)]).astype(np.int64)
    return vocab_bytes[np.repeat(keep, lengths)], offsets


def _hashes(raw: NDArray[np.uint8], starts: NDArray[np.int64], length: int) -> NDArray[np.uint64]:
    """Of the pieces of one length: sum of (byte + 1) * factor ** place, modulo 2**64."""
    found = np.zeros(len(starts), np.uint64)
    for place in range(length):
        found = found * _FACTOR + raw[starts + place].astype(np.uint64) + np.uint64(1)
    return found


def _candidates(hashes: NDArray[np.uint64], wanted: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Those of the text's hashes that share their first bits with one that is wanted."""
    shift = np.uint64(64 - _TABLE_BITS)
    table = np.zeros(1 << _TABLE_BITS, bool)
    table[wanted >> shift] = True
    found: NDArray[np.uint64] = hashes[table[hashes >> shift]]
    return found
