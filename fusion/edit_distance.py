"""The nearest of many byte strings by edit distance: the MinED of FuseLLM, fast enough to use.

One string is compared with all others at once, bit by bit in 64-bit words, and only with those
that a lower bound does not rule out. Shapes: N = strings searched.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

LONGEST: Final = 64
"""Bytes of a string that are compared: a word of the machine. Few tokens are longer."""
_ONE: Final = np.uint64(1)


class NearestStrings:
    """Strings prepared for being searched."""

    def __init__(self, strings: Sequence[bytes]) -> None:
        """Take [N] strings, none of them empty."""
        self._lengths = np.asarray([min(len(s), LONGEST) for s in strings])
        padded = b"".join(s[:LONGEST].ljust(LONGEST, b"\0") for s in strings)
        self._bytes = np.frombuffer(padded, np.uint8).reshape(-1, LONGEST)
        self._sets = np.asarray([_byte_set(s[:LONGEST]) for s in strings], np.uint64)

    def nearest(self, string: bytes) -> int:
        """Return the index of a string with the least Levenshtein distance, in bytes."""
        string = string[:LONGEST]
        bound = self._bound(string)
        best, found = LONGEST + 1, -1
        for least in range(LONGEST + 1):
            if least >= best:
                break
            if len(rows := np.flatnonzero(bound == least)):
                distances = self._distances(string, rows)
                first = int(distances.argmin())
                if distances[first] < best:
                    best, found = int(distances[first]), int(rows[first])
        return found

    def _bound(self, string: bytes) -> NDArray[np.int64]:
        """Return [N] what the distance is at least.

        An edit changes the length by at most one, and makes up for one missing byte at most.
        """
        own = np.uint64(_byte_set(string))
        here = np.bitwise_count(self._sets & ~own)
        there = np.bitwise_count(own & ~self._sets)
        longer = np.abs(self._lengths - len(string))
        return np.asarray(np.maximum(np.maximum(here, there), longer))

    def _distances(self, string: bytes, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the Levenshtein distance to each of the rows.

        Source: Myers 1999 (J. ACM 46), in Hyyro's form for whole strings: bit i of `up` and
        `down` says whether cell i of the distance table's column is one more or less than the
        cell above it.
        """
        matches = np.zeros(256, np.uint64)
        for index, byte in enumerate(string):
            matches[byte] |= _ONE << np.uint64(index)
        last = np.uint64(len(string) - 1)
        lengths, text = self._lengths[rows], self._bytes[rows]
        up, down = np.full(len(rows), ~np.uint64(0)), np.zeros(len(rows), np.uint64)
        score = np.full(len(rows), len(string), np.int64)
        done = score.copy()
        for column in range(int(lengths.max())):
            equal = matches[text[:, column]]
            across = (((equal & up) + up) ^ up) | equal
            more, less = down | ~(across | up), up & across
            score += ((more >> last) & _ONE).astype(np.int64)
            score -= ((less >> last) & _ONE).astype(np.int64)
            more, less = (more << _ONE) | _ONE, less << _ONE
            diagonal = equal | down
            up, down = less | ~(diagonal | more), more & diagonal
            done = np.where(lengths == column + 1, score, done)
        return done


def _byte_set(string: Iterable[int]) -> int:
    """Return a set of bytes as bits; bytes that share a bit make it smaller, never larger."""
    return sum(1 << bit for bit in {byte & 63 for byte in string})
