"""A round spec is strict data: what it does not know, it refuses, and says where."""

from pathlib import Path
from typing import Any

import pytest

from protos.spec import RoundSpec, SpecError, load_spec, parse_spec

EXAMPLES = Path(__file__).parents[2] / "examples"
GOOD = """\
name: first
pivot: pivot-0
participants: [a, b]
kind: logits
method: unified
prompts: prompts.jsonl
training:
  steps: 10
  lr: 0.001
"""


PAIRS: dict[str, Any] = {
    "kind": "pairs",
    "method": "preference",
    "pairs": "p.jsonl",
    "prompts": None,
}


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("[!fr]*.yaml")), ids=lambda p: p.stem)
def test_every_example_is_a_valid_spec(path: Path) -> None:
    assert load_spec(path).participants


def test_a_spec_survives_its_own_json() -> None:
    spec = RoundSpec.model_validate(
        {**_values(), "prompts": "sha256:" + "0" * 64, "participants": ("a", "b")}
    )
    assert parse_spec(spec.model_dump_json()) == spec


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("methd: unified", r"spec\.yaml:10: unknown key 'methd'; did you mean 'method'"),
        ("top_k: many", r"spec\.yaml:10: top_k: .*'many'"),
        ("top_k: 0", r"top_k: .*greater than or equal to 1"),
        ("quorum: 3", r"quorum: 3 is more than the 2 participants"),
        ("seed: 1.5", r"seed"),
    ],
)
def test_a_wrong_key_is_named_with_its_line(tmp_path: Path, change: str, says: str) -> None:
    path = tmp_path / "spec.yaml"
    path.write_text(GOOD + change + "\n")
    with pytest.raises(SpecError, match=says):
        load_spec(path)


def test_an_unknown_key_below_training_is_named_too(tmp_path: Path) -> None:
    path = tmp_path / "spec.yaml"
    path.write_text(GOOD + "  stpes: 5\n")
    with pytest.raises(SpecError, match=r"spec\.yaml:10: .*'training\.stpes'.*'steps'"):
        load_spec(path)


@pytest.mark.parametrize(
    "values",
    [
        {"participants": ("a", "a")},
        {"kind": "weights"},
        {"method": "merge"},
        {"prompts": None},
        {"participants": ()},
        {"name": "../etc"},
        {"pivot": "latest"},
        {"participants": ("A b",)},
        {"loss": "minced", "distill_weight": 0.5},
        {"rehearse": True},
        {"kind": "weights", "method": "merge", "grow": {"steps": 1, "lr": 0.1}},
        {"kind": "weights", "method": "merge", "apart": True},
        {"kind": "pairs"},
        {"method": "preference"},
        {"kind": "pairs", "method": "preference", "prompts": None},
        {"kind": "pairs", "method": "preference", "pairs": "p.jsonl"},
        {"kind": "pairs", "method": "unified", "pairs": "p.jsonl", "prompts": None},
        {"pairs": "p.jsonl"},
        {"preference": {"beta": 0.1}},
        {"controls": ("dpo",)},
        {**PAIRS, "controls": ("sft",)},
        {**PAIRS, "grow": {"steps": 1, "lr": 0.1}},
        {**PAIRS, "rehearse": True},
        {**PAIRS, "outer": "diloco"},
        {**PAIRS, "training": {"steps": 1, "lr": 0.1, "seq_len": 64}},
        {**PAIRS, "preference": {"held_out": 0.9}},
    ],
)
def test_what_does_not_fit_together_is_refused(values: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"."):
        RoundSpec.model_validate({**_values(), **values})


def test_a_submitted_spec_holds_digests_and_no_paths() -> None:
    spec = RoundSpec.model_validate(_values())
    with pytest.raises(SpecError, match="wanted sha256"):
        parse_spec(spec.model_dump_json())


@pytest.mark.parametrize("text", ["", "[]", "3", "{", "name: [", "\x00"])
def test_what_is_no_spec_at_all_is_a_clear_error(tmp_path: Path, text: str) -> None:
    path = tmp_path / "spec.yaml"
    path.write_text(text)
    with pytest.raises(SpecError, match=str(path)):
        load_spec(path)


def _values() -> dict[str, Any]:
    return {
        "name": "first",
        "pivot": "pivot-0",
        "participants": ("a", "b"),
        "kind": "logits",
        "method": "unified",
        "prompts": "prompts.jsonl",
        "training": {"steps": 10, "lr": 0.001},
    }
