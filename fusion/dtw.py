"""Dynamic time warping of two cuts of one text by the edit distance of their tokens, as FuseLLM.

For the baseline alone: ours aligns by bytes (fusion.align). Shapes: n, m = tokens of the two cuts,
W = width of the band, Q = pairs of tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

BAND: Final = 64
"""Tokens to either side of the straight line between the cuts' ends that a path may stray."""
_FAR: Final = np.int64(1) << 40


def warping_path(
    costs: NDArray[np.int64], lows: NDArray[np.int64], columns: int
) -> list[tuple[int, int]]:
    """Return the cheapest monotone path from (0, 0) to (n - 1, m - 1), as pairs (i, j).

    Args: costs: [n, W], of the pairs (i, lows[i] + w). lows: [n], not falling. columns: m.
    Of equally cheap steps the diagonal is taken, then the one that keeps j.
    """
    n, width = costs.shape
    total = np.full((n, width), _FAR)
    for i in range(n):
        j = lows[i] + np.arange(width)
        valid = j < columns
        if i == 0:
            reach = np.where(j == 0, 0, _FAR)
        else:
            up, diagonal = (_at(total[i - 1], j - lows[i - 1] - back) for back in (0, 1))
            reach = np.minimum(up, diagonal)
        cost = np.where(valid, costs[i], 0)
        # Steps to the right add up costs of this row: a running minimum over where they begin.
        along = np.cumsum(cost)
        best = np.minimum.accumulate(reach + cost - along) + along
        total[i] = np.where(valid, np.minimum(best, _FAR), _FAR)
    return _back(total, lows, columns)


def _at(row: NDArray[np.int64], places: NDArray[np.int64]) -> NDArray[np.int64]:
    inside = (places >= 0) & (places < len(row))
    return np.where(inside, row[np.clip(places, 0, len(row) - 1)], _FAR)


def _back(total: NDArray[np.int64], lows: NDArray[np.int64], columns: int) -> list[tuple[int, int]]:
    i, j = len(total) - 1, columns - 1
    path = [(i, j)]
    while i or j:
        steps = [(i - 1, j - 1), (i - 1, j), (i, j - 1)]
        i, j = min(steps, key=lambda step: _cost_at(total, lows, *step))
        path.append((i, j))
    return path[::-1]


def _cost_at(total: NDArray[np.int64], lows: NDArray[np.int64], i: int, j: int) -> int:
    if i < 0 or j < 0 or not 0 <= j - lows[i] < total.shape[1]:
        return int(_FAR) + 1
    return int(total[i, j - lows[i]])


def one_to_one(
    student: Sequence[bytes], teacher: Sequence[bytes], *, band: int = BAND
) -> NDArray[np.int64]:
    """Return [n] the teacher token that a student token is paired with alone, else -1.

    Costs are edit distances of the tokens' bytes; the path stays in a band around the line.
    """
    n, m = len(student), len(teacher)
    width = min(m, 2 * band + 1)
    middle = np.arange(n) * max(m - 1, 0) // max(n - 1, 1)
    # The line's ends must be inside; between them the band moves with it.
    lows = np.clip(middle - band, 0, max(m - width, 0))
    if n == 1:
        width, lows = m, np.zeros(1, np.int64)
    pairs = lows[:, None] + np.arange(width)
    vocabulary = sorted({*student, *teacher})
    code = {piece: index for index, piece in enumerate(vocabulary)}
    mine = np.asarray([code[piece] for piece in student])
    theirs = np.asarray([code[piece] for piece in teacher])
    keys = mine[:, None] * len(vocabulary) + theirs[pairs]
    unique, inverse = np.unique(keys, return_inverse=True)
    first, second = np.divmod(unique, len(vocabulary))
    distances = edit_distances([vocabulary[a] for a in first], [vocabulary[b] for b in second])
    path = np.asarray(warping_path(distances[inverse].reshape(keys.shape), lows, m))
    alone = (np.bincount(path[:, 0], minlength=n)[path[:, 0]] == 1) & (
        np.bincount(path[:, 1], minlength=m)[path[:, 1]] == 1
    )
    found = np.full(n, -1, np.int64)
    found[path[alone, 0]] = path[alone, 1]
    return found


def edit_distances(first: Sequence[bytes], second: Sequence[bytes]) -> NDArray[np.int64]:
    """Return [Q] the Levenshtein distance of each pair, in bytes."""
    if not first:
        return np.zeros(0, np.int64)
    a, a_length = _padded(first)
    b, b_length = _padded(second)
    row = np.tile(np.arange(b.shape[1] + 1), (len(first), 1))
    found = np.where(a_length == 0, b_length, 0)
    for i in range(a.shape[1]):
        change = np.minimum(row[:, :-1] + (a[:, i : i + 1] != b), row[:, 1:] + 1)
        change = np.concatenate([np.full((len(first), 1), i + 1), change], 1)
        # Insertions: a running minimum again, each step of which costs 1.
        steps = np.arange(change.shape[1])
        row = np.minimum.accumulate(change - steps, 1) + steps
        done = a_length == i + 1
        found[done] = row[done, b_length[done]]
    return found


def _padded(pieces: Sequence[bytes]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    lengths = np.asarray([len(piece) for piece in pieces])
    table: NDArray[Any] = np.full((len(pieces), max(1, int(lengths.max()))), -1, np.int64)
    inside = np.arange(table.shape[1]) < lengths[:, None]
    table[inside] = np.frombuffer(b"".join(pieces), np.uint8)
    return table, lengths
