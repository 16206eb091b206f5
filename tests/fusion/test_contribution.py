from itertools import pairwise

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from fusion.contribution import ROW_ARRAYS, LogitContribution, LogitSource, join, runs
from tests.fusion.factories import contributions

Made = tuple[LogitContribution, list[bytes]]


@given(made=contributions(), data=st.data())
def test_slices_of_documents_put_together_are_the_whole(made: Made, data: st.DataObject) -> None:
    whole, texts = made
    source: LogitSource = whole
    inside = data.draw(st.sets(st.integers(1, len(texts)))) - {len(texts)}
    cuts = sorted({0, len(texts)} | inside)
    again = join([source.documents(a, b) for a, b in pairwise(cuts)])
    assert again.header == whole.header
    for name in ("doc_offsets", *ROW_ARRAYS):
        left, right = getattr(whole, name), getattr(again, name)
        assert left.dtype == right.dtype
        assert np.array_equal(left, right), name


@given(made=contributions(), data=st.data())
def test_a_slice_counts_what_it_holds(made: Made, data: st.DataObject) -> None:
    whole, texts = made
    start = data.draw(st.integers(0, len(texts) - 1))
    stop = data.draw(st.integers(start + 1, len(texts)))
    part = whole.documents(start, stop)
    header = part.header
    assert (header.documents, header.positions) == (stop - start, len(part.token_ids))
    assert header.shipped == part.shipped.sum() == (part.topk_ids >= 0).any(axis=1).sum()
    assert part.doc_offsets[0] == 0
    assert part.doc_offsets[-1] == header.positions
    assert part.byte_ends[-1] == len(texts[stop - 1])


@given(st.lists(st.integers(1, 9), min_size=1), st.integers(1, 20))
def test_runs_hold_every_document_once_and_are_as_long_as_they_may_be(
    sizes: list[int], rows: int
) -> None:
    offsets = np.cumsum([0, *sizes])
    found = list(runs(offsets, rows))
    assert [i for a, b in found for i in range(a, b)] == list(range(len(sizes)))
    for start, stop in found:
        assert offsets[stop] - offsets[start] <= rows or stop == start + 1
        assert stop == len(sizes) or offsets[stop + 1] - offsets[start] > rows
