"""Which runs a spec asks for, and that a result appears whole or not at all."""

import errno
import fcntl
import os
import threading
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import pytest
import torch

from coordinator import fuse_worker
from coordinator.fuse_job import TRY_AGAIN, FuseJob
from coordinator.fuse_worker import _whole
from coordinator.fusion_runs import plan
from coordinator.pivot_card import license_of, model_card, table
from protos.process import PARENT_VARIABLE
from protos.spec import RoundSpec
from trust.walls import Held


def spec(**change: Any) -> RoundSpec:
    values = {
        "name": "x",
        "pivot": "pivot-0",
        "participants": ("a", "b"),
        "kind": "logits",
        "method": "unified",
        "prompts": "p",
        "training": {"steps": 1, "lr": 0.1},
        **change,
    }
    return RoundSpec.model_validate(values)


def test_unified_is_one_run_and_pairwise_one_a_source() -> None:
    assert [run.sources for run in plan(spec(), ("a", "b"))] == [("a", "b")]
    pairs = plan(spec(method="pairwise"), ("a", "b"))
    assert [run.sources for run in pairs] == [("a",), ("b",)]
    assert plan(spec(kind="weights", method="merge"), ("a", "b")) == []


def test_the_control_learns_from_nobody_and_the_baseline_from_all() -> None:
    runs = {r.name: r for r in plan(spec(controls=("sft", "infifusion")), ("a", "b"))}
    assert (runs["sft"].changes["loss"], runs["sft"].sources) == ("none", ())
    baseline = runs["infifusion"]
    assert (baseline.changes["loss"], baseline.sources) == ("infifusion", ("a", "b"))


def test_a_job_reads_back_as_it_was_saved(tmp_path: Path) -> None:
    job = FuseJob(
        directory=tmp_path,
        round_id="rnd-1",
        pivot_name="pivot-1",
        spec=spec(),
        pivot_files={"config.json": tmp_path / "c"},
        contributions={"a": tmp_path / "a"},
        reports={"a": "{}"},
        prompts=tmp_path / "p",
        evals=None,
    )
    job.save()
    assert FuseJob.load(tmp_path) == job


def test_a_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    final = tmp_path / "result"

    def broken(partial: Path) -> None:
        partial.mkdir()
        (partial / "half").write_text("x")
        raise OSError("disk full")

    def whole(partial: Path) -> None:
        partial.mkdir()
        (partial / "all").write_text("x")

    with pytest.raises(OSError, match="disk full"):
        _whole(final, broken)
    assert not final.exists()
    _whole(final, whole)
    assert [path.name for path in final.iterdir()] == ["all"]


def test_the_model_card_shows_every_number_and_the_lineage() -> None:
    scores = {"base": {"heart": 2.0, "brain": 1.5}, "unified": {"heart": 1.25, "brain": 1.0}}
    lineage = {
        "name": "pivot-1",
        "parent": "pivot-0",
        "round_id": "rnd-1",
        "spec": {"name": "x", "kind": "logits", "method": "unified", "top_k": 16},
        "contributions": {"a": {"sha256": "f" * 64, "size_bytes": 7}},
    }
    card = model_card(lineage, {"bpb": scores, "accuracy": {}, "pivot": "unified"})
    assert card.startswith("---\n")
    for text in ("2.000", "1.750", "**unified**", "pivot-0", "f" * 16, "top 16"):
        assert text in card
    assert "lm-eval" not in card  # nothing to measure with lies beside it
    assert "1.125" in table(scores, digits=3, mark="unified")


@pytest.mark.parametrize(
    ("readme", "wanted"),
    [
        ("---\nlicense: apache-2.0\n---\n# x", "apache-2.0"),
        ("---\nlicense: [mit]\n---\n", ""),
        ("---\nlicense: !!python/name:os.system\n---\n", ""),
        ("---\nlicense: 'mit {{x}}'\n---\n", ""),
        ("---\n[\n---\n", ""),
        ("# no front matter", ""),
        ("", ""),
    ],
)
def test_the_parents_license_is_handed_on_where_it_is_plain(readme: str, wanted: str) -> None:
    assert license_of(readme) == wanted


def test_a_folder_is_on_disk_before_it_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a power cut a folder that is there is whole: no file in it is short."""
    synced = []
    sync = os.fsync

    def note(handle: int) -> None:
        synced.append(Path(f"/proc/self/fd/{handle}").resolve())
        sync(handle)

    def write(partial: Path) -> None:
        (partial / "deep").mkdir(parents=True)
        (partial / "deep" / "file").write_text("x")

    monkeypatch.setattr(os, "fsync", note)
    _whole(tmp_path / "result", write)
    partial = tmp_path / "result.partial"
    assert set(synced[:-1]) == {partial, partial / "deep", partial / "deep" / "file"}
    assert synced[-1] == tmp_path


@pytest.fixture
def lone_worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A job's folder; the worker runs in this process and must not change it."""
    monkeypatch.setattr(fuse_worker, "die_with_parent", lambda: None)
    monkeypatch.setattr(fuse_worker, "enter", lambda _: Held())
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)
    monkeypatch.setenv(PARENT_VARIABLE, "0")
    FuseJob(
        directory=tmp_path, round_id="rnd-1", pivot_name="pivot-1", spec=spec(),
        pivot_files={}, contributions={}, reports={}, prompts=None, evals=None,
    ).save()  # fmt: skip
    return tmp_path


def test_a_worker_waits_until_an_older_one_of_its_folder_is_gone(
    lone_worker: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun = threading.Event()
    monkeypatch.setattr(fuse_worker, "work", lambda _: begun.set())
    with (lone_worker / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        worker = threading.Thread(target=fuse_worker.main, args=([str(lone_worker)],))
        worker.start()
        assert not begun.wait(0.3)
    assert begun.wait(10)
    worker.join()


@pytest.mark.parametrize(
    ("error", "status"),
    [(OSError(errno.ENOSPC, "full"), TRY_AGAIN), (BrokenProcessPool(), TRY_AGAIN)],
)
def test_what_the_machine_lacks_is_told_from_what_the_job_does_wrong(
    lone_worker: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, status: int
) -> None:
    def fail(found: Exception) -> None:
        raise found

    monkeypatch.setattr(fuse_worker, "work", lambda _: fail(error))
    assert fuse_worker.main([str(lone_worker)]) == status
    monkeypatch.setattr(fuse_worker, "work", lambda _: fail(OSError(errno.EACCES, "no")))
    with pytest.raises(PermissionError):
        fuse_worker.main([str(lone_worker)])
