from dataclasses import replace

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from fusion.byte_tables import byte_table
from fusion.contribution import LogitContribution
from fusion.models import train_tokenizer
from fusion.targets import Arrays, certain_mass, chunk_targets, span_targets
from fusion.vocab_maps import first_pieces, map_ids
from tests.fusion.factories import build, vocabulary_of


def tokenizer_of(*texts: str) -> PreTrainedTokenizerFast:
    return train_tokenizer([text for text in texts for _ in range(5)], 300)


TOKENIZER = tokenizer_of("abc")  # writes every byte, "ab" (or "bc") and "abc"
TABLE = byte_table(TOKENIZER, len(TOKENIZER)).pieces


def ones(rows: int, candidates: int) -> np.ndarray:
    return np.full((rows, candidates), 1 / candidates, np.float32)


def mixed(candidates: list[LogitContribution], weights: np.ndarray, kept: int) -> Arrays:
    student, *experts = candidates
    maps = [map_ids(student, e, first_pieces(TOKENIZER, e)) for e in experts]
    identity = np.arange(student.header.vocab_size)
    return span_targets(student, candidates, weights, [identity, *maps], kept=kept)


def row_of(targets: Arrays, row: int) -> dict[int, float]:
    ids, probs = targets["ids"][row].tolist(), targets["probs"][row].tolist()
    return {i: p for i, p in zip(ids, probs, strict=True) if i >= 0}


def test_a_teacher_with_the_students_own_tokens_is_taught_as_it_is() -> None:
    cuts = [[b"a", b"b"], [b"ab"]]
    student, dense = build(cuts, TABLE, top_k=4)
    found = mixed([student], ones(5, 1), 4)
    for row in range(5):
        for index, prob in row_of(found, row).items():
            assert prob == pytest.approx(np.exp(dense[row, index]), abs=2e-3)
        assert len(row_of(found, row)) == 4
    assert found["weight"].tolist() == [1.0] * 5


def test_mass_is_moved_and_never_made() -> None:
    mine, theirs = [[b"ab", b"c", b"a"]], [[b"a", b"bc", b"a"]]
    vocab = [*vocabulary_of(theirs), b"ab", b"\xff\xfe", b"c"]
    student, _ = build(mine, TABLE, top_k=2)
    for top_k in (1, 3, 6):
        for seed in range(5):
            teacher, dense = build(theirs, vocab, top_k=top_k, seed=seed)
            weights = np.asarray([[0.0, 0.7]] * 4, np.float32)
            found = mixed([student, teacher], weights, 8)
            total = found["probs"].sum(-1)
            assert (total <= 1 + 3e-3).all()
            assert (found["probs"] >= 0).all()
            # Row 0 and rows 2, 3 are common; at row 1 only the student has read "ab".
            assert found["weight"].tolist() == pytest.approx([0.7, 0.0, 0.7, 0.7])
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
    found = row_of(mixed([student, teacher], weights, 4), 0)
    chain = float(np.exp(dense[0, 1] + dense[1, 2]))
    assert found[TABLE.index(b"abc")] == pytest.approx(chain, abs=2e-3)
    rest = float(np.exp(dense[0, 1])) - chain
    assert found[TABLE.index(b"a")] == pytest.approx(rest, abs=2e-3)


def test_the_likeliest_ids_are_kept_and_equal_ids_are_summed() -> None:
    cuts = [[b"a", b"b", b"c", b"ab"]]
    made = [build(cuts, TABLE, top_k=len(TABLE), seed=seed) for seed in range(2)]
    weights = np.asarray([[0.25, 0.75]] * 5, np.float32)
    found = mixed([c for c, _ in made], weights, 2)
    wanted = 0.25 * np.exp(made[0][1]) + 0.75 * np.exp(made[1][1])
    for row in range(5):
        best = np.sort(wanted[row])[::-1][:2]
        assert list(row_of(found, row).values()) == pytest.approx(best, abs=3e-3)


def test_chunks_of_several_student_tokens_end_where_the_last_one_is() -> None:
    mine, theirs = [[b"a", b"b", b"c"], [b"c"]], [[b"ab", b"c"], [b"c"]]
    student, _ = build(mine, vocabulary_of(mine), top_k=1)
    teacher, dense = build(theirs, vocabulary_of(theirs), top_k=1)
    weights = np.arange(6, dtype=np.float32)[:, None] / 10
    found = chunk_targets(student, [teacher], weights)
    assert found["chunk_length"][:, 0].tolist() == [0, 2, 0, 0, 0, 0]
    ab = vocabulary_of(theirs).index(b"ab")
    assert float(found["chunk_logprob"][1, 0]) == pytest.approx(dense[0, ab], abs=5e-3)
    assert float(found["chunk_weight"][1, 0]) == 0.0  # the weight where the chunk starts: row 0's


def test_what_an_expert_did_not_ship_is_left_to_the_base() -> None:
    cuts = [[b"a", b"b", b"c"]]
    made = [build(cuts, TABLE, top_k=3, seed=seed)[0] for seed in range(2)]
    made[1].topk_ids[1] = -1
    weights = np.asarray([[0.25, 0.75]] * 4, np.float32)
    found = mixed(made, weights, 8)
    alone = mixed(made[:1], ones(4, 1), 8)
    assert found["weight"].tolist() == [1.0] * 4
    assert row_of(found, 1) == pytest.approx(row_of(alone, 1))
    assert row_of(found, 0) != pytest.approx(row_of(alone, 0))


def test_drawn_targets_keep_their_mass_at_one() -> None:
    student, _ = build([[b"ab", b"c"]], TABLE, top_k=2)
    teacher, _ = build([[b"a", b"b", b"c"]], TABLE, top_k=4)
    drawn = replace(
        teacher,
        header=replace(teacher.header, sampler="samples"),
        topk_logprobs=np.full_like(teacher.topk_logprobs, np.log(0.25)),
    )
    found = mixed([student, drawn], np.asarray([[0.0, 1.0]] * 3, np.float32), 8)
    assert found["probs"].sum(-1) == pytest.approx(np.ones(3))


def test_who_is_certain_of_the_texts_own_token_teaches_the_text_and_nothing_else() -> None:
    student, _ = build([[b"a", b"b", b"c"]], TABLE, top_k=3)
    sure, _ = build([[b"a", b"bc"]], [b"", b"a", b"bc"], top_k=3)
    sure.own_logprob[:] = np.log([0.95, 0.5, 0.99])
    weights = np.asarray([[0.5]] * 4, np.float32)
    # Row 1 starts a chunk it is not sure of, row 2 is no common place.
    assert certain_mass(student, [sure], weights).tolist() == [0.5, 0.0, 0.0, 0.5]
    sure.topk_ids[0] = -1  # what was not shipped teaches nothing
    assert certain_mass(student, [sure, sure], np.hstack([weights, weights])).tolist() == [
        0.0, 0.0, 0.0, 1.0,
    ]  # fmt: skip
