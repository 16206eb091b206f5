"""The coordinator's chain: no change without its record, no record without its change."""

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from coordinator.audit import BEGAN, FOLDER, chain_of, lines
from coordinator.auditor import Auditor
from coordinator.happenings import Reported, Tick
from coordinator.rounds import Event
from coordinator.store import Store
from coordinator.why import Seen, explain
from protos.errors import CofuseError
from trust.chain import Head, read_record
from trust.checkpoints import CHECKPOINT_EVERY

OPERATOR = "cofuse://operator/grace"
COORDINATOR = "cofuse://coordinator/coordinator"


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    found = Store.at(tmp_path / "c.sqlite")
    yield found
    found.close()


def collecting(store: Store, names: tuple[str, ...] = ("a", "b")) -> str:
    spec = json.dumps({"participants": names})
    row = store.submit_round(request_id="r", submitted_by="ada", spec_json=spec, deadline_ms=10**8)
    store.advance(row.round_id, Event.APPROVE, f"by {OPERATOR}", OPERATOR)
    store.step(row.round_id, Tick())
    return row.round_id


def records(store: Store) -> list[dict[str, Any]]:
    with store.database.read() as db:
        return [read_record(line) for line in lines(db)]


def whole(store: Store, folder: Path) -> int:
    """The last record, all before it verified; how far it is signed."""
    with store.database.snapshot() as db:
        verdict = chain_of(db, folder).verify()
    assert verdict.broken is None
    assert verdict.head == store.audit_head()
    return verdict.signed


def test_every_change_is_a_record_with_who_made_it(store: Store, tmp_path: Path) -> None:
    round_id = collecting(store)
    store.commit(round_id, "a", "0" * 64, 5)
    store.step(round_id, Reported("b", 1, "refused", "our policy", "{}"))
    store.advance(round_id, Event.CANCEL, by="cofuse://researcher/ada")
    began, *told = records(store)
    assert (began["act"], began["data"]) == (BEGAN, {"after_event": 0})
    assert [(r["actor"], r["act"], r["data"].get("state")) for r in told] == [
        ("cofuse://researcher/ada", "round.state", "SUBMITTED"),
        (OPERATOR, "round.state", "APPROVED"),
        (COORDINATOR, "round.state", "COLLECTING"),
        ("cofuse://participant/a", "contribution.committed", None),
        ("cofuse://participant/b", "contribution.refused", None),
        ("cofuse://researcher/ada", "round.state", "CANCELLED"),
    ]
    assert told[3]["data"] == {"participant": "a", "sha256": "0" * 64, "size_bytes": 5}
    assert {record["obj"] for record in told} == {round_id}
    whole(store, tmp_path)


def test_repeating_is_no_change_and_no_record(store: Store) -> None:
    round_id = collecting(store)
    store.commit(round_id, "a", "0" * 64, 5)
    before = store.audit_head()
    store.commit(round_id, "a", "0" * 64, 5)
    collecting_again = store.submit_round(
        request_id="r", submitted_by="ada", spec_json="{}", deadline_ms=1
    )
    assert collecting_again.round_id == round_id
    with pytest.raises(CofuseError):
        store.commit(round_id, "c", "0" * 64, 5)
    assert store.audit_head() == before


def test_what_was_undone_leaves_no_record_and_no_gap(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    round_id = collecting(store)
    before = store.audit_head()

    def fail(*_: Any) -> None:
        raise CofuseError("bad_request", "later in the same transaction")

    with monkeypatch.context() as patch:
        patch.setattr("coordinator.round_rows.tell", fail)
        with pytest.raises(CofuseError):
            store.commit(round_id, "a", "0" * 64, 5)
    assert store.audit_head() == before
    store.commit(round_id, "a", "0" * 64, 5)
    assert store.audit_head().seq == before.seq + 1
    whole(store, tmp_path)


def test_many_who_commit_at_once_make_one_chain(store: Store, tmp_path: Path) -> None:
    names = tuple(f"p{number}" for number in range(24))
    round_id = collecting(store, names)

    def commit(mine: tuple[str, ...]) -> None:
        for name in mine:
            store.commit(round_id, name, f"{name:0>64}", 5)

    threads = [threading.Thread(target=commit, args=(names[n::4],)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    committed = {r["data"]["participant"] for r in records(store)[4:]}
    assert committed == set(names)
    whole(store, tmp_path)


def test_the_auditor_signs_when_it_is_due_and_at_the_end(store: Store, tmp_path: Path) -> None:
    auditor = Auditor(store, tmp_path)
    auditor.start()
    round_id = collecting(store)
    auditor.stop()
    assert whole(store, tmp_path) == store.audit_head().seq == 4
    store.commit(round_id, "a", "0" * 64, 5)
    assert whole(store, tmp_path) == 4
    again = Auditor(store, tmp_path)  # the same key, and it knows what is signed
    again.start()
    again.stop()
    assert whole(store, tmp_path) == 5
    assert (tmp_path / FOLDER / "audit.key").stat().st_mode & 0o077 == 0


def test_many_records_are_signed_without_waiting_for_the_minute(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("coordinator.auditor.CHECKPOINT_S", 3600.0)
    auditor = Auditor(store, tmp_path)
    auditor._look()
    collecting(store)
    auditor._look()
    assert whole(store, tmp_path) == 1
    for number in range(CHECKPOINT_EVERY):
        store.add_recurring(
            request_id=f"{number}", submitted_by="grace", spec_json="{}", due_unix_ms=0
        )
    auditor._look()
    assert whole(store, tmp_path) == CHECKPOINT_EVERY + 4


def test_a_participant_whose_chain_goes_back_is_remembered_and_explained(
    store: Store, tmp_path: Path
) -> None:
    for seq in (3, 3, 7):
        assert store.take_anchor("a", Head(seq, "a" * 64)).alarm == ""
    store.take_anchor("b", Head(1, "b" * 64))
    alarm = store.take_anchor("a", Head(4, "c" * 64)).alarm
    assert "went back from record 7 " in alarm
    assert store.take_anchor("a", Head(5, "d" * 64)).alarm == alarm
    assert {name: anchor.seq for name, anchor in store.anchors().items()} == {"a": 5, "b": 1}
    seen = [(r["act"], r["obj"], r["data"]["seq"]) for r in records(store)[1:]]
    assert seen == [("anchor.seen", "a", 3), ("anchor.seen", "b", 1), ("anchor.alarm", "a", 4)]
    facts = store.facts({"a": Seen(online=True, alarm=alarm), "b": Seen(online=True)})
    first, *_ = explain("a", facts, 0)
    assert alarm in first.says
    assert "audit export" in first.do
    assert "went back" not in explain("b", facts, 0)[0].says
    whole(store, tmp_path)
