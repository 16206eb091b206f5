"""Which runs a spec asks for, and that a result appears whole or not at all."""

from pathlib import Path
from typing import Any

import pytest

from coordinator.fuse_job import FuseJob
from coordinator.fuse_worker import _whole
from coordinator.fusion_runs import plan
from coordinator.pivot_card import model_card, table
from protos.spec import RoundSpec


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
    card = model_card(lineage, {"bpb": scores, "accuracy": {}}, "unified")
    assert card.startswith("---\n")
    for text in ("2.000", "1.750", "**unified**", "pivot-0", "f" * 16, "top 16"):
        assert text in card
    assert "1.125" in table(scores, digits=3, mark="unified")
