"""The policy says no by default, and names the rule."""

from pathlib import Path
from typing import Any

import pytest

from participant.policy import Policy, PolicyRefusalError, check, check_positions, load_policy
from protos.config import ConfigError
from protos.messages import Assignment


def assignment(**spec: Any) -> Assignment:
    values = {
        "name": "x",
        "pivot": "pivot-0",
        "participants": ["a"],
        "kind": "logits",
        "method": "unified",
        "prompts": "sha256:" + "0" * 64,
        "training": {"steps": 1, "lr": 0.1},
        **spec,
    }
    return Assignment.model_validate(
        {
            "round_id": "rnd-1",
            "attempt": 1,
            "submitted_by": "ada",
            "spec": values,
            "pivot_sha256": "0" * 64,
            "deadline_unix_ms": 0,
        }
    )


WEIGHTS = {"kind": "weights", "method": "merge"}


@pytest.mark.parametrize("spec", [{}, WEIGHTS])
def test_an_empty_policy_lets_nothing_out(spec: dict[str, Any]) -> None:
    with pytest.raises(PolicyRefusalError, match=r"policy\.toml"):
        check(Policy(), assignment(**spec))


def test_weights_need_their_own_yes() -> None:
    with pytest.raises(PolicyRefusalError, match="ship_weights"):
        check(Policy(ship_logits=True), assignment(**WEIGHTS))
    check(Policy(ship_weights=True), assignment(**WEIGHTS))


def test_training_a_received_model_needs_its_own_yes() -> None:
    grow = {"grow": {"steps": 1, "lr": 0.1}}
    with pytest.raises(PolicyRefusalError, match="grow_experts"):
        check(Policy(ship_logits=True), assignment(**grow))
    check(Policy(ship_logits=True, grow_experts=True), assignment(**grow))


@pytest.mark.parametrize(
    ("policy", "spec", "rule"),
    [
        ({"max_top_k": 8}, {"top_k": 9}, "max_top_k"),
        ({"submitters": ("grace",)}, {}, "submitters"),
    ],
)
def test_a_rule_that_says_no_is_named(
    policy: dict[str, Any], spec: dict[str, Any], rule: str
) -> None:
    with pytest.raises(PolicyRefusalError, match=rule):
        check(Policy(ship_logits=True, **policy), assignment(**spec))


def test_positions_are_bounded() -> None:
    check_positions(Policy(max_positions_per_round=10), 10)
    with pytest.raises(PolicyRefusalError, match="max_positions_per_round"):
        check_positions(Policy(max_positions_per_round=10), 11)


@pytest.mark.parametrize("text", ["ship_logit = true", "ship_logits = ", "ship_logits = 'maybe'"])
def test_a_policy_that_cannot_be_read_is_no_policy(tmp_path: Path, text: str) -> None:
    path = tmp_path / "policy.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"policy\.toml"):
        load_policy(path)
    with pytest.raises(ConfigError, match="cannot be read"):
        load_policy(tmp_path / "none.toml")
