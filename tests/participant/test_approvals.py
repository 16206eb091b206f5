"""A release waits until a person decides about exactly its bytes; silence is a no."""

import json
from pathlib import Path
from typing import Any

import pytest

from participant.approvals import TTL_MS, ApprovalError, Approvals, Release

SHA = "ab" * 32


class Clock:
    now = 1_000_000

    def __call__(self) -> int:
        return self.now


def release(round_id: str = "rnd-1", **change: Any) -> Release:
    values = {
        "round_id": round_id,
        "purpose": "radiology",
        "submitted_by": "ada",
        "kind": "logits",
        "rule": "allow 1: radiology",
        "top_k": 16,
        "positions": 10,
        "size_bytes": 5,
        "sha256": SHA,
        "scores": False,
        "asked_unix_ms": 1_000_000,
        **change,
    }
    return Release.model_validate(values)


@pytest.fixture
def desk(tmp_path: Path) -> Approvals:
    return Approvals(tmp_path / "data" / "approvals", Clock())


def test_a_decision_is_found_by_another_process_and_is_about_the_bytes_that_were_shown(
    tmp_path: Path, desk: Approvals
) -> None:
    asked = desk.ask(release())
    other = Approvals(tmp_path / "data" / "approvals", Clock())
    other.decide(other.find("rnd-1"), approved=True, by="grace")
    found = desk.decision(asked)
    assert found is not None
    assert (found.approved, found.by) == (True, "grace")
    # Other bytes of the same round, even under the same short name, are not approved.
    assert desk.decision(release(sha256="cd" * 32)) is None
    assert desk.decision(release(sha256=SHA[:8] + "0" * 56)) is None


def test_asking_again_starts_no_new_wait(desk: Approvals) -> None:
    first = desk.ask(release())
    assert desk.ask(release(asked_unix_ms=2_000_000)) == first


def test_silence_is_a_no_after_72_hours_and_a_decision_never_expires(desk: Approvals) -> None:
    silent, heard = desk.ask(release()), desk.ask(release("rnd-2"))
    desk.decide(heard, approved=True, by="grace")
    clock: Any = desk._clock
    clock.now += TTL_MS - 1
    assert desk.waiting() == [silent]
    clock.now += 1
    assert desk.waiting() == []
    assert (desk.expired(silent), desk.expired(heard)) == (True, False)
    with pytest.raises(ApprovalError, match="found no release"):
        desk.decide(silent, approved=True, by="grace")


def test_a_release_is_decided_about_once_and_not_by_whoever_asked_for_it(desk: Approvals) -> None:
    asked = desk.ask(release())
    with pytest.raises(ApprovalError, match="whoever asks does not approve"):
        desk.decide(asked, approved=True, by="ada")
    desk.decide(asked, approved=False, by="grace", why="too much")
    with pytest.raises(ApprovalError, match="wanted one of: none"):
        desk.decide(asked, approved=True, by="grace")
    found = desk.decision(asked)
    assert found is not None
    assert (found.approved, found.why) == (False, "too much")


def test_a_damaged_decision_is_none(tmp_path: Path, desk: Approvals) -> None:
    asked = desk.ask(release())
    desk.decide(asked, approved=True, by="grace")
    (path,) = (tmp_path / "data" / "approvals").glob("*.decision.json")
    path.write_text(path.read_text().replace("true", "yes"))
    assert desk.decision(asked) is None


def test_nobody_is_asked_about_a_round_that_is_over_and_what_was_decided_stays(
    tmp_path: Path, desk: Approvals
) -> None:
    desk.ask(release("rnd-1"))
    decided = desk.ask(release("rnd-2"))
    desk.decide(decided, approved=True, by="grace")
    other = desk.ask(release("rnd-1-b"))
    for round_id in ("rnd-1", "rnd-2", "rnd-3"):
        desk.close(round_id)
    assert desk.waiting() == [other]
    assert desk.decision(decided) is not None
    assert len(list((tmp_path / "data" / "approvals").glob("rnd-2-*"))) == 2


def _decision_file(tmp_path: Path) -> Path:
    (path,) = (tmp_path / "data" / "approvals").glob("*.decision.json")
    return path


@pytest.mark.parametrize(
    "change",
    [
        {"signed": ""},
        {"approved": True},
        {"by": "somebody else"},
        {"why": "because"},
        {"unix_ms": 7},
    ],
    ids=lambda change: next(iter(change)),
)
def test_a_decision_that_the_approver_did_not_sign_as_it_stands_is_none(
    tmp_path: Path, desk: Approvals, change: dict[str, Any]
) -> None:
    asked = desk.ask(release())
    desk.decide(asked, approved=False, by="grace", why="too much")
    assert desk.decision(asked) is not None
    path = _decision_file(tmp_path)
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    assert desk.decision(asked) is None


def test_a_decision_under_another_key_is_none_and_cannot_be_taken(
    tmp_path: Path, desk: Approvals
) -> None:
    asked = desk.ask(release())
    thief = Approvals(tmp_path / "elsewhere" / "data" / "approvals", Clock())
    thief.decide(thief.ask(release()), approved=True, by="grace")
    desk.decide(asked, approved=False, by="grace")
    stolen = tmp_path / "elsewhere" / "data" / "approvals" / _decision_file(tmp_path).name
    _decision_file(tmp_path).write_bytes(stolen.read_bytes())
    assert desk.decision(asked) is None
    other = Approvals(
        tmp_path / "data" / "approvals", Clock(), key=tmp_path / "elsewhere" / "approver.pem"
    )
    with pytest.raises(ApprovalError, match="another key than"):
        other.decide(other.find("rnd-1"), approved=True, by="grace")


def test_the_approvers_key_may_lie_where_the_guard_never_looks(tmp_path: Path) -> None:
    key, folder = tmp_path / "usb" / "approver.pem", tmp_path / "data" / "approvals"
    asked = Approvals(folder, Clock()).ask(release())
    Approvals(folder, Clock(), key=key).decide(asked, approved=True, by="grace")
    assert not (tmp_path / "approver.pem").exists()
    assert Approvals(folder, Clock()).decision(asked) is not None
