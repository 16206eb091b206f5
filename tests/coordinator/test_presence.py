"""Who is summoned, and when: against the promises, with a clock that the test moves."""

from collections.abc import Collection
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator.presence import BEGIN_S, DOUBLED, DOUBLED_S, Presence, Seen

NAMES = ["a", "b", "c", "d", "e"]


class Roll:
    """A presence, its clock, the rounds that still wait, and the notices it gave."""

    def __init__(self, wave: int = 64) -> None:
        self.now = 0.0
        self.named: dict[str, Collection[str]] = {}
        self.notices: list[str] = []
        self.here: dict[str, object] = {}
        self.presence = Presence(
            lambda one: self.named.get(one, ()), wave=wave, clock=lambda: self.now
        )

    def arrive(self, name: str, **beat: Any) -> None:
        self.here[name] = self.presence.arrive(name, lambda: self.notices.append(name))
        self.beat(name, **beat)

    def beat(self, name: str, **beat: Any) -> None:
        self.presence.tell_ended(name, self.presence.beat(name, seen(**beat)))

    def summoned(self) -> set[str]:
        return {name for name in NAMES if self.presence.call(name).summoned}


def seen(*, working: Collection[str] = (), paused: bool = False) -> Seen:
    return Seen(
        software_version="t",
        clock_skew_ms=0,
        free_disk_bytes=1,
        paused=paused,
        expert_version=1,
        expert_steps=1,
        expert_unix_ms=1,
        working=frozenset(working),
        seen_unix_ms=1,
    )


def test_only_those_who_are_asked_and_attend_are_summoned() -> None:
    roll = Roll()
    for name in NAMES[:3]:
        roll.arrive(name)
    roll.notices.clear()
    roll.presence.ask("rnd-1", ["a", "d"])
    assert roll.summoned() == {"a"}
    assert roll.notices == ["a"]  # b and c hear nothing at all
    roll.arrive("d")
    assert roll.summoned() == {"a", "d"}
    roll.presence.answered("rnd-1", "a")
    assert roll.summoned() == {"d"}
    roll.presence.answered("rnd-1", "d")
    assert roll.summoned() == set()
    assert set(roll.notices) == {"a", "d"}


def test_one_that_two_rounds_want_stays_until_both_have_its_answer() -> None:
    roll = Roll()
    roll.arrive("a")
    roll.presence.ask("rnd-1", ["a"])
    roll.presence.ask("rnd-2", ["a"])
    roll.presence.answered("rnd-1", "a")
    assert roll.summoned() == {"a"}
    roll.presence.answered("rnd-2", "a")
    assert roll.summoned() == set()


def test_a_large_round_comes_in_waves_and_whoever_works_makes_room() -> None:
    roll = Roll(wave=2)
    for name in NAMES:
        roll.arrive(name)
    roll.named["rnd-1"] = NAMES
    roll.presence.ask("rnd-1", NAMES)
    assert roll.summoned() == {"a", "b"}
    roll.presence.beat("a", seen(working=["rnd-1"]))
    assert roll.summoned() == {"a", "b", "c"}  # a is awaited still, but is not on its way
    roll.presence.answered("rnd-1", "b")
    assert roll.summoned() == {"a", "c", "d"}
    roll.now += BEGIN_S
    roll.presence.refresh()
    assert roll.summoned() == {"a", "c", "d", "e"}  # c and d do not begin, and keep nobody out


def test_a_paused_participant_is_left_alone_until_it_resumes() -> None:
    roll = Roll()
    roll.arrive("a", paused=True)
    roll.presence.ask("rnd-1", ["a"])
    assert roll.summoned() == set()
    roll.presence.beat("a", seen())
    assert roll.summoned() == {"a"}


def test_a_round_that_is_over_is_told_to_those_who_work_on_it_and_only_once() -> None:
    roll = Roll()
    roll.named["rnd-1"] = ["a"]
    roll.arrive("a", working=["rnd-1"])
    assert roll.presence.call("a").ended == frozenset()
    roll.notices.clear()
    roll.named.clear()
    for _ in range(2):
        roll.presence.refresh()
    assert roll.presence.call("a").ended == {"rnd-1"}
    assert roll.notices == ["a"]
    heard = roll.presence.call("a")
    roll.presence.beat("a", seen())
    assert roll.presence.call("a").ended == frozenset()
    roll.beat("a", working=["rnd-1"])  # dropped, and brought up again: told again
    assert roll.presence.call("a") != heard


def test_two_that_keep_taking_each_others_place_are_named_until_one_is_gone() -> None:
    roll = Roll()

    def doubled() -> bool:
        here = roll.presence.attending()["a"]
        assert here is not None
        return here.doubled

    for _ in range(DOUBLED):
        roll.arrive("a")  # the first takes nobody's place
        roll.now += 30.0
        assert not doubled()
    roll.arrive("a")
    assert doubled()
    roll.now += DOUBLED_S
    assert not doubled()


def test_one_that_leaves_before_it_comes_back_is_not_two() -> None:
    roll = Roll()
    for _ in range(2 * DOUBLED):
        roll.arrive("a")
        roll.presence.leave("a", roll.here["a"])
    roll.arrive("a")
    here = roll.presence.attending()["a"]
    assert here is not None
    assert not here.doubled


def test_a_beat_reads_no_round_and_names_those_that_are_to_be_read() -> None:
    """It is taken on the loop of all that attend; a database would keep them all waiting."""
    presence = Presence(lambda one: pytest.fail(f"read {one}"), wave=1)
    presence.arrive("a", lambda: None)
    assert presence.beat("a", seen(working=["rnd-1"])) == {"rnd-1"}
    assert presence.beat("a", seen(working=["rnd-1", "rnd-2"])) == {"rnd-2"}
    assert presence.beat("a", seen()) == frozenset()


def test_a_round_of_others_sounds_like_one_that_does_not_exist() -> None:
    roll = Roll()
    roll.named["rnd-1"] = ["b"]
    roll.arrive("a", working=["rnd-1", "rnd-77"])
    assert roll.presence.call("a").ended == {"rnd-1", "rnd-77"}


def test_idle_time_counts_from_the_first_beat_with_empty_hands() -> None:
    roll = Roll()
    assert roll.presence.idle_s("a") == 0.0
    roll.named["rnd-1"] = ["a"]
    roll.arrive("a")
    roll.now = 5.0
    roll.presence.beat("a", seen())
    assert roll.presence.idle_s("a") == 5.0
    roll.presence.beat("a", seen(working=["rnd-1"]))
    roll.now = 50.0
    assert roll.presence.idle_s("a") == 0.0
    roll.presence.beat("a", seen())
    roll.now = 52.0
    assert roll.presence.idle_s("a") == 2.0


def test_a_newer_attendance_takes_the_place_of_the_older_one() -> None:
    roll = Roll()
    roll.arrive("a")
    older = roll.here["a"]
    roll.arrive("a")
    roll.presence.leave("a", older)
    assert not roll.presence.current("a", older)
    assert list(roll.presence.attending()) == ["a"]
    roll.presence.leave("a", roll.here["a"])
    assert roll.presence.attending() == {}


OPERATIONS = st.one_of(
    st.tuples(st.just("arrive"), st.sampled_from(NAMES)),
    st.tuples(st.just("leave"), st.sampled_from(NAMES)),
    st.tuples(st.just("work"), st.sampled_from(NAMES)),
    st.tuples(st.just("pause"), st.sampled_from(NAMES)),
    st.tuples(st.just("ask"), st.sets(st.sampled_from(NAMES))),
    st.tuples(st.just("answered"), st.sampled_from(NAMES)),
    st.tuples(st.just("wait"), st.integers(1, 100)),
)


@given(st.lists(OPERATIONS, max_size=40))
def test_whatever_happens_nobody_is_summoned_who_is_not_wanted_or_not_here(
    operations: list[tuple[str, Any]],
) -> None:
    roll, wanted = Roll(wave=2), set()
    roll.named["rnd-1"] = NAMES
    for what, who in operations:
        if what == "arrive":
            roll.arrive(who)
        elif what == "leave" and who in roll.here:
            roll.presence.leave(who, roll.here.pop(who))
        elif what in ("work", "pause"):
            roll.presence.beat(who, seen(working=["rnd-1"] * (what == "work"), paused=True))
        elif what == "ask":
            wanted |= who
            roll.presence.ask("rnd-1", who)
        elif what == "answered":
            wanted.discard(who)
            roll.presence.answered("rnd-1", who)
        elif what == "wait":
            roll.now += who
            roll.presence.refresh()
        assert roll.summoned() <= wanted & set(roll.here)
    for who in NAMES:
        roll.presence.answered("rnd-1", who)
    assert roll.summoned() == set()


@pytest.mark.parametrize("wave", [1, 2, 5])
@given(data=st.data())
def test_everybody_gets_a_turn(wave: int, data: st.DataObject) -> None:
    """Each one summoned answers, in any order; in the end all have been asked."""
    roll, turns = Roll(wave=wave), []
    for name in NAMES:
        roll.arrive(name)
    roll.presence.ask("rnd-1", NAMES)
    while roll.summoned():
        assert len(roll.summoned()) <= wave
        name = data.draw(st.sampled_from(sorted(roll.summoned())))
        turns.append(name)
        roll.presence.answered("rnd-1", name)
    assert sorted(turns) == NAMES
