from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fp8.train import packed_batches


@settings(max_examples=40, deadline=None)
@given(
    tokens=st.integers(30, 300),
    batch_size=st.integers(1, 9),
    seq_len=st.integers(1, 29),
    seed=st.integers(0, 99),
)
def test_an_epoch_predicts_every_token_once(
    tokens: int, batch_size: int, seq_len: int, seed: int
) -> None:
    batch_at = packed_batches(range(tokens), batch_size=batch_size, seq_len=seq_len, seed=seed)
    windows = (tokens - 1) // seq_len
    steps = -(-2 * windows // batch_size)
    rows = torch.cat([batch_at(step) for step in range(steps)])
    assert rows.dtype == torch.int64
    assert rows.shape == (steps * batch_size, seq_len + 1)
    assert bool((rows.diff(dim=1) == 1).all())
    for epoch in (rows[:windows], rows[windows : 2 * windows]):
        predicted = epoch[:, 1:].flatten().sort().values
        assert torch.equal(predicted, predicted[0] + torch.arange(windows * seq_len))
    later = packed_batches(range(tokens), batch_size=batch_size, seq_len=seq_len, seed=seed)
    assert torch.equal(later(steps - 1), batch_at(steps - 1))


def test_epochs_and_seeds_shuffle_anew() -> None:
    first = packed_batches(range(801), batch_size=100, seq_len=8, seed=0)
    other = packed_batches(range(801), batch_size=100, seq_len=8, seed=1)
    assert not torch.equal(first(0), first(1))
    assert not torch.equal(first(0), other(0))
    assert not torch.equal(first(0), first(0).sort(0).values)


@pytest.mark.parametrize("stream", [[], [1, 2, 3], [[1] * 50]])
def test_a_stream_without_a_window_is_refused(stream: Any) -> None:
    with pytest.raises(ValueError, match="lower seq_len"):
        packed_batches(stream, batch_size=1, seq_len=8, seed=0)
