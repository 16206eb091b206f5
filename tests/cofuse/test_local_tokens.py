"""Where two tokenizers cut one text: laws of the shares, and of the bytes a contribution takes."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from cofuse.local_tokens import Starts, row_bytes, shared_places

CUTS = st.lists(
    st.tuples(st.integers(1, 30), st.sets(st.integers(1, 29)), st.sets(st.integers(1, 29))),
    min_size=1,
    max_size=4,
)


def starts(cuts: list[tuple[int, set[int], set[int]]], side: int) -> Starts:
    """Documents of some bytes, each cut at the places that lie inside it, and its eos."""
    return [
        np.asarray([0, *sorted(x for x in doc[side] if x < doc[0]), doc[0]], np.int64)
        for doc in cuts
    ]


@given(CUTS)
def test_the_shares_are_those_of_sets_of_places_and_pieces(
    cuts: list[tuple[int, set[int], set[int]]],
) -> None:
    ours, theirs = starts(cuts, 1), starts(cuts, 2)
    common = one = total = 0
    for a, b in zip(ours, theirs, strict=True):
        pieces = [set(zip(x, [*x[1:], -1], strict=True)) for x in (a.tolist(), b.tolist())]
        common += len(set(a.tolist()) & set(b.tolist()))
        one += len(pieces[0] & pieces[1])
        total += len(a)
    assert shared_places(ours, theirs) == (common / total, one / total)


@given(CUTS)
def test_a_tokenizer_agrees_with_itself(cuts: list[tuple[int, set[int], set[int]]]) -> None:
    assert shared_places(starts(cuts, 1), starts(cuts, 1)) == (1.0, 1.0)


def test_a_position_takes_what_the_codec_packs() -> None:
    assert row_bytes(16, 151_936) == 55
    assert row_bytes(3, 256) == 3 + 3 + 3
    assert row_bytes(3, 257) == 4 + 3 + 3
