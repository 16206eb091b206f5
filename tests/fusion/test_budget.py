import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fusion.budget import Budget, choose, gains, keep
from fusion.contribution import LogitContribution
from tests.fusion.factories import SHA, build, contributions, cut_at, vocabulary_of

places = st.sets(st.integers(1, 11))


@given(
    a=places, b=places, seed=st.integers(0, 9), texts=st.lists(st.binary(max_size=12), min_size=1)
)
def test_a_gain_is_the_chunks_loglikelihood_against_the_pivots(
    a: set[int], b: set[int], seed: int, texts: list[bytes]
) -> None:
    cuts = [[cut_at(text, at) for text in texts] for at in (a, b)]
    vocab = vocabulary_of(*cuts)
    expert, pivot = (build(c, vocab, top_k=1, seed=seed + i)[0] for i, c in enumerate(cuts))
    found = gains(expert, pivot).tolist()
    row = other = 0
    for text in texts:
        mine, theirs = ([0, *sorted(p for p in at if p < len(text)), len(text)] for at in (a, b))
        if not text:
            mine = theirs = [0]
        both = sorted(set(mine) & set(theirs))
        for index, place in enumerate(mine):
            if place not in both:
                assert found[row + index] == -np.inf
                continue
            after = next((p for p in both if p > place), None)
            end, till = (
                (row + mine.index(after), other + theirs.index(after))
                if after is not None
                else (row + len(mine), other + len(theirs))
            )
            wanted = expert.own_logprob[row + index : end].sum()
            wanted -= pivot.own_logprob[other + theirs.index(place) : till].sum()
            assert found[row + index] == pytest.approx(wanted, abs=1e-3)
        row, other = row + len(mine), other + len(theirs)


@given(
    gain=st.lists(st.sampled_from([-np.inf, -1.0, 0.0, 0.5, 1.0, 2.0]), min_size=1, max_size=40),
    share=st.floats(0.01, 1),
    margin=st.sampled_from([-2.0, 0.0, 0.7]),
)
def test_the_best_above_the_margin_ship_and_no_more_than_the_share(
    gain: list[float], share: float, margin: float
) -> None:
    gain_P = np.asarray(gain, np.float32)
    chosen = choose(gain_P, Budget(share, margin))
    assert chosen.sum() == min(int(share * len(gain)), (gain_P > margin).sum())
    assert (gain_P[chosen] > margin).all()
    left = gain_P[~chosen].max(initial=-np.inf)
    if chosen.any() and chosen.sum() < (gain_P > margin).sum():
        assert gain_P[chosen].min() >= left
        at = np.flatnonzero(gain_P == gain_P[chosen].min())
        assert (np.diff(chosen[at].astype(int)) <= 0).all()  # of equal ones the earlier


@given(made=contributions(), seed=st.integers(0, 9))
def test_what_is_left_out_leaves_its_own_logprob_and_all_mass_in_the_tail(
    made: tuple[LogitContribution, list[bytes]], seed: int
) -> None:
    whole = made[0]
    chosen = np.random.default_rng(seed).random(whole.header.positions) < 0.5
    kept = keep(whole, chosen & whole.shipped, SHA)
    assert np.array_equal(kept.shipped, chosen & whole.shipped)
    assert np.array_equal(kept.own_logprob, whole.own_logprob)
    assert (kept.topk_ids[~kept.shipped] == -1).all()
    assert (kept.tail_logprob[~kept.shipped] == 0).all()
    assert np.array_equal(kept.topk_ids[kept.shipped], whole.topk_ids[kept.shipped])
    assert (kept.header.shipped, kept.header.pivot_sha256) == (kept.shipped.sum(), SHA)


@pytest.mark.parametrize(("share", "margin"), [(0, 0), (1.1, 0), (np.nan, 0), (0.5, np.nan)])
def test_a_budget_that_cannot_be_meant_is_refused(share: float, margin: float) -> None:
    with pytest.raises(ValueError, match="share"):
        Budget(share, margin)
