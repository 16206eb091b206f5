"""Whatever is stuck is explained, and every explanation of something stuck has a remedy."""

import json
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
    Event,
    Lost,
    Reported,
    Tick,
    Worked,
)
from coordinator.recurring import Standing
from coordinator.rounds import RETRY_MS, State
from coordinator.store import Store
from coordinator.why import Facts, Finding, Seen, explain, seen_of, when
from protos.errors import CofuseError
from tests.coordinator import test_presence
from tests.coordinator.test_recurring import SUNDAY, recurring
from tests.coordinator.test_rounds import HOUR_MS, NOW, a_round, after, collecting, fusing

HERE = Seen(online=True)


def facts(*rounds: Any, **change: Any) -> Facts:
    values: dict[str, Any] = {
        "rounds": rounds,
        "seen": dict.fromkeys("abc", HERE),
        "pivots": {"pivot-0": ""},
        "recurring": (),
    }
    return Facts(**{**values, **change})


def words(name: str, known: Facts, now: int = NOW) -> list[Finding]:
    return list(explain(name, known, now))


def test_a_round_that_waits_for_approval_says_who_and_how() -> None:
    (found,) = words("rnd-1", facts(a_round()))
    assert found == Finding(
        "rnd-1 waits for approval, and expires at 23:13 UTC (in 60 min)",
        "an operator lets it run: cofuse round approve rnd-1",
    )


@pytest.mark.parametrize(
    ("seen", "says", "do"),
    [
        (Seen(online=False), "b is not connected", "cofuse participant up"),
        (Seen(online=False), "b is not connected", "revoked certificate"),
        (replace(HERE, doubled=True), "b attends twice", "stop it there"),
        (replace(HERE, paused=True), "b is paused", "cofuse participant resume"),
        (replace(HERE, free_bytes=12 << 20), "12 MiB of free disk", "free some"),
        (replace(HERE, skew_ms=-600_000), "clock is off by -600 s", "set it there"),
        (replace(HERE, awaiting=frozenset({"rnd-1"})), "waits for its approval", "cofuse approve"),
        (replace(HERE, awaiting=frozenset({"rnd-9"})), "has been asked (attempt 1)", "asked again"),
        (HERE, "has been asked (attempt 1)", "asked again at 22:23 UTC (in 10 min)"),
    ],
)
def test_who_holds_up_a_round_is_named_with_the_reason(seen: Seen, says: str, do: str) -> None:
    round_ = after(collecting(), Committed("a", "a" * 64, 5), Reported("c", 1, "refused", "no", ""))
    round_ = replace(round_, needed=2)
    first, a, b, c = words("rnd-1", facts(round_, seen={"a": HERE, "b": seen, "c": HERE}))
    assert "1 of 3 contributions, 2 are needed" in first.says
    assert "report is waited for" in a.says
    assert says in b.says
    assert do in b.do
    assert c.says == "c refused: no"
    assert "policy.toml" in c.do


def test_what_the_last_beat_said_is_what_is_known() -> None:
    beat = replace(test_presence.seen(paused=True), clock_skew_ms=7, awaiting=frozenset({"rnd-1"}))
    beat = replace(beat, working=frozenset({"rnd-1", "rnd-2"}))
    found = seen_of(
        ["a", "b", "c"], {"a": beat, "b": None, "stranger": beat}, {"a": "it went back"}
    )
    assert found.keys() == {"a", "b", "c"}
    a = found["a"]
    assert (a.online, a.paused, a.skew_ms, a.awaiting) == (True, True, 7, {"rnd-1"})
    assert a.working == {"rnd-1", "rnd-2"}
    assert a.free_bytes == beat.free_disk_bytes
    assert a.alarm == "it went back"
    assert found["b"] == Seen(online=True)
    assert found["c"] == Seen(online=False)


def test_what_was_lost_is_told_until_it_is_found() -> None:
    round_ = after(collecting(), Lost("a", 1, "its node restarted"))
    assert "last time: its node restarted" in words("rnd-1", facts(round_))[1].says


def test_who_attends_but_never_hears_of_the_round_cannot_dial_the_engine() -> None:
    asked_again = after(collecting(), Tick(), now=NOW + 10 * 60_000)
    heard = {"b": replace(HERE, working=frozenset({"rnd-1"}))}
    known = facts(asked_again, seen={"a": HERE, "c": Seen(online=False), **heard})
    _, a, b, c = words("rnd-1", known)
    assert "nothing of the round has reached it in 1 attempt;" in a.says
    assert "engine_listen" in a.do
    assert "has been asked (attempt 2)" in b.says
    assert "not connected" in c.says


def test_a_round_in_the_queue_names_the_one_ahead() -> None:
    ahead = replace(after(fusing(), Worked(1)), round_id="rnd-7")
    known = facts(ahead, fusing())
    (found,) = words("rnd-1", known)
    assert "behind rnd-7" in found.says
    assert "cofuse round cancel rnd-7" in found.do
    assert "by worker 1" in words("rnd-7", known)[0].says


def test_lost_workers_are_told() -> None:
    lost = after(fusing(), Worked(1), Broke(1, "killed by signal 9", lost=True))
    again = after(lost, Tick(), now=NOW + RETRY_MS)
    assert "1 of its workers were lost. killed by signal 9" in words("rnd-1", facts(again))[1].says


def test_an_ended_round_says_why() -> None:
    refused = Reported("a", 1, "refused", "ship_logits is false", "")
    failed = after(collecting(), refused, Tick())
    assert failed.state is State.FAILED
    assert [f.says for f in words("rnd-1", facts(failed))] == [
        "rnd-1 failed: a refused: ship_logits is false; no answer from b, c",
        "a refused: ship_logits is false",
    ]
    expired = after(fusing(), Tick(), now=NOW + HOUR_MS)
    assert "longer deadline" in words("rnd-1", facts(expired))[0].do
    cancelled = after(collecting(), Decided(Event.CANCEL, "by ada"))
    assert words("rnd-1", facts(cancelled)) == [Finding("rnd-1 was cancelled by ada")]


def test_a_participant_a_pivot_and_the_calendar_are_explained_too() -> None:
    known = facts(collecting(), pivots={"pivot-0": "", "pivot-1": "rnd-1"})
    assert words("a", known)[0].says == "a is connected"
    assert "in rnd-1: a has been asked" in words("a", known)[1].says
    assert "imported" in words("pivot-0", known)[0].says
    assert "kept for what rnd-1 makes" in words("pivot-1", known)[0].says
    weekly = recurring()
    assert "next round at" in words("rec-1", facts(recurring=[weekly]), SUNDAY - 9)[0].says
    waits = replace(weekly, detail="waits for newer experts: found none, wanted 2")
    assert "found none, wanted 2" in words("rec-1", facts(recurring=[waits]), SUNDAY + 9)[0].says
    stopped = replace(weekly, state=Standing.STOPPED, detail="by op")
    assert words("rec-1", facts(recurring=[stopped]))[0].says == "rec-1 is stopped by op"


def test_the_facts_are_the_stores(tmp_path: Path) -> None:
    store = Store.at(tmp_path / "store.sqlite")
    asked = json.dumps({"participants": ["a"]})
    store.submit_round(request_id="r", submitted_by="ada", spec_json=asked, deadline_ms=HOUR_MS)
    for event in (Event.APPROVE, Event.ISSUE, Event.COLLECTED):
        store.advance("rnd-1", event)
    known = store.facts({"a": HERE})
    assert known.rounds == [store.core("rnd-1")]
    assert "kept for what rnd-1 makes" in words("pivot-1", known)[0].says


def test_an_unknown_name_is_said_so() -> None:
    with pytest.raises(CofuseError, match="no round, participant, pivot or recurring"):
        words("nobody", facts())


@pytest.mark.parametrize("state", list(State))
@pytest.mark.parametrize("online", [True, False])
def test_every_state_has_an_explanation_and_an_open_one_a_remedy(
    state: State, online: bool
) -> None:
    round_ = replace(collecting(), state=state, detail="")
    known = facts(round_, seen=dict.fromkeys("abc", replace(HERE, online=online)))
    found = words("rnd-1", known)
    assert found[0].says.startswith("rnd-1 ")
    if state in (State.SUBMITTED, State.APPROVED, State.COLLECTING):
        assert any(finding.do for finding in found)


@given(st.integers(0, 4_000_000_000_000))
def test_any_moment_has_words(moment: int) -> None:
    assert ("ago" in when(moment, NOW)) == (moment < NOW)
