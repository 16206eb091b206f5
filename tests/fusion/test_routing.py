from itertools import pairwise

import numpy as np
import pytest

from fusion.align import row_starts
from fusion.codec import LogitContribution
from fusion.routing import posterior_weights, prefix_loglik, uniform_weights
from tests.fusion.factories import build, cut_at, vocabulary_of

DOCS = [b"the valve is stenotic", b"ab", b"", b"left lower limb"]
CUTS = [{3, 4, 9, 12}, {1, 3, 4, 5, 9, 14, 20}, {2, 4, 8, 9, 10, 12, 16}]


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
    found = posterior_weights(student, made, decay=0.8, temperature=2.0)
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
    weights = posterior_weights(student, made)
    assert weights.sum(axis=1) == pytest.approx(np.ones(len(weights)))
    assert np.allclose(weights[student.doc_offsets[:-1]], 1 / 3)


@pytest.mark.parametrize("which", [0, 1, 2])
def test_no_row_looks_ahead(which: int) -> None:
    student, *_ = made = candidates()
    before = posterior_weights(student, made)
    changed = made[which]
    for row in range(changed.header.positions):
        kept = changed.own_logprob[row]
        changed.own_logprob[row] = -7.5
        # The row's token may tell only of student rows that start at or after its last byte.
        end = np.append(row_starts(changed), np.iinfo(np.int64).max)[row + 1]
        same = row_starts(student) < end
        after = posterior_weights(student, made)
        changed.own_logprob[row] = kept
        assert np.array_equal(before[same], after[same])


def test_the_candidate_that_explains_the_text_takes_over() -> None:
    student, other, good = candidates()
    good.own_logprob[:] = -0.1
    other.own_logprob[:] = -6
    last = student.doc_offsets[1] - 1
    assert posterior_weights(student, [student, other, good])[last].argmax() == 2


def test_weights_follow_their_candidates_in_any_order() -> None:
    student, *_ = made = candidates()
    forward = posterior_weights(student, made)
    backward = posterior_weights(student, made[::-1])
    assert np.allclose(forward, backward[:, ::-1])


def test_a_candidate_knows_its_own_prefixes_exactly() -> None:
    student = candidates()[0]
    known = prefix_loglik(student, student)
    for first, last in pairwise(student.doc_offsets.tolist()):
        own = student.own_logprob[first:last].astype(float)
        assert known[first:last] == pytest.approx(np.cumsum(own) - own)


def test_uniform_listens_to_all_experts_alike_and_not_to_the_base() -> None:
    weights = uniform_weights(5, 4)
    assert (weights[:, 0] == 0).all()
    assert weights[:, 1:] == pytest.approx(np.full((5, 3), 1 / 3))


@pytest.mark.parametrize(("decay", "temperature"), [(0.0, 1.0), (1.1, 1.0), (0.9, 0.0)])
def test_senseless_settings_are_refused(decay: float, temperature: float) -> None:
    student, *_ = made = candidates()
    with pytest.raises(ValueError, match="decay"):
        posterior_weights(student, made, decay=decay, temperature=temperature)
