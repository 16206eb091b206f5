from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from fp8.train import TrainConfig
from fusion.align import row_starts
from fusion.contribution import LogitContribution
from fusion.routing import (
    ROUTES,
    cap_weights,
    evidence,
    gate,
    prefix_loglik,
    route,
    scale_experts,
    share_factors,
)
from fusion.settings import FusionSettings, RoutingName
from tests.fusion.factories import build, cut_at, vocabulary_of

DOCS = [b"the valve is stenotic", b"ab", b"", b"left lower limb"]
CUTS = [{3, 4, 9, 12}, {1, 3, 4, 5, 9, 14, 20}, {2, 4, 8, 9, 10, 12, 16}]


def settings(routing: RoutingName = "posterior", **changes: Any) -> FusionSettings:
    train = TrainConfig(steps=1, lr=1e-3, warmup_steps=0, decay_steps=0)
    return FusionSettings(train=train, batch_size=1, seq_len=4, routing=routing, **changes)


def candidates() -> list[LogitContribution]:
    made = []
    for seed, places in enumerate(CUTS):
        cut = [cut_at(doc, places) for doc in DOCS]
        made.append(build(cut, vocabulary_of(cut), top_k=2, seed=seed)[0])
    return made


def read_of(candidate: LogitContribution, doc: int, prefix: int) -> float:
    """Brute force: the summed log-likelihood of the tokens that lie wholly in the prefix."""
    first, last = candidate.doc_offsets[doc : doc + 2]
    total = 0.0
    for row in range(first, last - 1):
        if candidate.byte_ends[row] <= prefix:
            total += float(candidate.own_logprob[row])
    return total


def test_the_posterior_is_the_decayed_softmax_of_what_each_has_read() -> None:
    student, *_ = made = candidates()
    found = route(student, made, settings(decay=0.8, temperature=2.0))
    for doc, (first, last) in enumerate(pairwise(student.doc_offsets.tolist())):
        score, before = np.zeros(len(made)), np.zeros(len(made))
        for row in range(first, last):
            prefix = int(student.byte_ends[row - 1]) if row > first else 0
            now = np.asarray([read_of(c, doc, prefix) for c in made])
            score, before = 0.8 * score + (now - before if row > first else 0), now
            wanted = np.exp(score / 2 - (score / 2).max())
            assert found[row] == pytest.approx(wanted / wanted.sum(), abs=1e-5), (doc, row)


def test_every_document_starts_even_and_every_row_sums_to_one() -> None:
    student, *_ = made = candidates()
    weights = route(student, made, settings())
    assert weights.sum(axis=1) == pytest.approx(np.ones(len(weights)))
    assert np.allclose(weights[student.doc_offsets[:-1]], 1 / 3)


@pytest.mark.parametrize("which", [0, 1, 2])
def test_no_row_looks_ahead(which: int) -> None:
    student, *_ = made = candidates()
    before = route(student, made, settings())
    changed = made[which]
    for row in range(changed.header.positions):
        kept = changed.own_logprob[row]
        changed.own_logprob[row] = -7.5
        # The row's token may tell only of student rows that start at or after its last byte.
        end = np.append(row_starts(changed), np.iinfo(np.int64).max)[row + 1]
        same = row_starts(student) < end
        after = route(student, made, settings())
        changed.own_logprob[row] = kept
        assert np.array_equal(before[same], after[same])


def test_the_candidate_that_explains_the_text_takes_over() -> None:
    student, other, good = candidates()
    good.own_logprob[:] = -0.1
    other.own_logprob[:] = -6
    last = student.doc_offsets[1] - 1
    assert route(student, [student, other, good], settings())[last].argmax() == 2


def test_weights_follow_their_candidates_in_any_order() -> None:
    student, *_ = made = candidates()
    forward = route(student, made, settings())
    backward = route(student, made[::-1], settings())
    assert np.allclose(forward, backward[:, ::-1])


def test_a_candidate_knows_its_own_prefixes_exactly() -> None:
    student = candidates()[0]
    known = prefix_loglik(student, student)
    for first, last in pairwise(student.doc_offsets.tolist()):
        own = student.own_logprob[first:last].astype(float)
        assert known[first:last] == pytest.approx(np.cumsum(own) - own)


def test_uniform_listens_to_all_experts_alike_and_not_to_the_base() -> None:
    student, *_ = made = candidates()
    weights = route(student, made, settings("uniform"))
    assert (weights[:, 0] == 0).all()
    assert (weights[:, 1:] == 0.5).all()


def test_a_document_goes_whole_to_whom_it_is_likeliest() -> None:
    student, *_ = made = candidates()
    weights = route(student, made, settings("document"))
    for doc, (first, last) in enumerate(pairwise(student.doc_offsets.tolist())):
        totals = [c.own_logprob[slice(*c.doc_offsets[doc : doc + 2])].sum() for c in made]
        assert (weights[first:last] == np.eye(3)[int(np.argmax(totals))]).all()


def test_static_is_the_prior_everywhere_and_a_prior_moves_the_posterior() -> None:
    student, *_ = made = candidates()
    prior = (1.0, 2.0, 5.0)
    assert np.allclose(route(student, made, settings("static", prior=prior)), np.asarray(prior) / 8)
    found = route(student, made, settings(prior=prior))
    assert np.allclose(found[student.doc_offsets[:-1]], np.asarray(prior) / 8)
    odds = found / route(student, made, settings())
    assert np.allclose(odds / odds[:, :1], [1.0, 2.0, 5.0], rtol=1e-4)


@pytest.mark.parametrize("routing", ROUTES)
@pytest.mark.parametrize("most", [0.2, 0.5, 1.0])
def test_no_expert_has_more_than_its_cap_and_nothing_is_lost(
    routing: RoutingName, most: float
) -> None:
    student, *_ = made = candidates()
    found = route(student, made, settings(routing, max_weight=most))
    assert (found[:, 1:] <= most + 1e-6).all()
    assert found.sum(axis=1) == pytest.approx(np.ones(len(found)))
    free = route(student, made, settings(routing))
    inside = (free[:, 1:] <= most).all(axis=1)
    assert np.array_equal(found[inside], free[inside])
    assert np.array_equal(cap_weights(found, most), found)


def test_the_gate_silences_exactly_who_reads_worse_than_the_base() -> None:
    student, *_ = made = candidates()
    told = evidence(student, made, 0.9)
    free = route(student, made, settings())
    gated = route(student, made, settings(gate_nats=0.5))
    silent = told < told[:, :1] - 0.5
    assert silent.any()
    assert (gated[silent] == 0).all()
    kept = ~silent
    kept[:, 0] = False
    assert np.array_equal(gated[kept], free[kept])
    assert gated.sum(axis=1) == pytest.approx(np.ones(len(gated)))
    assert np.array_equal(gate(free, told, np.inf), free)


def test_a_source_over_its_share_is_scaled_to_it_and_the_others_take_the_rest() -> None:
    rng = np.random.default_rng(0)
    weights = rng.dirichlet([1, 1, 8], size=400).astype(np.float32)
    factors = share_factors(weights.mean(axis=0).astype(np.float64), 0.3)
    assert factors[0] > 1
    found = scale_experts(weights, factors)
    assert found[:, 2].mean() == pytest.approx(0.3, abs=1e-5)
    assert found.sum(axis=1) == pytest.approx(np.ones(400), abs=1e-5)
    # Base and honest expert keep their odds: what the third loses is not the base's alone.
    odds, before = found[:, 1] / found[:, 0], weights[:, 1] / weights[:, 0]
    assert odds == pytest.approx(before, rel=1e-2)
    untouched = share_factors(np.asarray([0.4, 0.3, 0.3]), 0.5)
    assert np.allclose(scale_experts(weights, untouched), weights, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "value"),
    [("decay", 0.0), ("decay", 1.1), ("temperature", 0.0), ("max_weight", 0.0), ("prior", (0.0,))],
)
def test_senseless_settings_are_refused(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=name):
        settings(**{name: value})


def test_a_prior_of_another_length_is_refused() -> None:
    student, *_ = made = candidates()
    with pytest.raises(ValueError, match="has 2 weights, wanted 3"):
        route(student, made, settings(prior=(1.0, 1.0)))
