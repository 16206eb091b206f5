"""What a vocabulary may tell: the pieces that stand in the public text, each of them, no other."""

import time
from itertools import pairwise

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from fusion.public_pieces import public_only

WORDS = st.lists(st.text("ab \u00e9", max_size=6), max_size=5)


def pieces_of(pieces: list[bytes], texts: list[str | bytes]) -> list[bytes]:
    raw = np.frombuffer(b"".join(pieces), np.uint8)
    offsets = np.concatenate([[0], np.cumsum([len(p) for p in pieces])]).astype(np.int64)
    kept, bounds = public_only(raw, offsets, texts)
    assert len(bounds) == len(pieces) + 1
    return [kept[a:b].tobytes() for a, b in pairwise(bounds.tolist())]


@settings(deadline=None)
@given(texts=WORDS, pieces=st.lists(st.binary(max_size=4) | st.text("ab \u00e9").map(str.encode)))
def test_a_piece_stays_exactly_if_a_text_holds_it(texts: list[str], pieces: list[bytes]) -> None:
    def public(piece: bytes) -> bool:
        return len(piece) <= 1 or any(piece in b" " + text.encode() for text in texts)

    wanted = [piece if public(piece) else b"" for piece in pieces]
    assert [piece for piece in pieces_of(pieces, [*texts]) if b"\xff" not in piece] == [
        piece for piece in wanted if b"\xff" not in piece
    ]


def test_nothing_is_made_of_the_end_of_one_text_and_the_beginning_of_the_next() -> None:
    assert pieces_of([b"ab", b"b a", b"a"], ["a", "b", b"a"]) == [b"", b"", b"a"]


def test_a_large_vocabulary_on_much_text_takes_seconds() -> None:
    rng = np.random.default_rng(0)
    text = rng.integers(97, 123, 500_000, np.uint8).tobytes()
    pieces = [text[at : at + 2 + at % 20] for at in rng.integers(0, 499_000, 20_000).tolist()]
    began = time.process_time()
    assert pieces_of(pieces, [text]) == pieces
    assert time.process_time() - began < 10
