"""Laws of the round table."""

from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator.rounds import (
    FINAL,
    TRANSITIONS,
    Event,
    IllegalTransitionError,
    State,
    advance,
    as_markdown,
    outcome,
)


@given(st.lists(st.sampled_from(Event), max_size=40))
def test_a_final_state_is_never_left_whatever_happens(events: list[Event]) -> None:
    state, final = State.SUBMITTED, None
    for event in events:
        with suppress(IllegalTransitionError):
            state = advance(state, event)
        if state in FINAL:
            final = final or state
    assert final in (None, state)


@pytest.mark.parametrize("state", sorted(set(State) - FINAL))
def test_every_open_round_can_be_cancelled_and_can_end_badly(state: State) -> None:
    assert advance(state, Event.CANCEL) is State.CANCELLED
    ends = {Event.FAIL, Event.DEADLINE_PASSED}
    assert {event for known, event in TRANSITIONS if known is state} & ends


def test_every_state_is_reached_from_the_first() -> None:
    reached = {State.SUBMITTED}
    for _ in State:
        reached |= {after for (before, _), after in TRANSITIONS.items() if before in reached}
    assert reached == set(State)


def test_an_illegal_event_names_the_legal_ones() -> None:
    with pytest.raises(IllegalTransitionError, match=r"PUBLISHED.*final"):
        advance(State.PUBLISHED, Event.CANCEL)
    with pytest.raises(IllegalTransitionError, match="approve, reject"):
        advance(State.SUBMITTED, Event.FUSED)


@given(st.integers(1, 9), st.integers(0, 9), st.integers(0, 9), st.booleans())
def test_a_quorum_is_never_invented(
    needed: int, committed: int, pending: int, deadline_passed: bool
) -> None:
    event = outcome(needed, committed, pending, deadline_passed=deadline_passed)
    assert (event is Event.COLLECTED) == (committed >= needed and (pending == 0 or deadline_passed))
    assert (event is None) == (pending > 0 and not deadline_passed)


def test_the_page_is_drawn_from_the_table() -> None:
    page = Path(__file__).parents[2] / "docs" / "rounds.md"
    assert page.read_text(encoding="utf-8") == as_markdown(), "run: make docs"
