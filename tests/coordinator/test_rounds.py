"""Laws of the round table and of its steps."""

from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator.happenings import (
    Broke,
    Committed,
    Decided,
    Evaluated,
    Fused,
    Happening,
    Heard,
    Lost,
    Reported,
    Restarted,
    Tick,
    Worked,
)
from coordinator.round_state import Deliver, Fuse, Round
from coordinator.rounds import (
    ASSIGNMENT_LEASE_MS,
    FINAL,
    FUSION_LEASE_MS,
    MAX_LOSSES,
    REPORT_GRACE_MS,
    RETRY_MS,
    TRANSITIONS,
    CommitRefusedError,
    Event,
    IllegalTransitionError,
    State,
    advance,
    duties,
    step,
)
from coordinator.rounds_page import OWNERS, as_markdown

NOW = 1_700_000_000_000
HOUR_MS = 3_600_000


def a_round(state: State = State.SUBMITTED, names: str = "abc", **values: Any) -> Round:
    """A round of an hour, of which the last twenty minutes are kept for fusing."""
    plain = Round(
        round_id="rnd-1",
        state=state,
        participants=tuple(names),
        needed=len(names),
        deadline_unix_ms=NOW + HOUR_MS,
        collect_unix_ms=NOW + HOUR_MS * 2 // 3,
    )
    return replace(plain, **values)


def after(round_: Round, *happenings: Happening, now: int = NOW) -> Round:
    for happening in happenings:
        round_, _ = step(round_, happening, now)
    return round_


def collecting(names: str = "abc", **values: Any) -> Round:
    return after(a_round(names=names, **values), Decided(Event.APPROVE), Tick())


def fusing(names: str = "abc") -> Round:
    return after(collecting(names), *(word for name in names for word in answer(name)), Tick())


def answer(name: str) -> tuple[Happening, Happening]:
    return Committed(name, name * 64, 5), Reported(name, 1, "committed", "", "{}")


# --- the table -------------------------------------------------------------------------------


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
def test_every_open_round_has_an_owner_can_be_cancelled_and_ends_at_its_deadline(
    state: State,
) -> None:
    assert state in OWNERS
    assert advance(state, Event.CANCEL) is State.CANCELLED
    assert after(a_round(state), Tick(), now=NOW + HOUR_MS).state is State.EXPIRED


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


def test_the_page_is_drawn_from_the_table() -> None:
    page = Path(__file__).parents[2] / "docs" / "rounds.md"
    assert page.read_text(encoding="utf-8") == as_markdown(), "run: make docs"


# --- collecting ------------------------------------------------------------------------------


def test_exactly_the_named_participants_are_asked() -> None:
    assert duties(a_round(State.APPROVED)) == frozenset()
    assert duties(collecting()) == {Deliver("rnd-1", name, 1) for name in "abc"}


def test_a_round_with_every_answer_is_fused_at_once() -> None:
    round_ = collecting()
    for name in "abc":
        assert after(round_, Tick()).state is State.COLLECTING
        round_ = after(round_, *answer(name))
        assert name not in {duty.participant for duty in duties(round_)}
    assert after(round_, Tick()).state is State.FUSING
    assert duties(after(round_, Tick())) == {Fuse("rnd-1", 1)}


@given(
    st.integers(1, 6),
    st.lists(st.sampled_from(["assigned", "committed", "refused", "failed"]), min_size=6),
    st.sampled_from((0, HOUR_MS * 2 // 3 - 1, HOUR_MS * 2 // 3, HOUR_MS - 1)),
)
def test_a_quorum_is_never_invented_and_never_waited_for_in_vain(
    needed: int, statuses: list[str], passed_ms: int
) -> None:
    statuses = statuses[:6]
    round_ = collecting("abcdef", needed=needed)
    parts = [
        replace(part, status=status, report_json="{}", lease_unix_ms=NOW + HOUR_MS)
        for part, status in zip(round_.parts, statuses, strict=True)
    ]
    found = after(replace(round_, parts=tuple(parts)), Tick(), now=NOW + passed_ms).state
    committed, still_open = statuses.count("committed"), statuses.count("assigned")
    if committed + still_open < needed:
        assert found is State.FAILED
    elif committed >= needed and (not still_open or passed_ms >= HOUR_MS * 2 // 3):
        assert found is State.FUSING
    else:
        assert found is State.COLLECTING


def test_stragglers_are_not_waited_for_when_fusing_needs_the_time() -> None:
    round_ = after(collecting(needed=2), *answer("a"), *answer("b"))
    late = round_.collect_unix_ms
    assert after(round_, Heard("c", 1), Tick(), now=late - 1).state is State.COLLECTING
    closed = after(round_, Tick(), now=late)
    assert closed.state is State.FUSING
    assert "no answer from c" in closed.detail
    with pytest.raises(CommitRefusedError, match="FUSING"):
        after(closed, Committed("c", "c" * 64, 5), now=late)


def test_a_report_may_trail_behind_its_contribution_for_a_while() -> None:
    round_ = after(collecting("a"), Committed("a", "a" * 64, 5))
    assert after(round_, Tick(), now=NOW + REPORT_GRACE_MS - 1).state is State.COLLECTING
    assert after(round_, Tick(), now=NOW + REPORT_GRACE_MS).state is State.FUSING


def test_a_commit_repeats_safely_and_never_changes() -> None:
    round_ = after(collecting(), Committed("a", "a" * 64, 5))
    assert after(round_, Committed("a", "a" * 64, 5), now=NOW + 9) == round_
    assert after(round_, Reported("a", 1, "failed", "late trouble", "")) == round_
    with pytest.raises(CommitRefusedError, match="already holds"):
        after(round_, Committed("a", "b" * 64, 5))
    with pytest.raises(CommitRefusedError, match="does not name"):
        after(round_, Committed("z", "b" * 64, 5))


def test_a_participant_that_waits_for_a_person_is_waited_for_and_not_asked_again() -> None:
    round_ = after(collecting("a"), Reported("a", 1, "waiting", "for approval", "{}"))
    (part,) = round_.parts
    assert (part.status, part.awaited, part.attempt) == ("assigned", True, 1)
    assert duties(round_) == {Deliver("rnd-1", "a", 1)}
    half = NOW + ASSIGNMENT_LEASE_MS // 2
    heard = after(round_, Heard("a", 1), now=half)  # its beats keep it so
    assert after(heard, Tick(), now=NOW + ASSIGNMENT_LEASE_MS) == heard
    assert after(heard, Committed("a", "a" * 64, 5), now=half).parts[0].awaited  # for its report
    refused = after(heard, Reported("a", 1, "refused", "no", "{}"), now=half)
    assert refused.parts[0].status == "refused"


@pytest.mark.parametrize(
    "word", [Reported("a", 1, "waiting", "for approval", "{}"), Lost("a", 1, "its node is gone")]
)
def test_whose_attempt_ended_before_the_contribution_came_is_asked_for_the_report(
    word: Reported | Lost,
) -> None:
    round_ = after(collecting("a"), word, Committed("a", "a" * 64, 5), Tick())
    assert duties(round_) == {Deliver("rnd-1", "a", 2)}
    assert after(round_, Reported("a", 1, "waiting", "", "{}")) == round_  # late, and no last word
    told = after(round_, Reported("a", 2, "committed", "", "{}"), Tick())
    assert told.state is State.FUSING
    (part,) = after(collecting("a"), Committed("a", "a" * 64, 5), Tick()).parts
    assert part.attempt == 1  # whose attempt is open reports to it


# --- leases ----------------------------------------------------------------------------------


def test_a_silent_participant_is_asked_again_under_a_new_attempt() -> None:
    ends = NOW + ASSIGNMENT_LEASE_MS
    round_ = collecting()
    assert after(round_, Tick(), now=ends - 1) == round_
    again = after(round_, Tick(), now=ends)
    assert [part.attempt for part in again.parts] == [2, 2, 2]
    assert duties(again) == {Deliver("rnd-1", name, 2) for name in "abc"}


def test_who_is_heard_is_not_asked_again() -> None:
    half = NOW + ASSIGNMENT_LEASE_MS // 2
    heard = after(collecting("a"), Heard("a", 1), now=half)
    assert after(heard, Tick(), now=NOW + ASSIGNMENT_LEASE_MS) == heard
    assert after(heard, Heard("a", 1), now=half + 9) == heard  # not every word is written down


def test_a_lost_assignment_goes_out_again_after_a_pause() -> None:
    round_ = after(collecting("ab"), Lost("a", 1, "the node restarted"))
    assert after(round_, Tick()) == round_
    again = after(round_, Tick(), now=NOW + RETRY_MS)
    assert duties(again) == {Deliver("rnd-1", "a", 2), Deliver("rnd-1", "b", 1)}


def test_an_older_attempt_cannot_end_the_newer_one() -> None:
    again = after(collecting("a"), Restarted())
    assert duties(again) == {Deliver("rnd-1", "a", 2)}
    stale = Reported("a", 1, "failed", "my process died", "{}")
    assert after(again, stale, Lost("a", 1, ""), Heard("a", 1)) == again
    assert after(again, Committed("a", "a" * 64, 5)).parts[0].status == "committed"


def test_a_round_that_stopped_before_it_asked_asks_after_a_restart() -> None:
    """Release 0.1 wrote the state and the assignments in two transactions."""
    restarted = after(a_round(State.COLLECTING), Restarted())
    assert duties(restarted) == {Deliver("rnd-1", name, 1) for name in "abc"}


def test_a_worker_that_hangs_or_is_killed_is_followed_by_another() -> None:
    round_ = after(fusing(), Worked(1))
    assert after(round_, Tick(), now=NOW + FUSION_LEASE_MS - 1) == round_
    hung = after(round_, Tick(), now=NOW + FUSION_LEASE_MS)
    killed = after(round_, Broke(1, "killed by signal 9", lost=True))
    assert duties(hung) == {Fuse("rnd-1", 2)}
    assert after(killed, Tick()) == killed
    assert duties(after(killed, Tick(), now=NOW + RETRY_MS)) == {Fuse("rnd-1", 2)}


def test_a_worker_that_fails_ends_the_round_and_so_do_many_lost_ones() -> None:
    round_ = fusing()
    failed = after(round_, Broke(1, "the logits are broken", lost=False))
    assert (failed.state, failed.detail) == (State.FAILED, "the logits are broken")
    now = NOW
    for number in range(1, MAX_LOSSES + 1):
        assert round_.state is State.FUSING
        lost = Broke(number, "killed by signal 9", lost=True)
        round_ = after(round_, Worked(number), lost, now=now)
        now += 60_000
        round_ = after(round_, Tick(), now=now)
    assert round_.state is State.FAILED
    assert "signal 9" in round_.detail


def test_only_the_worker_that_has_the_round_publishes_it() -> None:
    round_ = after(fusing(), Worked(1), Fused(1), Restarted())
    assert (round_.state, round_.attempt) == (State.EVALUATING, 2)
    assert after(round_, Fused(2)) == round_
    with pytest.raises(IllegalTransitionError, match="worker 1, wanted that of 2"):
        after(round_, Evaluated(1))
    assert after(round_, Fused(1), Broke(1, "", lost=False)) == round_
    assert after(round_, Evaluated(2)).state is State.PUBLISHED
    with pytest.raises(IllegalTransitionError):
        after(round_, Decided(Event.CANCEL), Evaluated(2))


@pytest.mark.parametrize("days", [-1, 1])
def test_a_clock_that_jumps_by_a_day_holds_nobody_up(days: int) -> None:
    """A lease that seems to last for days is over; only the deadline moves with the clock."""
    jumped = NOW + days * 24 * HOUR_MS
    asked = after(collecting(deadline_unix_ms=NOW + 100 * HOUR_MS), Tick(), now=jumped)
    assert all(jumped < part.lease_unix_ms <= jumped + ASSIGNMENT_LEASE_MS for part in asked.parts)
    assert {part.attempt for part in asked.parts} == {2}


def test_who_is_heard_after_the_clock_went_back_is_not_asked_again() -> None:
    back = NOW - 24 * HOUR_MS
    assert after(collecting(), Heard("a", 1), Tick(), now=back).parts[0].attempt == 1
    assert after(fusing(), Worked(1), now=back).lease_unix_ms == back + FUSION_LEASE_MS
    working = after(after(fusing(), Worked(1)), Worked(1), Tick(), now=back)
    assert working.attempt == 1


def test_nothing_goes_on_for_a_round_that_has_ended() -> None:
    for open_ in (a_round(), a_round(State.APPROVED), collecting(), fusing()):
        ended, left = step(open_, Decided(Event.CANCEL, "by ada"), NOW)
        assert (ended.state, ended.detail, left) == (State.CANCELLED, "by ada", frozenset())
        assert after(ended, Tick(), Restarted(), now=NOW + HOUR_MS) == ended
