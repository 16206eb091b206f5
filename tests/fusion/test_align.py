from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fusion.align import align, loglik, row_starts
from fusion.contribution import LogitContribution
from fusion.extract import extract_logits
from fusion.models import ModelSpec, build_model, train_tokenizer
from fusion.vocab_maps import vocabulary
from tests.fusion.factories import build, cut_at, vocabulary_of

PLACES = st.sets(st.integers(0, 12))


@st.composite
def two_cuts(draw: st.DrawFn) -> tuple[LogitContribution, LogitContribution]:
    # Text, not letters: a cut may fall inside a character.
    docs = [text.encode() for text in draw(st.lists(st.text(max_size=5), min_size=1, max_size=4))]
    mine = [cut_at(doc, draw(PLACES)) for doc in docs]
    theirs = [cut_at(doc, draw(PLACES)) for doc in docs]
    return (
        build(mine, vocabulary_of(mine), top_k=1)[0],
        build(theirs, vocabulary_of(theirs), top_k=1)[0],
    )


def read_before(c: LogitContribution) -> list[tuple[int, bytes]]:
    """Of every row: its document, and the bytes that the model has read when it predicts."""
    table, out = vocabulary(c), []
    for doc, (start, end) in enumerate(pairwise(c.doc_offsets.tolist())):
        tokens = [table[i] for i in c.token_ids[start:end]]
        for k in range(end - start):
            # The eos row has read the whole document and is told from an empty one's by `done`.
            out.append((doc, b"".join(tokens[:k])))
    return out


def with_prefix(c: LogitContribution) -> LogitContribution:
    """The same, of a tokenizer that reads the first byte of each text before the text."""
    return replace(c, byte_ends=np.maximum(c.byte_ends - 1, 0))


@given(two_cuts())
def test_rows_are_paired_exactly_when_they_have_read_the_same_bytes(
    pair: tuple[LogitContribution, LogitContribution],
) -> None:
    student, teacher = pair
    mine, theirs = read_before(student), read_before(teacher)
    wanted = [(s, t) for t, b in enumerate(theirs) for s, a in enumerate(mine) if a == b]
    found = align(student, teacher)
    assert list(zip(found.student_rows, found.teacher_rows, strict=True)) == wanted


@given(two_cuts())
def test_a_chunk_is_the_same_bytes_on_both_sides_and_chunks_cover_everything(
    pair: tuple[LogitContribution, LogitContribution],
) -> None:
    student, teacher = pair
    mine, theirs = vocabulary(student), vocabulary(teacher)
    found = align(student, teacher)
    for s, s_end, t, t_end in zip(
        found.student_rows,
        found.student_ends,
        found.teacher_rows,
        found.teacher_ends,
        strict=True,
    ):
        left = b"".join(mine[i] for i in student.token_ids[s:s_end])
        right = b"".join(theirs[i] for i in teacher.token_ids[t:t_end])
        assert left == right
        # eos with eos, and with nothing else
        assert (student.token_ids[s:s_end] == 0).sum() == (teacher.token_ids[t:t_end] == 0).sum()
        assert left or (s_end - s == t_end - t == 1)
    assert (found.student_ends - found.student_rows).sum() == student.header.positions
    assert (found.teacher_ends - found.teacher_rows).sum() == teacher.header.positions


def test_rows_are_aligned_by_what_they_predict_from_not_by_the_token_they_predict() -> None:
    # The same token "c" is read at row 1 by one and at row 2 by the other: both have read "ab".
    mine, theirs = [[b"ab", b"c"]], [[b"a", b"b", b"c"]]
    found = align(
        build(mine, vocabulary_of(mine), top_k=1)[0],
        build(theirs, vocabulary_of(theirs), top_k=1)[0],
    )
    assert found.student_rows.tolist() == [0, 1, 2]
    assert found.teacher_rows.tolist() == [0, 2, 3]
    assert found.teacher_ends.tolist() == [2, 3, 4]


def test_contributions_on_other_documents_are_refused() -> None:
    one, other = [[b"ab"]], [[b"a", b"bc"]]
    with pytest.raises(ValueError, match="one prompt set"):
        align(
            build(one, vocabulary_of(one), top_k=1)[0],
            build(other, vocabulary_of(other), top_k=1)[0],
        )


def test_equally_long_prompt_sets_with_other_documents_are_refused() -> None:
    one, other = [[b"ab"], [b"c"]], [[b"a"], [b"bc"]]
    with pytest.raises(ValueError, match="one prompt set"):
        align(
            build(one, vocabulary_of(one), top_k=1)[0],
            build(other, vocabulary_of(other), top_k=1)[0],
        )


def test_row_starts_grow_by_the_bytes_and_by_one_per_document() -> None:
    cuts = [[b"ab", b"c"], [], [b"d"]]
    contribution, _ = build(cuts, vocabulary_of(cuts), top_k=1)
    assert row_starts(contribution).tolist() == [0, 2, 3, 4, 5, 6]


def test_byte_alignment_compares_far_more_rows_than_positions_do() -> None:
    words = [
        *("acute", "chronic", "valve", "stenosis", "neuropathy", "of", "the"),
        *("left", "right", "unspecified", "lower", "due", "to", "code", "I63.9", "C50"),
    ]
    rng = np.random.default_rng(0)
    docs = [" ".join(rng.choice(words, 12)) + " caf\u00e9 \U0001f600." for _ in range(30)]
    tokenizers = [train_tokenizer(docs, 400), train_tokenizer(docs[:3], 330)]
    spec = {"architecture": "llama", "hidden_size": 16, "layers": 1, "heads": 2}
    student, teacher = (
        extract_logits(
            build_model(ModelSpec(vocab_size=len(t), **spec), 0),  # type: ignore[arg-type]
            t,
            docs,
            top_k=4,
            prompt_set_sha256="a" * 64,
            model_sha256="b" * 64,
        )
        for t in tokenizers
    )
    by_position = sum(
        int(np.equal(*(starts[: min(map(len, pair))] for starts in pair)).sum())
        for pair in zip(_starts_by_doc(student), _starts_by_doc(teacher), strict=True)
    )
    rows = student.header.positions
    assert len(align(student, teacher).student_rows) / rows > 0.9
    assert by_position / rows < 0.3


def _starts_by_doc(c: LogitContribution) -> list[np.ndarray]:
    return [starts - starts[0] for starts in np.split(row_starts(c), c.doc_offsets[1:-1])]


@given(two_cuts(), st.booleans())
def test_a_prefix_moves_no_place_and_the_last_row_at_a_byte_is_the_one(
    pair: tuple[LogitContribution, LogitContribution], first_alone: bool
) -> None:
    # The teacher reads each text with a space before it, alone or as part of its first token.
    student, plain = pair
    table, cuts = vocabulary(plain), []
    for start, end in pairwise(plain.doc_offsets.tolist()):
        pieces = [table[i] for i in plain.token_ids[start : end - 1]]
        if pieces:
            pieces = [b" ", *pieces] if first_alone else [b" " + pieces[0], *pieces[1:]]
        cuts.append(pieces)
    teacher = with_prefix(build(cuts, vocabulary_of(cuts), top_k=1)[0])
    wanted, found = align(student, plain), align(student, teacher)
    assert found.student_rows.tolist() == wanted.student_rows.tolist()
    assert found.student_ends.tolist() == wanted.student_ends.tolist()
    lengths = found.teacher_ends - found.teacher_rows
    assert lengths.tolist() == (wanted.teacher_ends - wanted.teacher_rows).tolist()
    for start, end in pairwise(teacher.doc_offsets.tolist()):
        first = start + int(first_alone and end - start > 1)
        assert first in found.teacher_rows
        assert end - 1 in found.teacher_rows  # eos
    # ... whichever side it is on
    swapped = align(teacher, student)
    assert swapped.student_rows.tolist() == found.teacher_rows.tolist()
    assert swapped.teacher_ends.tolist() == found.student_ends.tolist()


@given(two_cuts())
def test_a_chunks_likelihood_is_that_of_its_tokens(
    pair: tuple[LogitContribution, LogitContribution],
) -> None:
    student, teacher = pair
    found = align(student, teacher)
    wanted = [
        teacher.own_logprob[start:end].sum()
        for start, end in zip(found.teacher_rows, found.teacher_ends, strict=True)
    ]
    of_chunks = loglik(teacher, found.teacher_rows, found.teacher_ends)
    assert of_chunks == pytest.approx(np.asarray(wanted), abs=1e-4)


def test_one_document_at_a_time_gives_the_same_places() -> None:
    cuts = [[b"ab", b"c"], [], [b"d", b"ef"]], [[b"a", b"bc"], [], [b"def"]]
    student, teacher = (build(c, vocabulary_of(c), top_k=1)[0] for c in cuts)
    whole = align(student, teacher)
    parts = [align(student.documents(d, d + 1), teacher.documents(d, d + 1)) for d in range(3)]
    rows = [part.student_rows + student.doc_offsets[d] for d, part in enumerate(parts)]
    assert np.concatenate(rows).tolist() == whole.student_rows.tolist()


def test_a_token_that_ends_inside_a_character_is_a_place() -> None:
    cafe = "caf\u00e9".encode()
    cuts = [[cafe[:4], cafe[4:]]], [[cafe[:2], cafe[2:4], cafe[4:]]]
    student, teacher = (build(c, vocabulary_of(c), top_k=1)[0] for c in cuts)
    assert align(student, teacher).teacher_rows.tolist() == [0, 2, 3]
