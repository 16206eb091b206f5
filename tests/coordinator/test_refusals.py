"""Who was refused is on the chain, and refusing a million times adds a handful of records."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from coordinator.audit import lines
from coordinator.refusals import AUDITED, MAX_OPEN, OTHERS, REFUSED, WINDOW_S, Kind, Refusals, Tally
from coordinator.store import Store
from protos.errors import CofuseError
from trust.chain import read_record

EVE = Kind("cofuse://researcher/eve", "/cofuse.v1.Research/ApproveRound", "not_allowed")


class Clock:
    """Seconds, moved by hand."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def tally(clock: Clock) -> Tally:
    return Tally(clock)


def times(tally: Tally, **how: bool) -> list[Any]:
    return [entry.data["times"] for entry in tally.due(**how)]


def test_the_first_of_a_kind_is_written_at_once_and_the_rest_as_the_hours_count(
    tally: Tally, clock: Clock
) -> None:
    assert [tally.note(EVE, "first"), tally.note(EVE, "again"), tally.note(EVE, "last")] == [
        True,
        False,
        False,
    ]
    assert times(tally) == [1]
    assert times(tally) == []
    assert tally.wait_s() == WINDOW_S
    clock.now = WINDOW_S
    [entry] = tally.due()
    assert (entry.actor, entry.act, entry.obj, entry.res) == (EVE.caller, REFUSED, EVE[1], "deny")
    assert (entry.data, entry.why) == ({"error": "not_allowed", "times": 2}, "last")


def test_no_refusal_is_lost_whatever_the_hours(tally: Tally, clock: Clock) -> None:
    written = 0
    for minute in range(1000):
        clock.now = minute * 60.0
        tally.note(EVE, "again")
        written += sum(times(tally))
    assert written + sum(times(tally, everything=True)) == 1000


def test_a_million_refusals_are_two_records_and_the_memory_is_bounded(
    tally: Tally, clock: Clock
) -> None:
    for number in range(1000):
        for _ in range(1000):
            tally.note(EVE._replace(caller=f"cofuse://researcher/r{number % 10}"), "again")
    assert len(times(tally)) == 10
    for number in range(2 * MAX_OPEN):
        tally.note(EVE._replace(caller=f"n{number}"), "many")
    found = tally.due()
    assert len(found) == MAX_OPEN - 10 + 1
    assert found[-1].actor == OTHERS.caller
    clock.now = WINDOW_S
    assert sum(times(tally)) == 1_000_000 - 10 + (2 * MAX_OPEN - len(found))


def test_an_hour_without_refusals_is_no_record_and_forgotten(tally: Tally, clock: Clock) -> None:
    tally.note(EVE, "once")
    assert times(tally) == [1]
    clock.now = WINDOW_S
    assert (times(tally), tally.wait_s()) == ([], None)
    assert tally.note(EVE, "again")


# ------------------------------------------------------------------------------------ on the chain


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    found = Store.at(tmp_path / "c.sqlite")
    yield found
    found.close()


def on_the_chain(store: Store) -> list[dict[str, Any]]:
    with store.database.read() as db:
        records = [read_record(line) for line in lines(db)]
    return [record for record in records if record["act"] == REFUSED]


def test_a_refusal_is_on_the_chain_with_who_and_why_and_a_wrong_request_is_not(
    store: Store,
) -> None:
    refusals = Refusals(store)
    refusals.start()
    refusals.note(EVE.method, EVE.caller, CofuseError("bad_request", "x"))
    for _ in range(3):
        refusals.note(EVE.method, EVE.caller, CofuseError("not_allowed", "no\nway"))
    refusals.stop()
    found = on_the_chain(store)
    assert sum(record["data"]["times"] for record in found) == 3
    assert {(r["actor"], r["obj"], r["why"]) for r in found} == {(EVE.caller, EVE[1], r"no\nway")}


def test_a_store_that_takes_nothing_ends_no_refusal(
    store: Store, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_entries: object) -> None:
        raise CofuseError("storage_full", "no space")

    monkeypatch.setattr(Store, "record", full)
    refusals = Refusals(store)
    refusals.start()
    refusals.note(EVE.method, EVE.caller, CofuseError("revoked", "x"))
    refusals.stop()
    assert "refusals.unwritten" in caplog.text


def test_every_error_about_who_may_is_audited() -> None:
    wanted = {"not_allowed", "own_round", "no_identity", "revoked", "expired", "bad_invitation"}
    assert wanted | {"too_many_calls"} == AUDITED
