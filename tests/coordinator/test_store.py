"""Promises of the store: what it reports done is there after a restart, and only once."""

import threading
from pathlib import Path

import pytest

from coordinator.rounds import Event, IllegalTransitionError, State
from coordinator.store import Store
from protos.errors import CofuseError
from protos.messages import FileRef


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store.at(tmp_path / "store.sqlite")


def submit(store: Store, request_id: str = "r") -> str:
    row = store.submit_round(
        request_id=request_id, submitted_by="ada", spec_json="{}", deadline_ms=1000
    )
    return row.round_id


def collecting(store: Store) -> str:
    round_id = submit(store)
    store.advance(round_id, Event.APPROVE)
    store.advance(round_id, Event.ISSUE)
    store.assign(round_id, ["a", "b"])
    return round_id


def test_the_same_request_is_the_same_round(store: Store) -> None:
    assert submit(store) == submit(store)
    assert submit(store, "other") != submit(store)
    assert len(store.rounds()) == 2


def test_a_round_is_found_again_after_a_restart(store: Store, tmp_path: Path) -> None:
    round_id = collecting(store)
    store.commit(round_id, "a", "0" * 64, 5)
    again = Store.at(tmp_path / "store.sqlite")
    assert again.round(round_id).state is State.COLLECTING
    assert [part.status for part in again.contributions(round_id)] == ["committed", "assigned"]
    assert [e.kind for e in again.events(round_id)] == ["state"] * 3 + ["contribution"]


def test_an_illegal_move_changes_nothing(store: Store) -> None:
    round_id = submit(store)
    before = store.round(round_id), store.events(round_id)
    with pytest.raises(IllegalTransitionError):
        store.advance(round_id, Event.FUSED)
    assert (store.round(round_id), store.events(round_id)) == before


def test_a_commit_repeats_safely_and_never_changes(store: Store) -> None:
    round_id = collecting(store)
    first = store.commit(round_id, "a", "0" * 64, 5)
    assert store.commit(round_id, "a", "0" * 64, 5) == first
    with pytest.raises(CofuseError, match="already holds"):
        store.commit(round_id, "a", "1" * 64, 5)


def test_nobody_commits_to_a_round_that_does_not_name_or_want_them(store: Store) -> None:
    round_id = collecting(store)
    with pytest.raises(CofuseError, match="does not name"):
        store.commit(round_id, "c", "0" * 64, 5)
    store.advance(round_id, Event.CANCEL)
    with pytest.raises(CofuseError, match="CANCELLED"):
        store.commit(round_id, "a", "0" * 64, 5)


def test_a_report_never_undoes_a_commit(store: Store) -> None:
    round_id = collecting(store)
    store.commit(round_id, "a", "0" * 64, 5)
    store.report(round_id, "a", "failed", "late trouble", "{}")
    store.report(round_id, "b", "refused", "policy", "{}")
    assert [part.status for part in store.contributions(round_id)] == ["committed", "refused"]


def test_only_open_assignments_are_issued_again(store: Store) -> None:
    round_id = collecting(store)
    store.commit(round_id, "a", "0" * 64, 5)
    again = {part.participant: part.attempt for part in store.assign(round_id, ["a", "b"])}
    assert again == {"a": 1, "b": 2}


def test_two_rounds_never_share_a_pivot_name(store: Store) -> None:
    names = set()
    for number in range(3):
        round_id = submit(store, str(number))
        for event in (Event.APPROVE, Event.ISSUE, Event.COLLECTED):
            store.advance(round_id, event)
        names.add(store.round(round_id).pivot_name)
    assert names == {"pivot-1", "pivot-2", "pivot-3"}


def test_a_published_pivot_never_changes(store: Store) -> None:
    files = [FileRef(name="model.safetensors", sha256="0" * 64, size_bytes=1)]
    publish = {"name": "pivot-1", "parent": "", "round_id": "rnd-1", "evals_json": "{}"}
    row = store.add_pivot(**publish, files=files)
    assert store.add_pivot(**publish, files=files) == row
    with pytest.raises(CofuseError, match="other files"):
        store.add_pivot(**publish, files=[])


def test_writers_wait_their_turn(store: Store) -> None:
    round_id = collecting(store)
    writers = [
        threading.Thread(target=store.note, args=(round_id, "note", {"n": n})) for n in range(24)
    ]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    notes = [event for event in store.events(round_id) if event.kind == "note"]
    assert len(notes) == 24


@pytest.mark.parametrize("round_id", ["", "rnd-", "rnd-x", "rnd-99", "../x", "rnd-" + "9" * 40])
def test_an_unknown_round_is_said_so(store: Store, round_id: str) -> None:
    with pytest.raises(CofuseError, match="round"):
        store.round(round_id)
