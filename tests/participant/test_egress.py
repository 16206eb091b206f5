"""What left is written down, in order, and adds up; so is what did not leave."""

import json
from pathlib import Path

import pytest

from participant.egress import FOLDER, POLICY, EgressLog, read_anchor, read_records, releases
from trust.audit_files import check, segments
from trust.chain import Head


def test_every_release_stays_written_down_with_who_allowed_it(tmp_path: Path) -> None:
    for number in range(3):
        log = EgressLog(tmp_path, "st-mary")
        log.append(
            round_id="rnd-1", what="logits", size_bytes=number, sha256="x", rule=f"rule {number}"
        )
        log.close()
    found = list(releases(tmp_path))
    assert [(one.size_bytes, one.rule) for one in found] == [(n, f"rule {n}") for n in range(3)]
    assert {(one.round, one.what, one.approver, one.sha256) for one in found} == {
        ("rnd-1", "logits", "policy", "x")
    }
    assert EgressLog(tmp_path, "st-mary").total_bytes() == 3
    verdict = check(tmp_path / FOLDER)
    assert (verdict.broken, verdict.signed) == (None, 3)


def test_a_release_is_on_disk_before_append_returns(tmp_path: Path) -> None:
    head = EgressLog(tmp_path, "a").append(round_id="r", what="logits", size_bytes=1, sha256="x")
    assert check(tmp_path / FOLDER).head == head


def test_a_refusal_is_written_down_and_is_no_release(tmp_path: Path) -> None:
    log = EgressLog(tmp_path, "st-mary")
    log.append(round_id="rnd-1", what="logits", size_bytes=7, sha256="x")
    log.refuse(round_id="rnd-2", what="weights", why="refused by policy.toml: ship_weights")
    assert [(one.round, one.allowed) for one in log.releases()] == [
        ("rnd-1", True),
        ("rnd-2", False),
    ]
    assert log.releases()[1].rule == "refused by policy.toml: ship_weights"
    assert log.total_bytes() == EgressLog(tmp_path, "st-mary").total_bytes() == 7


def test_another_policy_is_news_and_the_same_is_none(tmp_path: Path) -> None:
    for sha256 in ("a", "a", "b", "a"):
        EgressLog(tmp_path, "st-mary").policy(sha256)
    assert [record["obj"] for record in read_records(tmp_path, POLICY)] == ["a", "b", "a"]


def test_a_coordinator_whose_chain_goes_back_is_an_alarm_that_stays(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for seq in (5, 5, 9):
        EgressLog(tmp_path, "st-mary").witness(Head(seq, "a" * 64))
    assert not caplog.records
    assert EgressLog(tmp_path, "st-mary").alarm() == ""
    for seq in (7, 8):
        EgressLog(tmp_path, "st-mary").witness(Head(seq, "b" * 64))
    [record] = caplog.records
    assert (record.levelname, "from record 9 " in record.message) == ("CRITICAL", True)
    assert "went back from record 9 " in EgressLog(tmp_path, "st-mary").alarm()
    found = read_anchor(tmp_path)
    assert found is not None
    assert (found.seq, "went back from record 9 " in found.alarm) == (8, True)
    seen = list(read_records(tmp_path, "anchor.seen", "anchor.alarm"))
    assert [(r["act"], r["data"]["seq"]) for r in seen] == [("anchor.seen", 5), ("anchor.alarm", 7)]


def test_what_is_no_head_is_passed_over(tmp_path: Path) -> None:
    EgressLog(tmp_path, "st-mary").witness(Head(0, ""))
    assert read_anchor(tmp_path) is None


def _old_line(number: int) -> str:
    line = {"time_unix_ms": 1_700_000_000_000 + number, "round": f"rnd-{number}"}
    return json.dumps({**line, "what": "logits", "size_bytes": number, "sha256": "x"}) + "\n"


def test_the_log_of_an_older_release_is_taken_over_whole_and_once(tmp_path: Path) -> None:
    old = tmp_path / "egress.jsonl"
    old.write_text("".join(_old_line(number) for number in (1, 2)) + '{"round": "rnd-', "utf-8")
    kept = old.read_bytes()
    for _ in range(2):
        log = EgressLog(tmp_path, "st-mary")
        assert [(one.round, one.size_bytes) for one in log.releases()] == [
            ("rnd-1", 1),
            ("rnd-2", 2),
        ]
        assert log.total_bytes() == 3
    assert log.releases()[0].time == "2023-11-14T22:13:20.001Z"
    assert not old.exists()
    assert (tmp_path / "egress.jsonl.taken-over").read_bytes() == kept


def test_a_crash_while_it_is_taken_over_loses_nothing_and_doubles_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = tmp_path / "egress.jsonl"
    old.write_text("".join(_old_line(number) for number in range(4)), "utf-8")
    with monkeypatch.context() as patch:  # the chain has it, and the old file is still in place
        patch.setattr(Path, "rename", lambda *_: (_ for _ in ()).throw(InterruptedError))
        with pytest.raises(InterruptedError):
            EgressLog(tmp_path, "st-mary")
    segment = segments(tmp_path / FOLDER)[0]
    (tmp_path / FOLDER / "checkpoints.jsonl").unlink()
    whole = segment.read_bytes()
    for size in (0, len(whole) // 3, len(whole) - 5, len(whole)):
        segment.write_bytes(whole[:size])
        old.write_text("".join(_old_line(number) for number in range(4)), "utf-8")
        rounds = [one.round for one in EgressLog(tmp_path, "st-mary").releases()]
        assert rounds == ["rnd-0", "rnd-1", "rnd-2", "rnd-3"]
        (tmp_path / FOLDER / "checkpoints.jsonl").unlink()


def test_what_the_canary_gate_measured_is_on_the_record_of_what_left(tmp_path: Path) -> None:
    log = EgressLog(tmp_path, "st-mary")
    one = {"round_id": "rnd-1", "what": "logits", "size_bytes": 7, "sha256": "a" * 64}
    log.append(**one, gates="auc 0.512")  # type: ignore[arg-type]
    log.append(**one)  # type: ignore[arg-type]
    assert [release.gates for release in log.releases()] == ["auc 0.512", ""]
