"""The chain is believed, not a budget that was restored; and nothing lies open to be sent."""

from pathlib import Path

import pytest

from participant.budget import FILE, Ledger, Question
from participant.egress import EgressLog
from participant.policy import LogitLimits, PolicyRefusalError
from participant.promises import check
from participant.sandbox import SEALED
from tests.participant.test_guard import House, house, model
from trust.seal import MAGIC

__all__ = ["house", "model"]  # fixtures


def left(data: Path, round_id: str, what: str = "logits") -> None:
    EgressLog(data, "st-mary").append(round_id=round_id, what=what, size_bytes=7, sha256="a" * 64)


def budgeted(data: Path, round_id: str) -> None:
    asked = Question(round_id=round_id, kind="logits", model="m", prompt_set=round_id, positions=1)
    Ledger(data / FILE).reserve(asked, LogitLimits())


def test_what_left_is_in_the_budget_and_a_restored_one_is_found_out(tmp_path: Path) -> None:
    left(tmp_path, "rnd-1", what="report")  # costs nothing
    budgeted(tmp_path, "rnd-2")
    left(tmp_path, "rnd-2")
    older = (tmp_path / FILE).read_bytes()
    budgeted(tmp_path, "rnd-3")
    left(tmp_path, "rnd-3")
    assert check(tmp_path) == []
    (tmp_path / FILE).write_bytes(older)
    assert [(one.invariant, one.says) for one in check(tmp_path)] == [
        ("I6", "rnd-3 left and is not in the budget")
    ]
    (tmp_path / FILE).unlink()
    assert len(check(tmp_path)) == 2


def test_nothing_more_leaves_on_a_budget_that_was_restored(house: House) -> None:
    left(house.home / "data", "rnd-9")
    with pytest.raises(PolicyRefusalError, match="budget cannot be believed") as refused:
        house.release(house.guard(), house.entry())
    assert "rnd-9" in str(refused.value.here)
    assert "rnd-9" not in str(refused.value)
    assert house.made == 0


def test_what_may_be_sent_is_sealed(tmp_path: Path) -> None:
    (tmp_path / SEALED).mkdir()
    (tmp_path / SEALED / "rnd-1.sealed").write_bytes(MAGIC + b"rest")
    assert check(tmp_path) == []
    (tmp_path / SEALED / "rnd-2.plain").write_bytes(b"numbers")
    assert [one.invariant for one in check(tmp_path)] == ["I8"]


def test_what_is_about_to_be_sealed_lies_where_the_courier_cannot_look(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[str]] = []
    data = house.home / "data"
    guard, entry = house.guard(), house.entry()

    def look(plain: Path) -> None:
        seen.append([path.name for path in (data / SEALED).iterdir()])
        assert plain.parent == data / "guard"

    monkeypatch.setattr(guard, "_measure", lambda *asked: look(asked[-1]) or "")
    house.release(guard, entry)
    assert seen == [[]]
    assert not list((data / "guard").iterdir())


def test_what_a_killed_guard_left_open_is_gone_at_the_next_start(house: House) -> None:
    house.guard()
    left_over = [house.home / "data" / name / "rnd-1.plain" for name in ("guard", SEALED)]
    for path in left_over:
        path.write_bytes(b"numbers")
    house.guard()
    assert not any(path.exists() for path in left_over)
