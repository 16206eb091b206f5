from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fusion.byte_tables import byte_table, encode_text
from fusion.edit_distance import NearestStrings
from fusion.vocab_maps import (
    PROJECTION_DECAY,
    MinedMap,
    first_pieces,
    ids_by_bytes,
    map_ids,
    projection,
    vocabulary,
)
from tests.fusion.factories import build
from tests.fusion.families import byte_level, llama
from tests.fusion.test_edit_distance import distance

PIECES = st.lists(st.binary(min_size=1, max_size=4), min_size=1, max_size=12, unique=True)


def test_ids_map_by_bytes_and_eos_maps_to_eos_whatever_its_number() -> None:
    student, _ = build([[b"a"]], [b"", b"a", b"b", b"cd"], top_k=1)
    teacher, _ = build([[b"a"]], [b"cd", b"x", b"a", b"", b"c", b"bb"], top_k=1, eos=3)
    assert map_ids(student, teacher).tolist() == [3, -1, 1, 0, -1, -1]
    assert map_ids(student, teacher, [9, -1, 9, 9, -1, 2]).tolist() == [3, -1, 1, 0, -1, 2]


def test_padding_ids_without_bytes_map_to_nothing() -> None:
    student, _ = build([[b"a"]], [b"", b"a", b"", b""], top_k=1)
    teacher, _ = build([[b"a"]], [b"", b"a", b"", b"", b""], top_k=1)
    assert map_ids(student, teacher).tolist() == [0, 1, -1, -1, -1]


def test_a_vocabulary_is_read_back_id_by_id() -> None:
    pieces = [b"", b"a", b"", b"\xc3", b"bcd"]
    assert vocabulary(build([[b"a"]], pieces, top_k=1)[0]) == pieces


@pytest.mark.parametrize("make", [byte_level, llama])
def test_of_two_ids_with_equal_bytes_the_one_that_the_student_writes_is_taken(make) -> None:
    tokenizer = make()
    pieces = byte_table(tokenizer, len(tokenizer)).pieces
    eos = tokenizer.eos_token_id
    student, _ = build([[]], pieces, top_k=1, eos=eos)
    teacher, _ = build([[b"e"]], [b"", b"e", b" ", b"zzz", b"\xc3"], top_k=1)
    firsts = first_pieces(tokenizer, teacher)
    mapped = map_ids(student, teacher, firsts)
    assert mapped[0] == eos
    for index, text in ((1, "e"), (2, " "), (3, "z")):
        assert mapped[index] == encode_text(tokenizer, text, prefixed=False)[0]
    assert pieces[mapped[4]] == b"\xc3"  # no text of its own, but the student has the byte
    assert firsts[4] == -1


def test_a_first_piece_is_what_is_read_in_the_middle_of_a_text() -> None:
    tokenizer = llama()
    teacher, _ = build([[b"Code"]], [b"", b"Code", b" Code"], top_k=1)
    pieces = byte_table(tokenizer, len(tokenizer)).pieces
    inside, spaced = (pieces[i] for i in first_pieces(tokenizer, teacher)[1:])
    assert b"Code".startswith(inside)
    assert spaced.startswith(b" ")


@given(PIECES, PIECES)
def test_minimal_edit_distance_is_minimal_and_equal_bytes_are_themselves(
    student: list[bytes], teacher: list[bytes]
) -> None:
    everything = np.arange(len(teacher) + 2)
    mapped = MinedMap([b"", *student], [b"", *teacher, b""], eos=(0, 0)).of(everything)
    assert mapped[0] == 0
    assert mapped[-1] == -1
    for index, piece in enumerate(teacher, 1):
        found = ([b"", *student])[mapped[index]]
        assert distance(found, piece) == min(distance(s, piece) for s in student)


def test_an_id_is_searched_for_once_and_only_when_it_is_asked_for() -> None:
    mined = MinedMap([b"", b"cat", b"dogs"], [b"bat", b"", b"dog", b"cat", b""], eos=(0, 1))
    with patch.object(NearestStrings, "nearest", autospec=True) as nearest:
        nearest.return_value = 1
        assert mined.of(np.array([[3, 1], [4, -1]])).tolist() == [[1, 0], [-1, -1]]
        assert not nearest.called
        assert mined.of(np.array([2, 2])).tolist() == mined.of(np.array([2, 2])).tolist() == [2, 2]
        nearest.assert_called_once()
    assert mined.of(np.arange(5)).tolist() == [1, 0, 2, 1, -1]


@given(PIECES, PIECES, st.booleans())
def test_rows_of_the_projection_share_out_one_whole_and_spell_their_token(
    student: list[bytes], teacher: list[bytes], all_bytes: bool
) -> None:
    if all_bytes:
        teacher = list(dict.fromkeys([*teacher, *(bytes([b]) for b in range(256))]))
    mine, theirs = [b"", *student, b""], [b"", *teacher]
    ids, weights = projection(mine, theirs, eos=(0, 0))
    assert ids.shape == weights.shape == (len(mine), 4)
    assert ids[0].tolist() == [0, -1, -1, -1]
    assert ((weights > 0) == (ids >= 0)).all()
    for piece, row, shares in zip(mine[1:], ids[1:], weights[1:], strict=True):
        kept = [theirs[i] for i in row if i >= 0]
        assert shares.sum() == pytest.approx(float(bool(kept)))
        assert not kept or piece == b"".join(kept)  # no piece here is longer than four bytes
        assert kept or not piece or not all_bytes
        if piece and piece in teacher:
            assert kept == [piece]
        assert shares[1 : len(kept)] == pytest.approx(shares[: len(kept)][:-1] * PROJECTION_DECAY)


def test_the_projection_takes_the_teachers_own_cut_and_keeps_four_pieces() -> None:
    pieces = [b"", b"a", b"b", b"ab", b"c"]
    ids, weights = projection([b"", b"abc"], pieces, eos=(0, 0))
    assert ids[1].tolist() == [3, 4, -1, -1]
    ids, weights = projection([b"", b"abc"], pieces, eos=(0, 0), encode=lambda _: [1, 2, 4, 1, 1])
    assert ids[1].tolist() == [1, 2, 4, 1]
    assert weights[1] == pytest.approx(np.asarray([8, 4, 2, 1]) / 15)


def test_the_later_of_two_equal_pieces_is_the_piece_and_not_the_byte() -> None:
    assert ids_by_bytes([b"", b"A", b"B", b"A"]) == {b"A": 3, b"B": 2}
