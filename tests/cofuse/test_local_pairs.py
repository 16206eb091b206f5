"""Preference as a method of a local fusion: the spec, the dry run, and a pivot directory."""

import json
from pathlib import Path
from typing import Any

import pytest

from cofuse.local_check import Checked, check
from cofuse.local_fusion import fuse_locally, lay_down
from cofuse.local_models import LocalInputError
from cofuse.local_sources import make_pair_scores
from cofuse.local_spec import PAIR_KEYS, load_local_spec
from fusion.pair_file import PreferenceError
from protos.spec import SpecError
from tests.cofuse.local_models import SPEC, lay_out, write_spec

ROWS = [
    {
        "prompt": f"The {kind} number {i}",
        "chosen": " narrows." if kind == "heart" else " carries a signal.",
        "rejected": " carries a signal." if kind == "heart" else " narrows.",
        "domain": kind,
    }
    for kind in ("heart", "nerve")
    for i in range(8)
]
PREFERENCE: dict[str, Any] = {
    "pivot": "pivot",
    "sources": {"heart": "heart", "nerve": "nerve"},
    "method": "preference",
    "pairs": "pairs.jsonl",
    "preference": {"held_out": 0.25},
    "training": {"steps": 3, "batch_size": 2, "lr": 0.003, "warmup_steps": 1},
    "controls": ["dpo"],
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = lay_out(tmp_path_factory.mktemp("models"))
    lines = [json.dumps(row) for row in ROWS]
    (folder / "pairs.jsonl").write_text("\n".join([*lines[:3], "{", *lines[3:]]) + "\n")
    return folder


def checked_of(models: Path, **change: Any) -> Checked:
    return check(load_local_spec(write_spec(models, {**PREFERENCE, **change})))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"top_k": 4}, r":\d+: method preference has no use for the key 'top_k'; known: name"),
        ({"beta": 1.0}, "unknown key 'beta'"),
        ({"preference": {"betta": 1.0}}, "'preference.betta'; did you mean 'beta'"),
        ({"preference": {"beta": 0.0}}, r":\d+: preference.beta: .*greater than 0"),
        ({"preference": {"beta": float("nan")}}, "beta"),
        ({"preference": {"held_out": 0.9}}, "held_out: "),
        ({"preference": {"judge": "me"}}, "judge: "),
        ({"controls": ["sft"]}, "controls: sft and kind 'pairs' do not go together"),
        (
            {"training": {**PREFERENCE["training"], "seq_len": 16}},
            "training.seq_len: pairs are read whole",
        ),
        ({"pairs": None}, "pairs"),
        ({"method": "unified"}, "method unified has no use for the key 'pairs'"),
        (
            {"method": ["preference"]},
            "method: found .*wanted unified, pairwise, merge or preference",
        ),
    ],
)
def test_what_the_spec_cannot_mean_is_refused(
    tmp_path: Path, change: dict[str, Any], says: str
) -> None:
    with pytest.raises(SpecError, match=says):
        load_local_spec(write_spec(tmp_path, {**PREFERENCE, **change}))


def test_the_example_is_read_and_every_key_is_documented() -> None:
    root = Path(__file__).parents[2]
    found = load_local_spec(root / "examples" / "fuse-preference.yaml")
    assert (found.round.method, found.round.kind) == ("preference", "pairs")
    page = (root / "docs" / "fuse.md").read_text()
    assert [key for key in PAIR_KEYS if f"`{key}`" not in page and f"{key}:" not in page] == []


def test_a_dry_run_tells_how_each_source_reads_the_pairs(models: Path, tmp_path: Path) -> None:
    checked = checked_of(models)
    facts = checked.facts()
    assert facts["pairs"]["learned"] + facts["pairs"]["held_out"] == len(ROWS)
    assert facts["pairs"]["skipped"] == [{"reason": "no JSON", "lines": 1, "first": [4]}]
    assert facts["training"]["epochs"] == pytest.approx(3 * 2 / 12, abs=1e-3)
    for row in facts["sources"]:
        assert row["pairs"]["tokens"] > len(ROWS) * row["pairs"]["chosen"]
        assert (row["pairs"]["longer"], row["pairs"]["agrees"]) == (0, None)
    # A file of scores stands for its model, and tells besides how often it agrees.
    heart = models / "heart"
    task = {"pivot": str(models / "pivot"), "pairs": str(models / "pairs.jsonl")}
    source = {"path": str(heart), "made": str(tmp_path / "heart.json"), "model_sha256": "a" * 64}
    make_pair_scores(task, source, lambda done, total: None)
    row, _ = checked_of(
        models, sources={"heart": str(tmp_path / "heart.json"), "nerve": "nerve"}
    ).facts()["sources"]
    assert (row["kind"], row["architecture"]) == ("scores", None)
    assert 0 <= row["pairs"]["agrees"] <= 1
    assert row["pairs"]["chosen"] == facts["sources"][0]["pairs"]["chosen"]
    assert row["contribution_bytes"] == (tmp_path / "heart.json").stat().st_size
    sources = {"heart": str(tmp_path / "heart.json")}
    with pytest.raises(LocalInputError, match="holds a scores contribution, and method unified"):
        check(load_local_spec(write_spec(models, {**SPEC, "sources": sources})))
    (tmp_path / "pairs.jsonl").write_text("\n".join(json.dumps(row) for row in ROWS[1:]))
    with pytest.raises(LocalInputError, match=r"sources\.heart: .*score the pairs of this round"):
        checked_of(models, sources=sources, pairs=str(tmp_path / "pairs.jsonl"))


def test_pairs_that_cannot_be_used_at_all_are_refused(models: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text("{\n")
    with pytest.raises(PreferenceError, match="no usable pair"):
        checked_of(models, pairs=str(tmp_path / "bad.jsonl"))
    with pytest.raises(LocalInputError, match="pairs: there is no file"):
        checked_of(models, pairs="nowhere.jsonl")


@pytest.mark.slow
def test_a_preference_fusion_makes_a_pivot_directory_and_goes_on_to_the_same_bits(
    models: Path, tmp_path: Path
) -> None:
    def run(out: Path, work: Path) -> set[str]:
        checked = checked_of(models, evals="evals.json")
        events: list[tuple[str, dict[str, Any]]] = []
        job = fuse_locally(checked, work, workers=1, on_event=lambda k, b: events.append((k, b)))
        lay_down(checked, job, out)
        return {str(body.get("phase", kind)) for kind, body in events}

    assert run(tmp_path / "out", tmp_path / "work") >= {"extract", "score", "train", "fused"}
    evals = json.loads((tmp_path / "out" / "evals.json").read_text())
    models_told = ["base", "dpo", "expert:heart", "expert:nerve", "preference"]
    assert list(evals["preference"]) == list(evals["bpb"]) == models_told
    assert evals["pivot"] == "preference"
    assert set(evals["credit"]["judgement"]) == {"heart", "nerve"}
    card = (tmp_path / "out" / "README.md").read_text()
    assert "Held-out pairs whose chosen answer it prefers" in card
    assert "four numbers for each of the public pairs" in card
    lineage = json.loads((tmp_path / "out" / "lineage.json").read_text())
    assert lineage["spec"]["pairs"].startswith("sha256:")
    assert str(models) not in json.dumps(lineage)
    for lost in (tmp_path / "work").glob("job-*/result"):
        lost.rename(tmp_path / "lost")
    assert run(tmp_path / "again", tmp_path / "work") == {"fused", "evaluate"}
    run(tmp_path / "fresh", tmp_path / "elsewhere")
    weights = [
        (tmp_path / name / "model.safetensors").read_bytes() for name in ("out", "again", "fresh")
    ]
    assert weights[0] == weights[1] == weights[2]
