"""Rounds by the calendar: at their time, once, when what they wait for is there."""

from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator import store_recurring
from coordinator.happenings import (
    Committed,
    Decided,
    Event,
    Fused,
    Reported,
    Tick,
    Worked,
)
from coordinator.recurring import (
    Recurring,
    Situation,
    Standing,
    decide,
    newer_experts,
    newest_pivot,
    next_due,
)
from coordinator.rounds import State
from coordinator.store import Store
from protos.errors import CofuseError
from protos.messages import FileRef
from protos.recurring import RecurringSpec
from protos.spec import RoundSpec
from tests.coordinator.test_fuse_worker import spec as round_spec

WEEK_MS = 7 * 86_400_000
SUNDAY = int(datetime(2026, 11, 22, 2, tzinfo=UTC).timestamp() * 1000)


def spec(**change: Any) -> RecurringSpec:
    asked = round_spec(participants=("ada", "bob", "cyd"), deadline_minutes=60)
    values = {"name": "weekly", "every": "0 2 * * sun", "round": asked, **change}
    return RecurringSpec(**values)


def recurring(**change: Any) -> Recurring:
    values: dict[str, Any] = {
        "recurring_id": "rec-1",
        "submitted_by": "op",
        "spec_json": spec(**change).model_dump_json(),
        "state": Standing.ACTIVE,
        "due_unix_ms": SUNDAY,
        "last_round_id": "",
        "detail": "",
    }
    return Recurring(**values)


def situation(**change: Any) -> Situation:
    values: dict[str, Any] = {"last_is_open": False, "changed_unix_ms": {}, "fused_unix_ms": {}}
    return Situation(**{**values, **change})


# --- the decision ----------------------------------------------------------------------------


def test_a_round_is_made_at_its_time_and_the_next_a_week_later() -> None:
    assert decide(recurring(), situation(), SUNDAY - 1) == (recurring(), False)
    after, is_time = decide(recurring(), situation(), SUNDAY)
    assert (is_time, after.due_unix_ms) == (True, SUNDAY + WEEK_MS)


def test_a_time_that_was_missed_is_made_up_for_once() -> None:
    after, is_time = decide(recurring(), situation(), SUNDAY + 3 * WEEK_MS + 5)
    assert (is_time, after.due_unix_ms) == (True, SUNDAY + 4 * WEEK_MS)
    assert decide(after, situation(), SUNDAY + 3 * WEEK_MS + 6) == (after, False)


def test_it_waits_for_newer_experts_and_says_so() -> None:
    asked = recurring(newer_experts=2)
    fused = {"ada": 50, "bob": 50}
    waits, is_time = decide(
        asked, situation(changed_unix_ms={"ada": 60, "bob": 40}, fused_unix_ms=fused), SUNDAY
    )
    assert not is_time
    assert waits.detail == "waits for newer experts: found 1 (ada), wanted 2"
    known = situation(changed_unix_ms={"ada": 60, "bob": 40, "cyd": 1}, fused_unix_ms=fused)
    after, is_time = decide(waits, known, SUNDAY + 9)
    assert (is_time, after.detail) == (True, "")
    assert newer_experts(("ada", "bob", "cyd", "dan"), known) == ["ada", "cyd"]


def test_the_next_is_not_made_while_the_last_is_open_nor_after_it_is_stopped() -> None:
    waits, is_time = decide(recurring(), situation(last_is_open=True), SUNDAY)
    assert (is_time, "has ended" in waits.detail) == (False, True)
    stopped = Recurring(
        **{n: getattr(recurring(), n) for n in Recurring.__slots__ if n != "state"},
        state=Standing.STOPPED,
    )
    assert decide(stopped, situation(), SUNDAY + WEEK_MS) == (stopped, False)


@given(st.integers(SUNDAY - 60 * WEEK_MS, SUNDAY + 60 * WEEK_MS))
def test_the_next_time_is_ahead_and_at_two_in_paris_whatever_the_season(now: int) -> None:
    due = next_due(spec(timezone="Europe/Paris"), now)
    there = datetime.fromtimestamp(due / 1000, ZoneInfo("Europe/Paris"))
    assert now < due <= now + WEEK_MS + 3_600_000
    assert (there.weekday(), there.hour, there.minute) in {(6, 2, 0), (6, 3, 0)}
    # Three o'clock only on the Sunday that has no two o'clock.
    assert there.hour == 2 or there.month == 3


def test_each_round_starts_from_the_newest_pivot_of_its_line() -> None:
    parents = {"pivot-0": "", "pivot-1": "pivot-0", "pivot-2": "", "pivot-3": "pivot-1"}
    assert newest_pivot("pivot-0", parents) == "pivot-3"
    assert newest_pivot("pivot-2", parents) == "pivot-2"
    assert newest_pivot("pivot-9", parents) == "pivot-9"


# --- stored ----------------------------------------------------------------------------------


class Clock:
    """What the store takes for the time."""

    now = SUNDAY - WEEK_MS

    def __call__(self) -> int:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(store_recurring, "now_unix_ms", made)
    return made


@pytest.fixture
def store(tmp_path: Path, clock: Clock) -> Store:
    found = Store.at(tmp_path / "store.sqlite")
    files = [FileRef(name="model.safetensors", sha256="0" * 64, size_bytes=1)]
    found.add_pivot(name="pivot-0", parent="", round_id="", files=files, evals_json="{}")
    return found


def start(store: Store, **change: Any) -> str:
    row = store.add_recurring(
        request_id="r", submitted_by="op", spec_json=spec(**change).model_dump_json(),
        due_unix_ms=SUNDAY,
    )  # fmt: skip
    return row.recurring_id


def publish(store: Store, round_id: str, names: tuple[str, ...]) -> None:
    """What the scheduler and the participants do."""
    store.step(round_id, Tick())
    for name in ("ada", "bob", "cyd"):
        if name in names:
            store.step(round_id, Committed(name, name * 21 + "0", 5))
        status = "committed" if name in names else "refused"
        store.step(round_id, Reported(name, 1, status, "", "{}"))
    store.step(round_id, Decided(Event.COLLECTED))
    for happening in (Worked(1), Fused(1)):
        store.step(round_id, happening)
    files = [FileRef(name="model.safetensors", sha256="1" * 64, size_bytes=1)]
    parent = RoundSpec.model_validate_json(store.round(round_id).spec_json).pivot
    store.publish(round_id, 1, parent=parent, files=files, evals_json="{}")


def test_the_same_request_is_the_same_recurring_spec(store: Store) -> None:
    assert start(store) == start(store) == "rec-1"
    assert [row.spec_json for row in store.recurring()] == [spec().model_dump_json()]


def test_its_rounds_are_approved_and_made_once_across_restarts(
    store: Store, clock: Clock, tmp_path: Path
) -> None:
    start(store)
    assert store.repeat("rec-1") == ""
    clock.now = SUNDAY + 5
    assert store.repeat("rec-1") == "rnd-1"
    again = Store.at(tmp_path / "store.sqlite")
    assert again.repeat("rec-1") == ""
    assert [(row.round_id, row.state) for row in again.rounds()] == [("rnd-1", State.APPROVED)]
    assert again.recurring()[0].last_round_id == "rnd-1"


def test_the_next_starts_from_what_the_last_has_made_when_experts_are_newer(
    store: Store, clock: Clock
) -> None:
    start(store, newer_experts=1)
    for name in ("ada", "bob"):
        store.note_expert(name, "v1")
    clock.now = SUNDAY
    publish(store, store.repeat("rec-1"), ("ada", "bob"))
    clock.now = SUNDAY + WEEK_MS
    store.note_expert("ada", "v1")  # said again, it is no newer
    assert store.repeat("rec-1") == ""
    assert "found none, wanted 1" in store.recurring()[0].detail
    store.note_expert("ada", "v2")
    round_id = store.repeat("rec-1")
    assert RoundSpec.model_validate_json(store.round(round_id).spec_json).pivot == "pivot-1"


def test_a_stopped_one_makes_no_more(store: Store, clock: Clock) -> None:
    start(store)
    stopped = store.stop_recurring("rec-1", "by op")
    assert (stopped.state, stopped.detail) == (Standing.STOPPED, "by op")
    assert store.stop_recurring("rec-1", "again") == stopped
    clock.now = SUNDAY + WEEK_MS
    assert store.repeat("rec-1") == ""
    assert store.rounds() == []


@pytest.mark.parametrize("recurring_id", ["", "rec-", "rec-9", "rnd-1", "rec-" + "9" * 30])
def test_an_unknown_one_is_said_so(store: Store, recurring_id: str) -> None:
    with pytest.raises(CofuseError, match="cofuse recurring ls"):
        store.repeat(recurring_id)
