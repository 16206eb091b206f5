"""A local fusion's spec is a round's, but for what a round needs a coordinator for."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from cofuse.local_spec import FEDERATED, KEYS, load_local_spec
from protos.spec import RoundSpec, SpecError

EXAMPLES = Path(__file__).parents[2] / "examples"
GOOD: dict[str, Any] = {
    "pivot": "models/base",
    "sources": {"b": "/elsewhere/b", "a": "models/a"},
    "method": "unified",
    "prompts": "prompts.jsonl",
    "training": {"steps": 10, "lr": 0.001},
}
OTHERS: dict[str, Any] = {
    "name": "first",
    "method": "pairwise",
    "merge": "ties",
    "prompts": "p.jsonl",
    "evals": "e.json",
    "top_k": 7,
    "loss": "infifusion",
    "routing": "uniform",
    "distill_weight": 0.25,
    "merge_weight": 0.75,
    "training": {"steps": 3, "lr": 0.5},
    "controls": ["sft"],
    "seed": 11,
}
"""For a key of a round, a value that is not its default."""


def write(folder: Path, values: dict[str, Any], more: str = "") -> Path:
    path = folder / "My Spec.yaml"
    path.write_text(yaml.safe_dump(values, sort_keys=False) + more)
    return path


@pytest.mark.parametrize(
    "key", sorted(set(RoundSpec.model_fields) - {"pivot", "pairs", "preference", *FEDERATED})
)
def test_every_other_key_of_a_round_means_the_same_here(tmp_path: Path, key: str) -> None:
    assert key in KEYS
    if key not in OTHERS:
        pytest.skip(f"no value for {key} in this test; a default is all that is known of it")
    path = write(tmp_path, {**GOOD, key: OTHERS[key]})
    found = load_local_spec(path)
    as_round = RoundSpec.model_validate(
        {
            **{k: v for k, v in GOOD.items() if k != "sources"},
            **{"name": "my-spec", "pivot": "pivot-0", "participants": ["a", "b"]},
            **{"kind": "logits", key: OTHERS[key]},
        }
    )
    assert found.round == as_round
    assert getattr(found.round, key) != getattr(load_local_spec(write(tmp_path, GOOD)).round, key)


@pytest.mark.parametrize("key", FEDERATED)
def test_what_belongs_to_a_coordinator_is_refused_with_its_line(tmp_path: Path, key: str) -> None:
    path = write(tmp_path, GOOD, f"{key}: 3\n")
    line = len(path.read_text().splitlines())
    with pytest.raises(SpecError, match=rf"My Spec\.yaml:{line}: key '{key}' belongs to a round"):
        load_local_spec(path)


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ("methd: x", r":12: unknown key 'methd'; did you mean 'method'"),
        ("sorces: x", r":12: unknown key 'sorces'; did you mean 'sources'"),
        ("zzz: x", r":12: unknown key 'zzz'; known: name, pivot, sources"),
        ("3: x", r":12: unknown key 3"),
        ("top_k: many", r":12: top_k: .*'many'"),
        ("top_k: 0", r":12: top_k: "),
        ("loss: kl", r":12: loss: "),
        ("seed: 0\nseed: 1", r":13: 'seed' stands here and in line 12; keep one"),
        ("  stpes: 5", r":12: unknown key 'training\.stpes'; did you mean 'steps'"),
        ("  steps: 5", r":12: 'steps' stands here and in line 11; keep one"),
        ("name: Not A Name", r":12: name: "),
    ],
)
def test_what_it_does_not_know_it_refuses_and_says_where(
    tmp_path: Path, more: str, says: str
) -> None:
    path = tmp_path / "spec.yaml"
    values = {**GOOD, "training": {"lr": 0.001, "steps": 10}}
    path.write_text("# two lines\n\n" + yaml.safe_dump(values, sort_keys=False) + more + "\n")
    with pytest.raises(SpecError, match=says):
        load_local_spec(path)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"pivot": None}, "pivot"),
        ({"pivot": ""}, "pivot"),
        ({"sources": ["a", "b"]}, r":2: sources: found \['a', 'b'\], wanted names with paths"),
        ({"sources": {}}, "sources"),
        ({"sources": {"A b": "x"}}, "sources"),
        ({"sources": {"a": 3}}, r"spec\.yaml:3: sources\.a: .*found 3"),
        ({"method": "merg"}, "method"),
        ({"method": "merge", "controls": ["sft"], "prompts": None}, r"controls: sft train on"),
        ({"prompts": None}, "prompts: a logits round needs"),
    ],
)
def test_what_does_not_fit_together_is_refused(
    tmp_path: Path, change: dict[str, Any], says: str
) -> None:
    path = tmp_path / "spec.yaml"
    path.write_text(yaml.safe_dump({**GOOD, **change}, sort_keys=False))
    with pytest.raises(SpecError, match=says):
        load_local_spec(path)


@pytest.mark.parametrize("key", ["pivot", "sources", "method", "training"])
def test_what_is_needed_is_named_when_it_is_missing(tmp_path: Path, key: str) -> None:
    path = write(tmp_path, {k: v for k, v in GOOD.items() if k != key})
    with pytest.raises(SpecError, match=key):
        load_local_spec(path)


def test_a_merge_needs_neither_prompts_nor_training(tmp_path: Path) -> None:
    values = {k: GOOD[k] for k in ("pivot", "sources")}
    found = load_local_spec(write(tmp_path, {**values, "method": "merge"}))
    assert (found.round.kind, found.prompts) == ("weights", None)


def test_paths_start_at_the_spec_and_sources_are_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "deep").mkdir()
    monkeypatch.setenv("HOME", "/home/of")
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "deep", {**GOOD, "evals": "~/e.json"})
    found = load_local_spec(Path("deep") / "My Spec.yaml")
    assert found.pivot == tmp_path / "deep" / "models" / "base"
    assert found.prompts == tmp_path / "deep" / "prompts.jsonl"
    assert found.evals == Path("/home/of/e.json")
    assert list(found.sources) == ["a", "b"]
    assert found.sources["b"] == Path("/elsewhere/b")
    assert found.round.name == "my-spec"
    assert found.round.participants == ("a", "b")


@pytest.mark.parametrize("text", ["", "[]", "3", "{", "name: [", "\x00", "a: &a [*a]"])
def test_what_is_no_spec_at_all_is_a_clear_error(tmp_path: Path, text: str) -> None:
    path = tmp_path / "spec.yaml"
    path.write_text(text)
    with pytest.raises(SpecError, match=str(path)):
        load_local_spec(path)


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("fuse-*.yaml")), ids=lambda p: p.stem)
def test_every_example_is_a_valid_spec(path: Path) -> None:
    assert load_local_spec(path).sources
