"""A stream is the same read ahead; what stalls is given up, what advances is not."""

import threading
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protos.errors import CofuseError
from protos.retry import Patience, Stopped
from protos.streams import read_ahead


@given(st.lists(st.integers()), st.integers(1, 4), st.booleans())
def test_reading_ahead_changes_neither_items_nor_how_they_end(
    items: list[int], depth: int, breaks: bool
) -> None:
    def source() -> Iterator[int]:
        yield from items
        if breaks:
            raise ConnectionError

    got = []
    try:
        for item in read_ahead(source(), depth=depth):
            got.append(item)
    except ConnectionError:
        assert breaks
    else:
        assert not breaks
    assert got == items


def test_a_source_that_goes_silent_is_given_up_and_its_thread_ends_with_it() -> None:
    end = threading.Event()

    def source() -> Iterator[int]:
        yield 1
        end.wait(30)
        yield from (2, 3, 4, 5)

    moving = read_ahead(source(), idle_s=0.05)
    assert next(moving) == 1
    with pytest.raises(CofuseError, match=r"nothing moved for 0\.05 s"):
        next(moving)
    end.set()
    for thread in threading.enumerate():
        if thread.name == "read-ahead":
            thread.join(timeout=10)
            assert not thread.is_alive()


def test_patience_lasts_while_bytes_get_through_and_ends_without() -> None:
    patience, calls = Patience(patience_s=0.05), iter(range(4))

    def advancing() -> str:
        if (done := next(calls)) < 3:
            threading.Event().wait(0.06)  # longer than patience, and yet something got through
            patience.advanced(done + 1)
            raise CofuseError("stalled", "cut")
        return "whole"

    assert patience.repeat(advancing) == "whole"

    def stuck() -> None:
        threading.Event().wait(0.06)
        patience.advanced(1)
        raise CofuseError("stalled", "cut")

    with pytest.raises(Exception, match="cut"):
        patience.repeat(stuck)


def test_who_is_told_to_stop_does_not_repeat() -> None:
    stop = threading.Event()
    stop.set()

    def away() -> None:
        raise CofuseError("stalled", "cut")

    with pytest.raises(Stopped):
        Patience(stop).repeat(away)
