"""Windows of whole documents, laid side by side so that none reads another.

An expert reads every document on its own. In windows of a packed stream the pivot would read the
neighbours before it, and of short documents many would be cut: an answer without its question.
Shapes: P = rows of the stream, D = documents, W = windows, B = windows of a batch, T = tokens of a
window.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable
from functools import lru_cache
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

PADDING: Final = -1
"""In place of a row, where a window has no more of them."""


def document_windows(
    offsets: NDArray[np.integer[Any]], *, batch_size: int, seq_len: int, seed: int
) -> Callable[[int], Tensor]:
    """Lay the documents into windows of seq_len rows, and shuffle these anew in every epoch.

    A document longer than a window is cut into pieces, each in a window of its own.
    Args: offsets: [D + 1] first row of each document; the last entry is P.
    Returns: rows_at(step) -> [B, T] int64, rows or PADDING; pure, safe to call for any step.
    """
    rows_WT = _windows(offsets, seq_len, np.random.default_rng(seed))
    windows = len(rows_WT)

    @lru_cache(maxsize=2)
    def order(epoch: int) -> NDArray[np.int64]:
        return np.random.default_rng([seed, epoch]).permutation(windows)

    def rows_at(step: int) -> Tensor:
        places = range(step * batch_size, (step + 1) * batch_size)
        chosen = [order(place // windows)[place % windows] for place in places]
        return torch.from_numpy(rows_WT[chosen])

    return rows_at


def positions_of(rows_BT: Tensor, offsets: NDArray[np.integer[Any]]) -> Tensor:
    """Return [B, T] int64: how far into its document, or its piece of one, each row is."""
    starts_BT = torch.isin(rows_BT, torch.from_numpy(np.asarray(offsets, np.int64)))
    starts_BT |= (rows_BT == PADDING) & (rows_BT.roll(1, dims=1) != PADDING)
    starts_BT[:, 0] = True
    place_BT = torch.arange(rows_BT.shape[1]).expand_as(rows_BT)
    return place_BT - (place_BT * starts_BT).cummax(dim=1).values


def _windows(
    offsets: NDArray[np.integer[Any]], seq_len: int, rng: np.random.Generator
) -> NDArray[np.int64]:
    """Return [W, T]: each document in the fullest window that has room for it, longest first."""
    lengths_D = np.diff(np.asarray(offsets, np.int64))
    shuffled_D = rng.permutation(len(lengths_D))
    windows: list[list[int]] = []
    room: list[tuple[int, int]] = []  # of the windows that are not full: rows left, which
    for document in shuffled_D[np.argsort(-lengths_D[shuffled_D], kind="stable")].tolist():
        rows = list(range(int(offsets[document]), int(offsets[document + 1])))
        if len(rows) > seq_len:
            windows += [rows[at : at + seq_len] for at in range(0, len(rows), seq_len)]
            continue
        found = bisect_left(room, (len(rows), 0))
        left, window = room.pop(found) if found < len(room) else (seq_len, len(windows))
        if window == len(windows):
            windows.append([])
        windows[window] += rows
        if left > len(rows):
            insort(room, (left - len(rows), window))
    rows_WT = np.full((len(windows), seq_len), PADDING, np.int64)
    for window, found_rows in enumerate(windows):
        rows_WT[window, : len(found_rows)] = found_rows
    return rows_WT
