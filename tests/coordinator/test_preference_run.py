"""A preference fusion in the worker: it goes on where it was, and tells how it was judged."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from coordinator.fuse_job import FuseJob
from coordinator.fusion_runs import plan
from coordinator.preference_run import prefer, settings_of, told
from fp8.train import Progress
from fusion.models import ModelSpec, build_model, train_tokenizer
from fusion.pair_file import PreferenceError, read_pairs
from fusion.pair_scores import write_scores
from fusion.pair_scoring import score_pairs
from protos.spec import RoundSpec

CODES = [f"A{n}" for n in range(8)]
ROWS = [
    {"prompt": f"Code {code} is", "chosen": " known.", "rejected": " new.", "domain": "ab"[n % 2]}
    for n, code in enumerate(CODES)
]
TOKENIZER = train_tokenizer(["Code A1 is known, new."] * 3, 270)
SPEC: dict[str, Any] = {
    "name": "x",
    "pivot": "pivot-0",
    "participants": ("one", "two"),
    "kind": "pairs",
    "method": "preference",
    "pairs": "sha256:" + "0" * 64,
    "preference": {"held_out": 0.25},
    "controls": ("dpo",),
    "training": {"steps": 3, "batch_size": 2, "lr": 0.003, "warmup_steps": 1},
}


def model(seed: int) -> Any:
    shape = ModelSpec(
        architecture="llama", hidden_size=16, layers=1, heads=2, vocab_size=len(TOKENIZER)
    )
    return build_model(shape, seed)


@pytest.fixture
def job(tmp_path: Path) -> FuseJob:
    lines = [json.dumps(row) for row in ROWS]
    (tmp_path / "pairs.jsonl").write_text("\n".join([*lines, "{broken", lines[0]]))
    pairs = read_pairs(tmp_path / "pairs.jsonl").pairs
    for seed, name in enumerate(("one", "two"), start=1):
        scores = score_pairs(model(seed), TOKENIZER, pairs)
        write_scores(tmp_path / name, scores, pairs, model_sha256="a" * 64)
    made = FuseJob(
        directory=tmp_path,
        round_id="local",
        pivot_name="x",
        spec=RoundSpec.model_validate(SPEC),
        pivot_files={},
        contributions={name: tmp_path / name for name in ("one", "two")},
        reports={},
        prompts=None,
        evals=None,
        pairs=tmp_path / "pairs.jsonl",
    )
    made.save()
    return FuseJob.load(tmp_path)


def run_all(job: FuseJob) -> dict[str, list[float]]:
    steps: list[Progress] = []
    runs = plan(job.spec, ("one", "two"))
    for run in runs:
        (job.directory / "runs" / run.name).mkdir(parents=True, exist_ok=True)
    return {run.name: prefer(job, run, (model(0), TOKENIZER), steps.append) for run in runs}


def test_the_pivot_learns_with_the_sources_and_the_control_without_them(job: FuseJob) -> None:
    losses = run_all(job)
    assert [run.sources for run in plan(job.spec, ("one", "two"))] == [("one", "two"), ()]
    assert losses["dpo"][0] == pytest.approx(math.log(2), abs=1e-3)
    assert losses["preference"][0] > losses["dpo"][0]
    found = told(job, plan(job.spec, ("one", "two")))
    assert set(found["preference"]) == {"base", "dpo", "preference", "expert:one", "expert:two"}
    held = found["pairs"]["held_out"]
    assert sum(held.values()) == 2
    assert all(set(row) == set(held) for row in found["preference"].values())
    assert found["pairs"]["learned"] == 6
    assert found["pairs"]["skipped"] == {"no JSON": 1, "stands there twice": 1}
    judged = json.loads((job.directory / "runs/preference/judgement.json").read_text())
    assert set(judged) == {"one", "two"}
    assert sum(row["share"] for row in judged.values()) == pytest.approx(1)
    # Done twice, from its checkpoint or from the beginning, it is the same run.
    assert run_all(job) == losses


def test_scores_of_other_pairs_are_refused(job: FuseJob) -> None:
    assert job.pairs is not None
    rows = job.pairs.read_text().splitlines()
    job.pairs.write_text("\n".join(rows[1:8]))
    with pytest.raises(PreferenceError, match="score the pairs of this round"):
        run_all(job)


def test_the_specs_numbers_reach_the_run() -> None:
    words = {"beta": 0.5, "offset": 2.0, "fusion": "mean", "clip": False, "length": "none"}
    words["judge"] = "experts"
    more = {"preference": words, "precision": "fp8", "seed": 7}
    found = settings_of(RoundSpec.model_validate({**SPEC, **more}))
    for key, value in (words | {"fp8": True, "batch_size": 2}).items():
        assert getattr(found, key) == value
    assert (found.train.steps, found.train.lr, found.train.seed) == (3, 0.003, 7)
