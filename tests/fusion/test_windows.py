from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fusion.windows import PADDING, document_windows, positions_of

LENGTHS = st.lists(st.integers(1, 12), min_size=1, max_size=6)


def offsets_of(lengths: list[int]) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(lengths)])


def epoch(lengths: list[int], seq_len: int, at: int = 0) -> np.ndarray:
    """All windows of an epoch, one after the other, found by reading until rows come again."""
    rows_at = document_windows(offsets_of(lengths), batch_size=1, seq_len=seq_len, seed=3)
    first = [rows_at(step).numpy()[0] for step in range(60)]
    windows = next(
        n for n in range(1, 60) if sum((w >= 0).sum() for w in first[:n]) >= sum(lengths)
    )
    return np.stack(first[at * windows : (at + 1) * windows])


@settings(max_examples=25)
@given(LENGTHS, st.integers(3, 9))
def test_an_epoch_has_every_row_once_and_cuts_no_document_that_fits(
    lengths: list[int], seq_len: int
) -> None:
    windows = epoch(lengths, seq_len)
    rows = windows[windows != PADDING]
    assert sorted(rows.tolist()) == list(range(sum(lengths)))
    home = {row: at for at, window in enumerate(windows.tolist()) for row in window}
    for first, end in pairwise(offsets_of(lengths).tolist()):
        if end - first <= seq_len:
            assert len({home[row] for row in range(first, end)}) == 1
        else:
            pieces = {home[row] for row in range(first, end)}
            assert all(first <= r < end or r == PADDING for at in pieces for r in windows[at])


@settings(max_examples=25)
@given(LENGTHS, st.integers(3, 9))
def test_positions_begin_anew_with_each_document_and_each_piece(
    lengths: list[int], seq_len: int
) -> None:
    offsets = offsets_of(lengths)
    rows = torch.from_numpy(epoch(lengths, seq_len))
    for window, positions in zip(rows.tolist(), positions_of(rows, offsets).tolist(), strict=True):
        for place, (row, position) in enumerate(zip(window, positions, strict=True)):
            if row == PADDING:
                continue
            new = place == 0 or row in offsets
            assert position == (0 if new else positions[place - 1] + 1)


def test_windows_are_full_where_documents_allow() -> None:
    assert (epoch([5] * 9 + [3] * 4, 8) != PADDING).sum() == 57
    assert len(epoch([5] * 4 + [3] * 4, 8)) == 4


def test_epochs_differ_in_order_alone_and_a_step_is_a_pure_function() -> None:
    lengths = [4] * 30
    one, two = epoch(lengths, 8), epoch(lengths, 8, at=1)
    assert sorted(one.tolist()) == sorted(two.tolist())
    assert one.tolist() != two.tolist()
    rows_at = document_windows(offsets_of(lengths), batch_size=4, seq_len=8, seed=3)
    assert torch.equal(rows_at(7), rows_at(7))
    assert rows_at(7).shape == (4, 8)


@pytest.mark.parametrize("seed", [3, 4])
def test_the_seed_alone_decides(seed: int) -> None:
    of = [
        document_windows(offsets_of([4] * 30), batch_size=15, seq_len=8, seed=s) for s in (3, seed)
    ]
    assert torch.equal(of[0](0), of[1](0)) == (seed == 3)
