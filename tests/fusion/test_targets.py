import numpy as np
import pytest
import torch
from transformers import PreTrainedTokenizerFast

from fusion.losses import standardize
from fusion.models import encode_text, token_bytes, train_tokenizer
from fusion.targets import chunk_targets, first_pieces, rank_targets, span_targets
from tests.fusion.factories import build, vocabulary_of


def tokenizer_of(*texts: str) -> PreTrainedTokenizerFast:
    return train_tokenizer([text for text in texts for _ in range(5)], 300)


TOKENIZER = tokenizer_of("abc")  # writes every byte, "ab" (or "bc") and "abc"
TABLE = token_bytes(TOKENIZER, len(TOKENIZER))


def ones(rows: int, candidates: int) -> np.ndarray:
    return np.full((rows, candidates), 1 / candidates, np.float32)


def row_of(targets: object, row: int) -> dict[int, float]:
    ids, probs = targets.ids[row].tolist(), targets.probs[row].tolist()  # type: ignore[attr-defined]
    return {i: p for i, p in zip(ids, probs, strict=True) if i >= 0}


def test_a_teacher_with_the_students_own_tokens_is_taught_as_it_is() -> None:
    cuts = [[b"a", b"b"], [b"ab"]]
    student, dense = build(cuts, TABLE, top_k=4)
    found = span_targets(student, [student], ones(5, 1), TOKENIZER, kept=4)
    for row in range(5):
        for index, prob in row_of(found, row).items():
            assert prob == pytest.approx(np.exp(dense[row, index]), abs=2e-3)
        assert len(row_of(found, row)) == 4
    assert found.weight.tolist() == [1.0] * 5


def test_mass_is_moved_and_never_made() -> None:
    mine, theirs = [[b"ab", b"c", b"a"]], [[b"a", b"bc", b"a"]]
    vocab = [*vocabulary_of(theirs), b"ab", b"\xff\xfe", b"c"]
    student, _ = build(mine, TABLE, top_k=2)
    for top_k in (1, 3, 6):
        for seed in range(5):
            teacher, dense = build(theirs, vocab, top_k=top_k, seed=seed)
            weights = np.asarray([[0.0, 0.7]] * 4, np.float32)
            found = span_targets(student, [student, teacher], weights, TOKENIZER, kept=8)
            total = found.probs.sum(-1).numpy()
            assert (total <= 1 + 3e-3).all()
            assert (found.probs >= 0).all()
            # Row 0 and rows 2, 3 are common; at row 1 only the student has read "ab".
            assert found.weight.tolist() == pytest.approx([0.7, 0.0, 0.7, 0.7])
            assert total[1] == 0
            if top_k == 6:  # no tail: of row 2, only half a character is no text
                other = np.exp(dense[2, vocab.index(b"\xff\xfe")])
                assert 1 - total[2] == pytest.approx(other, abs=5e-3)


def test_the_texts_own_chunk_counts_for_the_texts_own_token_whatever_the_cut() -> None:
    # The student reads "abc" at once, the teacher as "a", "bc": p(abc) = p(a) p(bc | a).
    mine, theirs = [[b"abc"]], [[b"a", b"bc"]]
    student, _ = build(mine, TABLE, top_k=1)
    teacher, dense = build(theirs, [b"", b"a", b"bc"], top_k=3)
    weights = np.asarray([[0, 1]] * 2, np.float32)
    found = row_of(span_targets(student, [student, teacher], weights, TOKENIZER, kept=4), 0)
    chain = float(np.exp(dense[0, 1] + dense[1, 2]))
    assert found[TABLE.index(b"abc")] == pytest.approx(chain, abs=2e-3)
    rest = float(np.exp(dense[0, 1])) - chain
    assert found[TABLE.index(b"a")] == pytest.approx(rest, abs=2e-3)


def test_a_longer_teacher_token_names_what_the_student_writes_first() -> None:
    # The teacher's "abz" is no student token; if it comes, the student writes "ab" first.
    pieces = first_pieces(TOKENIZER, build([[b"a"]], [b"", b"a", b"abz", b"\xc3"], top_k=1)[0])
    assert pieces[1] == encode_text(TOKENIZER, "a")[0]
    assert pieces[2] == encode_text(TOKENIZER, "ab")[0]
    assert pieces[0] == pieces[3] == -1  # eos, and part of a character


def test_the_likeliest_ids_are_kept_and_equal_ids_are_summed() -> None:
    cuts = [[b"a", b"b", b"c", b"ab"]]
    made = [build(cuts, TABLE, top_k=len(TABLE), seed=seed) for seed in range(2)]
    student = made[0][0]
    weights = np.asarray([[0.25, 0.75]] * 5, np.float32)
    found = span_targets(student, [c for c, _ in made], weights, TOKENIZER, kept=2)
    mixed = 0.25 * np.exp(made[0][1]) + 0.75 * np.exp(made[1][1])
    for row in range(5):
        best = np.sort(mixed[row])[::-1][:2]
        assert list(row_of(found, row).values()) == pytest.approx(best, abs=3e-3)


def test_chunks_of_several_student_tokens_end_where_the_last_one_is() -> None:
    mine, theirs = [[b"a", b"b", b"c"], [b"c"]], [[b"ab", b"c"], [b"c"]]
    student, _ = build(mine, vocabulary_of(mine), top_k=1)
    teacher, dense = build(theirs, vocabulary_of(theirs), top_k=1)
    weights = np.arange(6, dtype=np.float32)[:, None] / 10
    found = chunk_targets(student, [teacher], weights)
    assert found.length[:, 0].tolist() == [0, 2, 0, 0, 0, 0]
    ab = vocabulary_of(theirs).index(b"ab")
    assert float(found.logprob[1, 0]) == pytest.approx(dense[0, ab], abs=5e-3)
    assert float(found.weight[1, 0]) == 0.0  # the weight where the chunk starts: row 0's


def test_infifusion_pairs_by_index_and_cuts_the_longer_side() -> None:
    mine = [[b"a", b"b", b"c"], [b"a"]]
    theirs = [[b"abc"], [b"a"]]
    vocab = [b"", b"a", b"abc", *(bytes([65 + i]) for i in range(12))]
    student, _ = build(mine, vocabulary_of(mine), top_k=2)
    teacher, dense = build(theirs, vocab, top_k=12)
    found = rank_targets(student, [teacher])
    assert found.mask[:, 0].tolist() == [True, True, False, False, True, True]
    for mine_row, their_row in ((0, 0), (1, 1), (4, 2), (5, 3)):
        top = np.sort(dense[their_row])[::-1][:10].copy()
        wanted = standardize(torch.from_numpy(top)).softmax(-1)
        assert found.probs[mine_row, 0].tolist() == pytest.approx(wanted.tolist(), abs=3e-3)
