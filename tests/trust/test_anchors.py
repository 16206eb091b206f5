"""A chain that only grows gives no alarm; one that goes back, or has another record, gives one."""

from hypothesis import given, settings
from hypothesis import strategies as st

from trust.anchors import NOTE_MS, Anchor, is_head, witness
from trust.chain import Head

NOW = 1_700_000_000_000


def head(seq: int, letter: str = "a") -> Head:
    return Head(seq, letter * 64)


@given(seqs=st.lists(st.integers(1, 2**53 - 1), min_size=1))
@settings(deadline=None)
def test_a_chain_that_grows_gives_no_alarm(seqs: list[int]) -> None:
    anchor = None
    for number, seq in enumerate(sorted(seqs)):
        anchor, _ = witness(anchor, head(seq), NOW + number)
        assert (anchor.seq, anchor.alarm) == (seq, "")


@given(high=st.integers(2, 10**9), low=st.integers(1, 10**9))
@settings(deadline=None)
def test_a_chain_that_goes_back_gives_an_alarm_that_stays(high: int, low: int) -> None:
    low = min(low, high - 1)
    first, _ = witness(None, head(high), NOW)
    back, noted = witness(first, head(low), NOW + 1)
    assert noted
    assert f"went back from record {high} " in back.alarm
    on, _ = witness(back, head(low + 1), NOW + 2)
    assert (on.seq, on.alarm) == (low + 1, back.alarm)


def test_another_record_under_the_same_number_gives_an_alarm() -> None:
    first, _ = witness(None, head(5), NOW)
    other, noted = witness(first, head(5, "b"), NOW)
    assert (noted, "went back" in other.alarm) == (True, True)
    assert witness(first, head(5), NOW) == (first, False)


def test_it_becomes_a_record_at_first_sight_and_then_once_an_hour() -> None:
    anchor, noted = witness(None, head(1), NOW)
    assert noted
    anchor, noted = witness(anchor, head(2), NOW + NOTE_MS - 1)
    assert not noted
    anchor, noted = witness(anchor, head(3), NOW + NOTE_MS)
    assert noted
    assert anchor == Anchor(3, "a" * 64, NOW + NOTE_MS)


def test_what_is_no_head_is_not_taken_for_one() -> None:
    assert is_head(1, "0" * 64)
    for seq, text in ((0, "0" * 64), (2**53, "0" * 64), (1, ""), (1, "0" * 63), (1, "A" * 64)):
        assert not is_head(seq, text)
