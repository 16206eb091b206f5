"""A local fusion end to end: one pivot directory, the same twice, and it goes on where it was."""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM

from cofuse import local_fusion
from cofuse.local_check import Checked, check
from cofuse.local_fusion import LocalFusionError, fuse_locally, lay_down
from cofuse.local_sources import make_merged
from cofuse.local_spec import load_local_spec
from coordinator.merging import copies_as_deltas, write_merged
from protos.public_sets import read_prompts
from protos.spec import SpecError
from tests.cofuse.local_models import MERGE, SPEC, lay_out, write_spec

FILES = {
    *("config.json", "generation_config.json", "model.safetensors", "tokenizer.json"),
    *("tokenizer_config.json", "README.md", "lineage.json", "evals.json", "losses.json"),
    *("SHA256SUMS", "round.yaml"),
}
TASKS = ("heart_text", "nerve_text", "nerve_choice")
"""For lm-eval; it has lettered questions of its own."""
# One worker: the fixture that all need is made once.
Events = list[tuple[str, dict[str, Any]]]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return lay_out(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def fused(models: Path) -> tuple[Path, Events]:
    """One unified fusion, its work kept."""
    return models / "out", run(models, SPEC, models / "out", models / "work")


def checked_of(models: Path, values: dict[str, Any]) -> Checked:
    return check(load_local_spec(write_spec(models, values)))


def run(models: Path, values: dict[str, Any], out: Path, work: Path) -> Events:
    checked, events = checked_of(models, values), []
    job = fuse_locally(checked, work, workers=1, on_event=lambda k, b: events.append((k, b)))
    lay_down(checked, job, out)
    return events


def phases(events: Events) -> set[str]:
    return {str(body.get("phase", kind)) for kind, body in events}


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.slow
def test_the_pivot_directory_is_a_rounds(fused: tuple[Path, Events]) -> None:
    out, events = fused
    names = {path.name for path in out.iterdir()}
    tasks = {f"cofuse_{name}.{end}" for name in TASKS for end in ("yaml", "jsonl")}
    assert names == FILES | tasks | {"lm_eval_results.json"}
    assert phases(events) == {"extract", "score", "train", "fused", "evaluate"}
    listed = [line.split("  ") for line in (out / "SHA256SUMS").read_text().splitlines()]
    assert {name for _, name in listed} == names - {"SHA256SUMS"}
    assert all(digest(out / name) == wanted for wanted, name in listed)
    assert AutoModelForCausalLM.from_pretrained(out).config.vocab_size == 300
    evals = json.loads((out / "evals.json").read_text())
    assert list(evals["bpb"]) == ["base", "expert:heart", "expert:nerve", "unified"]
    assert set(evals["accuracy"]["unified"]) == {"nerve"}
    for measure in ("letter", "written"):
        assert list(evals[measure]) == list(evals["bpb"])
        assert set(evals[measure]["unified"]) == {"exam"}
    assert evals["questions"] == {"nerve": 1, "exam": 1}
    assert "Examination questions, by the likeliest letter" in (out / "README.md").read_text()
    assert len(json.loads((out / "losses.json").read_text())["unified"]) == 3


@pytest.mark.slow
def test_lineage_tells_names_and_digests_and_nothing_of_this_machine(
    models: Path, fused: tuple[Path, Events]
) -> None:
    lineage = json.loads((fused[0] / "lineage.json").read_text())
    assert (lineage["name"], lineage["parent"], lineage["round_id"]) == ("out", "pivot", "local")
    assert lineage["parent_weights_sha256"] == digest(models / "pivot" / "model.safetensors")
    assert lineage["spec"]["prompts"] == f"sha256:{digest(models / 'prompts.jsonl')}"
    assert lineage["spec"]["sources"] == {"heart": "heart", "nerve": "nerve"}
    assert not {"participants", "quorum", "deadline_minutes"} & lineage["spec"].keys()
    for name in ("lineage.json", "README.md"):
        assert str(models) not in (fused[0] / name).read_text()
    assert "# out" in (fused[0] / "README.md").read_text()


@pytest.mark.slow
def test_the_estimate_of_a_contribution_is_its_size(
    models: Path, fused: tuple[Path, Events]
) -> None:
    checked = checked_of(models, SPEC)
    lineage = json.loads((fused[0] / "lineage.json").read_text())
    for source in checked.sources:
        size = lineage["contributions"][source.name]["size_bytes"]
        assert source.contribution_bytes is not None
        assert source.model is not None
        # The vocabulary's bytes and the documents' offsets are beside the positions.
        extra = 40 * source.model.vocabulary + 8 * (checked.documents + 1) + 4096
        assert 0 <= size - source.contribution_bytes <= extra


@pytest.mark.slow
def test_a_finished_fusion_is_laid_down_again_without_work(
    models: Path, fused: tuple[Path, Events], tmp_path: Path
) -> None:
    assert phases(run(models, SPEC, tmp_path / "again", models / "work")) == set()
    assert digest(tmp_path / "again" / "model.safetensors") == digest(
        fused[0] / "model.safetensors"
    )


def test_two_fusions_in_one_work_folder_are_kept_apart(models: Path, tmp_path: Path) -> None:
    with local_fusion._alone(tmp_path), pytest.raises(BlockingIOError):
        run(models, SPEC, tmp_path / "out", tmp_path)
    assert not (tmp_path / "out").exists()


def test_a_failed_child_gives_its_last_word_and_its_log(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local_fusion, "SOURCES", "cofuse.nowhere")
    with pytest.raises(LocalFusionError, match=r"status 1: .*No module.*sources\.log"):
        run(models, SPEC, tmp_path / "out", tmp_path / "work")


def test_what_decides_the_result_names_the_job_and_nothing_else(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs: list[str] = []
    monkeypatch.setattr(local_fusion, "_run_child", lambda *_: None)
    monkeypatch.setattr(local_fusion, "run_job", lambda job, **_: jobs.append(job.directory.name))

    def job_of(**change: Any) -> str:
        checked = checked_of(models, {**SPEC, **change})
        fuse_locally(checked, tmp_path, workers=1, on_event=lambda k, b: None)
        return jobs[-1]

    first = job_of()
    assert job_of(sources=dict(reversed(SPEC["sources"].items()))) == first
    longer = {**SPEC["training"], "steps": 4}
    others = [job_of(seed=1), job_of(training=longer), job_of(distill_weight=0.1)]
    others += [job_of(pivot="pivot-1"), job_of(sources={**SPEC["sources"], "heart": "nerve"})]
    assert len({first, *others}) == 6


@pytest.mark.slow
@pytest.mark.parametrize("lost", ["result", "result runs", "everything"])
def test_whatever_is_lost_the_same_seed_gives_the_same_bits(
    models: Path, fused: tuple[Path, Events], tmp_path: Path, lost: str
) -> None:
    if lost != "everything":
        shutil.copytree(models / "work", tmp_path / "work", symlinks=True)
        job = next((tmp_path / "work").glob("job-*"))
        for name in lost.split():
            shutil.rmtree(job / name)
    events = run(models, SPEC, tmp_path / "out", tmp_path / "work")
    again = {"result": set(), "result runs": {"train"}, "everything": {"extract", "score", "train"}}
    assert phases(events) == again[lost] | {"fused", "evaluate"}
    for name in ("model.safetensors", "evals.json", "losses.json"):
        assert digest(tmp_path / "out" / name) == digest(fused[0] / name)


@pytest.mark.slow
def test_a_contribution_file_stands_for_its_model(
    models: Path, fused: tuple[Path, Events], tmp_path: Path
) -> None:
    checked = checked_of(models, SPEC)
    rows = [local_fusion._wanted(checked, s, models / "work" / "sources") for s in checked.sources]
    sources = {row.name: str(row.made) for row in rows}
    events = run(models, {**SPEC, "sources": sources}, tmp_path / "out", tmp_path / "work")
    assert phases(events) == {"train", "fused", "evaluate"}
    assert digest(tmp_path / "out" / "model.safetensors") == digest(fused[0] / "model.safetensors")


@pytest.mark.slow
def test_a_linear_merge_is_the_mean_of_the_models(models: Path, tmp_path: Path) -> None:
    run(models, MERGE, tmp_path / "out", tmp_path / "work")
    out, *parts = (
        load_file(folder / "model.safetensors")
        for folder in (tmp_path / "out", models / "pivot-1", models / "pivot-2")
    )
    for name, value in out.items():
        mean = (parts[0][name].astype("f8") + parts[1][name].astype("f8")) / 2
        assert abs(value - mean).max() < 1e-6
    evals = json.loads((tmp_path / "out" / "evals.json").read_text())
    assert list(evals["bpb"]) == ["base", "expert:first", "expert:second", "weights"]
    lineage = json.loads((tmp_path / "out" / "lineage.json").read_text())
    assert lineage["contributions"]["first"]["sha256"] == digest(
        models / "pivot-1" / "model.safetensors"
    )
    assert "training" not in lineage["spec"]


def test_a_fisher_merge_listens_to_whom_the_prompts_depend_on(models: Path, tmp_path: Path) -> None:
    """The streamed merge of the child is the one that a round's worker makes in memory."""
    how = {"merge": "fisher", "prompts": "prompts.jsonl", "training": SPEC["training"]}
    checked = checked_of(models, {**MERGE, **how})
    task = {
        "merged": tmp_path / "runs" / "weights",
        "pivot": models / "pivot",
        "prompts": models / "prompts.jsonl",
        "sources": [{"name": n, "path": str(p)} for n, p in checked.spec.sources.items()],
        "spec": checked.spec.round.model_dump(mode="json"),
    }
    make_merged(json.loads(json.dumps(task, default=str)))
    base = load_file(models / "pivot" / "model.safetensors")
    copies = copies_as_deltas(models / "pivot", checked.spec.sources)
    texts = read_prompts(models / "prompts.jsonl")
    write_merged(checked.spec.round, models / "pivot", copies, texts, tmp_path / "merged")
    streamed, made = (
        load_file(tmp_path / name / "model.safetensors") for name in ("runs/weights", "merged")
    )
    name = "model.layers.0.mlp.down_proj.weight"
    assert abs(streamed[name] - made[name]).max() < 1e-5
    mean = base[name] + (copies["first"][name] + copies["second"][name]) / 2
    assert abs(made[name] - mean).max() > 1e-3


def test_a_fisher_merge_without_prompts_is_refused(models: Path) -> None:
    with pytest.raises(SpecError, match=r"fuse.yaml:\d+: merge: fisher .* prompt set"):
        checked_of(models, {**MERGE, "merge": "fisher"})


@pytest.mark.slow
def test_pairwise_makes_a_copy_for_each_source_and_merges_them(
    models: Path, fused: tuple[Path, Events], tmp_path: Path
) -> None:
    events = run(models, {**SPEC, "method": "pairwise"}, tmp_path / "out", models / "work")
    assert {body["run"] for _, body in events if body.get("phase") == "train"} == {
        "pairwise-heart",
        "pairwise-nerve",
    }
    # The contributions are those of the unified fusion: nobody was asked again.
    assert "extract" not in phases(events)


def test_the_examples_differ_from_what_is_tested_here_in_paths_and_numbers_only() -> None:
    examples = Path(__file__).parents[2] / "examples"
    known = {**SPEC, **MERGE}
    for path in examples.glob("fuse-*.yaml"):
        extra = set(yaml.safe_load(path.read_text())) - known.keys()
        of_pairs = {"pairs", "preference"}  # tested in test_local_pairs.py
        assert extra <= {"loss", "routing", "distill_weight", "controls", "seed", *of_pairs}
