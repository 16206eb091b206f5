"""Rows of conversations: nothing is lost, cut, or seen by a neighbour."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fp8.batches import IGNORED
from fp8.train import causal_lm_loss
from fusion.models import ModelSpec, build_model
from participant.stages.conversations import Example
from participant.stages.packing import fill, packed_examples


@settings(deadline=None)
@given(st.lists(st.integers(2, 17), min_size=1, max_size=40), st.integers(0, 3))
def test_an_epoch_holds_every_example_once_and_learns_its_answers(
    lengths: list[int], seed: int
) -> None:
    examples = [
        Example([1000 * i + j for j in range(n)], ((n // 2, n),)) for i, n in enumerate(lengths, 1)
    ]
    rows = len(fill(lengths, 17))
    batch_at = packed_examples(examples, batch_size=1, seq_len=16, seed=seed, pad_id=0)
    batch = [batch_at(step) for step in range(rows)]
    ids = np.concatenate([b["input_ids"][0] for b in batch])
    labels = np.concatenate([b["labels"][0] for b in batch])
    positions = np.concatenate([b["position_ids"][0] for b in batch])
    assert sorted(ids[ids > 0]) == sorted(i for e in examples for i in e.ids)
    assert (positions == ids % 1000)[ids > 0].all()  # each begins at 0 and is not cut
    answers = sorted(i for e in examples for a, b in e.answers for i in e.ids[a:b])
    assert sorted(labels[labels != IGNORED]) == answers
    assert (labels == ids)[labels != IGNORED].all()
    assert all((b["labels"][:, 1:] != IGNORED).any() for b in batch)
    assert torch.equal(batch_at(rows)["input_ids"].sum(), batch_at(rows)["input_ids"].sum())


@settings(deadline=None)
@given(st.lists(st.integers(1, 100), min_size=1, max_size=60))
def test_bins_hold_no_more_than_they_can_and_few_are_opened(lengths: list[int]) -> None:
    bins = fill(lengths, 100)
    assert sorted(i for one in bins for i in one) == list(range(len(lengths)))
    assert max(sum(lengths[i] for i in one) for one in bins) <= 100
    assert len(bins) <= 1 + 2 * sum(lengths) // 100  # at most one bin is less than half full


def test_packed_answers_cost_what_they_cost_alone() -> None:
    spec = ModelSpec(architecture="llama", hidden_size=32, layers=2, heads=2, vocab_size=300)
    model = build_model(spec, 0)
    rng = np.random.default_rng(0)
    examples = [Example(rng.integers(1, 300, n).tolist(), ((n // 2, n),)) for n in (5, 9, 6, 12, 7)]

    def loss(some: list[Example], seq_len: int) -> float:
        rows = packed_examples(some, batch_size=1, seq_len=seq_len, seed=0, pad_id=0)
        return float(causal_lm_loss(model, rows(0)).detach())

    alone = [loss([e], len(e.ids) + 3) for e in examples]
    weights = [len(e.ids) - len(e.ids) // 2 for e in examples]
    assert loss(examples, 40) == pytest.approx(np.average(alone, weights=weights), rel=1e-5)


def test_an_example_longer_than_a_row_is_refused() -> None:
    with pytest.raises(ValueError, match="found an example of 9 tokens, wanted at most 8"):
        packed_examples([Example([1] * 9, ((1, 9),))], batch_size=1, seq_len=7, seed=0, pad_id=0)
