"""Work in hand survives whatever ends the process."""

import os
from pathlib import Path

import pytest

from participant import durable, spool
from participant.durable import is_broken, is_full, only_one, write_durably
from participant.spool import Spool
from protos.messages import Assignment, FileRef, Report
from protos.spec import RoundSpec

SHA = "a" * 64


def assignment(round_id: str = "rnd-1", attempt: int = 1, seed: int = 0) -> Assignment:
    spec = RoundSpec.model_validate(
        {
            "name": "first",
            "pivot": "pivot-0",
            "participants": ("st-mary",),
            "kind": "logits",
            "method": "unified",
            "prompts": f"sha256:{SHA}",
            "top_k": 4,
            "seed": seed,
            "training": {"steps": 1, "lr": 0.001},
        }
    )
    return Assignment(
        round_id=round_id,
        attempt=attempt,
        submitted_by="ada",
        spec=spec,
        prompts=FileRef(name="prompts.jsonl", sha256=SHA, size_bytes=1),
        pivot_sha256=SHA,
        deadline_unix_ms=1,
    )


def report(round_id: str = "rnd-1") -> Report:
    return Report(round_id=round_id, attempt=1, status="failed", detail="x")


def contribution(folder: Path) -> Path:
    path = folder / "logits.safetensors"
    path.write_bytes(b"bytes")
    return path


def test_each_step_is_there_after_a_restart(tmp_path: Path) -> None:
    first = Spool(tmp_path / "spool")
    entry = first.accept(assignment())
    assert Spool(tmp_path / "spool").unfinished() == [entry]
    entry = first.made(entry, contribution(tmp_path), SHA)
    assert Spool(tmp_path / "spool").unfinished()[0].made == entry.made
    entry = first.answer(entry, report())
    again = Spool(tmp_path / "spool")
    assert again.unfinished() == []
    assert again.get("rnd-1") == entry
    again.drop("rnd-1")
    assert Spool(tmp_path / "spool").get("rnd-1") is None


def test_a_new_attempt_takes_the_work_up_where_it_stands(tmp_path: Path) -> None:
    work = Spool(tmp_path / "spool")
    entry = work.made(work.accept(assignment()), contribution(tmp_path), SHA)
    again = work.accept(assignment(attempt=2))
    assert again.made == entry.made
    assert again.assignment.attempt == 2
    # The first attempt's worker, which knows nothing of the second, ends and reports.
    assert work.answer(entry, report()).assignment.attempt == 2


def test_other_work_under_a_known_name_begins_anew_and_takes_no_old_result(tmp_path: Path) -> None:
    work = Spool(tmp_path / "spool")
    old = work.made(work.accept(assignment()), contribution(tmp_path), SHA)
    other = work.accept(assignment(seed=1))
    assert other.made is None
    assert work.answer(old, report()).report is None
    assert work.unfinished() == [other]


def test_answered_rounds_are_forgotten_one_day_and_open_ones_never(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spool, "KEEP", 2)
    work = Spool(tmp_path / "spool")
    waiting = work.accept(assignment("rnd-0"))
    for number in range(1, 5):
        entry = work.accept(assignment(f"rnd-{number}"))
        work.answer(entry, report(entry.round_id))
    again = Spool(tmp_path / "spool")
    assert again.unfinished() == [waiting]
    assert [n for n in range(1, 5) if again.get(f"rnd-{n}")] == [3, 4]


def test_an_entry_that_cannot_be_read_is_set_aside(tmp_path: Path) -> None:
    Spool(tmp_path / "spool").accept(assignment())
    (tmp_path / "spool" / "rnd-2.json").write_text("{", encoding="utf-8")
    assert [entry.round_id for entry in Spool(tmp_path / "spool").unfinished()] == ["rnd-1"]
    assert (tmp_path / "spool" / "rnd-2.unreadable").exists()


@pytest.mark.parametrize("name", ["../x", "a/b", "", "RND", "x" * 41, "a\n"])
def test_a_round_id_is_never_a_path(name: str) -> None:
    with pytest.raises(ValueError, match="round_id"):
        assignment(name)


def test_a_crash_at_any_write_leaves_the_old_content_or_the_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x.json"

    class PowerCutError(Exception):
        pass

    for calls_before_the_cut in range(4):
        write_durably(path, "old")
        left = [calls_before_the_cut]

        def fsync(descriptor: int, left: list[int] = left) -> None:
            if left[0] == 0:
                raise PowerCutError
            left[0] -= 1

        with monkeypatch.context() as patch:
            patch.setattr(durable.os, "fsync", fsync)
            try:
                write_durably(path, "new")
                assert calls_before_the_cut >= 2  # the file's bytes, then its name
            except PowerCutError:
                pass
        assert path.read_text(encoding="utf-8") in ("old", "new")


def test_the_bytes_are_synced_before_the_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    fsync, rename = os.fsync, Path.rename
    monkeypatch.setattr(
        durable.os, "fsync", lambda d: (order.append(os.readlink(f"/proc/self/fd/{d}")), fsync(d))
    )
    monkeypatch.setattr(Path, "rename", lambda s, t: (order.append("rename"), rename(s, t))[1])
    write_durably(tmp_path / "x", "y")
    assert order == [str(tmp_path / ".x.new"), "rename", str(tmp_path)]


def test_a_full_disk_is_known_by_number_by_words_and_through_other_errors() -> None:
    with pytest.raises(OSError, match="No space") as caught:
        Path("/dev/full").write_text("x", encoding="utf-8")
    assert is_full(caught.value)
    assert not is_broken(caught.value)
    assert is_full(RuntimeError("I/O error: No space left on device (os error 28)"))
    outer = ValueError("saving failed")
    outer.__cause__ = caught.value
    assert is_full(outer)
    assert not is_full(ValueError("x"))
    assert is_broken(OSError(5, "Input/output error"))


def test_a_second_daemon_is_kept_off_the_folder(tmp_path: Path) -> None:
    with (
        only_one(tmp_path),
        pytest.raises(BlockingIOError, match="stop it first"),
        only_one(tmp_path),
    ):
        pass
    with only_one(tmp_path):
        pass
