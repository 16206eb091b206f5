"""Promises of the store, on each database: what it reports done is there, and only once."""

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from coordinator.happenings import Restarted
from coordinator.rounds import Event, IllegalTransitionError, State
from coordinator.store import Store
from protos.errors import CofuseError
from protos.messages import FileRef

DATABASES = [
    "memory",
    "sqlite",
    # One group: only one of several test processes starts the server.
    "postgres",
]


@pytest.fixture(params=DATABASES)
def url(request: Any, tmp_path: Path) -> str:
    if request.param == "postgres":
        return str(request.getfixturevalue("new_postgres")())
    return "sqlite://" if request.param == "memory" else f"sqlite:///{tmp_path}/store.sqlite"


@pytest.fixture
def store(url: str) -> Iterator[Store]:
    store = Store(url)
    yield store
    store.close()


def submit(store: Store, request_id: str = "r") -> str:
    row = store.submit_round(
        request_id=request_id,
        submitted_by="ada",
        spec_json='{"participants": ["a", "b"]}',
        deadline_ms=1000,
    )
    return row.round_id


def collecting(store: Store) -> str:
    round_id = submit(store)
    store.advance(round_id, Event.APPROVE)
    store.advance(round_id, Event.ISSUE)
    return round_id


def test_the_same_request_is_the_same_round(store: Store) -> None:
    assert submit(store) == submit(store)
    assert submit(store, "other") != submit(store)
    assert len(store.rounds()) == 2


def test_a_round_is_found_again_after_a_restart(store: Store, url: str) -> None:
    if url == "sqlite://":
        pytest.skip("a memory ends with its process")
    round_id = collecting(store)
    store.commit(round_id, "a", "0" * 64, 5)
    store.close()
    again = Store(url)
    assert again.round(round_id).state is State.COLLECTING
    assert [part.status for part in again.contributions(round_id)] == ["committed", "assigned"]
    assert [e.kind for e in again.events(round_id)] == ["state"] * 3 + ["contribution"]
    assert submit(again) == round_id, "the same request is the same round, also afterwards"
    assert submit(again, "next") != round_id
    again.close()


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
    store.report(round_id, "a", "committed", "", "{}")
    store.step(round_id, Restarted())
    attempts = {part.participant: part.attempt for part in store.contributions(round_id)}
    assert attempts == {"a": 1, "b": 2}


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


def test_one_of_many_at_once_commits(store: Store) -> None:
    """Whoever is told "committed" is the one whose file stands; all others hear of it."""
    round_id = collecting(store)
    digests = [f"{n:064x}" for n in range(12)]
    told, refused = list[str](), list[str]()

    def commit(digest: str) -> None:
        try:
            told.append(store.commit(round_id, "a", digest, 5).sha256)
        except CofuseError as error:
            refused.append(error.says)

    writers = [threading.Thread(target=commit, args=(digest,)) for digest in digests]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert told == [store.contributions(round_id)[0].sha256]
    assert len(refused) == 11
    assert all("already holds" in says for says in refused)


def test_a_cancel_and_a_commit_at_once_leave_one_story(store: Store) -> None:
    for number in range(8):
        round_id = submit(store, str(number))
        for event in (Event.APPROVE, Event.ISSUE):
            store.advance(round_id, event)
        outcome: list[str] = []

        def commit(round_id: str = round_id, outcome: list[str] = outcome) -> None:
            try:
                outcome.append(store.commit(round_id, "a", "0" * 64, 5).status)
            except CofuseError:
                outcome.append("refused")

        writer = threading.Thread(target=commit)
        writer.start()
        store.advance(round_id, Event.CANCEL)
        writer.join()
        story = [event.kind for event in store.events(round_id)]
        stands = store.contributions(round_id)[0].status == "committed"
        assert outcome == ["committed" if stands else "refused"]
        assert story.count("contribution") == stands
        assert not stands or story[-1] == "state", "nothing is committed after the end"


@pytest.mark.parametrize(
    "words", ["a\0b", "lone \ud800 surrogate", "x" * 20_000, "naive cafe\u0301"]
)
def test_any_words_of_a_participant_can_be_kept(store: Store, words: str) -> None:
    round_id = collecting(store)
    store.report(round_id, "a", "failed", words, "{}")
    kept = store.contributions(round_id)[0].detail
    assert len(kept) == len(words)
    assert "\0" not in kept


def test_participants_keep_64_bit_nodes_and_their_first_day(store: Store) -> None:
    store.upsert_participant("b", 2**64 - 1, b"\0key")
    first = store.participants()["b"]
    store.upsert_participant("b", 2**63, b"other")
    assert store.participants()["b"].joined_unix_ms == first.joined_unix_ms
    assert (first.node_id, store.participants()["b"].node_id) == (2**64 - 1, 2**63)


def test_an_artifact_has_each_owner_once(store: Store) -> None:
    for owner in ("a", "b", "a"):
        store.add_artifact("0" * 64, owner, "LOGITS", 2**40)
    assert store.artifact_kinds("0" * 64) == {"a": ("LOGITS", 2**40), "b": ("LOGITS", 2**40)}


def test_who_waits_for_news_is_woken(store: Store) -> None:
    heard = threading.Event()

    def wait() -> None:
        with store.changed:
            listening.set()
            if store.changed.wait(30):
                heard.set()

    listening = threading.Event()
    waiter = threading.Thread(target=wait)
    waiter.start()
    listening.wait(30)
    submit(store)
    waiter.join()
    assert heard.is_set()


@pytest.mark.parametrize("round_id", ["", "rnd-", "rnd-x", "rnd-99", "../x", "rnd-" + "9" * 40])
def test_an_unknown_round_is_said_so(store: Store, round_id: str) -> None:
    with pytest.raises(CofuseError, match="round"):
        store.round(round_id)
