import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fusion.contribution import ContributionError
from fusion.samples import draw, tally, uniforms


@given(
    seed=st.integers(0, 2**63),
    document=st.integers(0, 2**40),
    start=st.integers(0, 30),
    rows=st.integers(1, 9),
    draws=st.integers(1, 11),
)
def test_a_number_depends_on_seed_document_row_and_draw_alone(
    seed: int, document: int, start: int, rows: int, draws: int
) -> None:
    whole = uniforms(seed, document, 0, start + rows, draws)
    assert np.array_equal(whole[start:], uniforms(seed, document, start, rows, draws))
    assert ((whole >= 0) & (whole < 1)).all()
    for other in (uniforms(seed + 1, document, 0, 9, 4), uniforms(seed, document + 1, 0, 9, 4)):
        assert (uniforms(seed, document, 0, 9, 4) != other).all()


def test_the_numbers_of_neighbouring_rows_are_not_alike() -> None:
    numbers = uniforms(0, 0, 0, 4000, 5)
    assert len(np.unique(numbers)) == numbers.size
    assert abs(numbers.mean() - 0.5) < 0.01
    assert np.abs(np.corrcoef(numbers.T) - np.eye(5)).max() < 0.08
    assert abs(np.corrcoef(numbers[1:, 0], numbers[:-1, 0])[0, 1]) < 0.08


def test_no_id_of_no_weight_is_drawn_and_the_ends_of_the_line_are_ids() -> None:
    logits = torch.tensor([[-torch.inf, 0.0, -torch.inf, 0.0, -torch.inf]])
    numbers = torch.tensor([[0.0, 0.4999, 0.5, 1 - 2**-53]], dtype=torch.float64)
    ids, own = draw(logits, torch.tensor([3]), numbers)
    assert ids.tolist() == [[1, 1, 3, 3]]
    assert own.item() == pytest.approx(np.log(0.5))


def test_logits_that_are_not_numbers_are_refused() -> None:
    for bad in (torch.nan, torch.inf):
        with pytest.raises(ContributionError) as caught:
            draw(torch.tensor([[0.0, bad]]), torch.tensor([0]), torch.zeros(1, 1).double())
        assert caught.value.code == "not_finite"


@given(
    hnp.arrays(
        np.int64, st.tuples(st.integers(1, 5), st.integers(1, 12)), elements=st.integers(0, 8)
    ),
    st.integers(1, 14),
)
def test_a_tally_is_the_counts_of_the_draws_or_of_the_first_k(drawn: np.ndarray, k: int) -> None:
    ids, logprobs = tally(drawn, k)
    for row, found, logs in zip(drawn.tolist(), ids, logprobs, strict=True):
        used = row if len(set(row)) <= k else row[:k]
        counts = {i: used.count(i) / len(used) for i in used}
        there = found >= 0
        assert dict(zip(found[there].tolist(), np.exp(logs[there]), strict=True)) == pytest.approx(
            counts
        )
        assert (logs[~there] == -60).all()
        assert (np.diff(logs) <= 0).all()


@pytest.mark.parametrize("k", [4, 6, 12])
def test_the_mean_over_seeds_is_the_softmax_also_where_few_columns_hold_it(k: int) -> None:
    torch.manual_seed(0)
    logits, runs, total = torch.randn(1, 12) * 1.5, 6000, np.zeros(12)
    numbers = np.concatenate([uniforms(seed, 0, 0, 1, 10) for seed in range(runs)])
    drawn, _ = draw(
        logits.expand(runs, -1),
        torch.zeros(runs, dtype=torch.long),
        torch.from_numpy(numbers),
    )
    ids, logprobs = tally(drawn.numpy(), k)
    shares = np.where(ids >= 0, np.exp(logprobs), 0)
    np.add.at(total, ids[ids >= 0], shares[ids >= 0])
    p = logits[0].softmax(-1).numpy()
    # Five deviations of a mean of `runs` rows, each of at least k draws.
    assert (np.abs(total / runs - p) < 5 * np.sqrt(p * (1 - p) / runs / min(k, 10))).all()
    # A cross-entropy is linear in its target, so its gradient is as unbiased as the target is.
    student = torch.randn(12, dtype=torch.float64, requires_grad=True)
    target = torch.from_numpy(total / runs)
    (full,) = torch.autograd.grad(-(torch.from_numpy(p) * student.log_softmax(0)).sum(), student)
    (mean,) = torch.autograd.grad(-(target * student.log_softmax(0)).sum(), student)
    assert torch.allclose(full, mean, atol=0.02)
