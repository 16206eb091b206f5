"""The policy says no by default, and yes where exactly one rule does; refusals name the lack."""

from datetime import date
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cofuse.participant_home import POLICY
from participant.policy import (
    LogitLimits,
    Policy,
    PolicyRefusalError,
    PromptRules,
    Rule,
    WeightLimits,
    load_policy,
    match,
)
from protos.config import ConfigError
from protos.messages import Assignment, FileRef

TODAY = date(2026, 11, 22)
SET, OTHER = "a" * 64, "b" * 64
WEIGHTS = {"kind": "weights", "method": "merge"}
GROW = {"grow": {"steps": 1, "lr": 0.1}}
PAIRS = {"kind": "pairs", "method": "preference", "prompts": None, "pairs": f"sha256:{SET}"}
ALL: dict[str, Any] = {
    "purpose": "radiology",
    "submitters": ("ada",),
    "kinds": ("logits", "grown", "pairs", "weights"),
    "prompt_sets": (f"sha256:{SET}",),
    "not_after": TODAY,
}


def assignment(*, read: str | None = SET, by: str = "ada", **spec: Any) -> Assignment:
    values = {
        "name": "x",
        "pivot": "pivot-0",
        "participants": ["a"],
        "kind": "logits",
        "method": "unified",
        "purpose": "radiology",
        "prompts": f"sha256:{SET}",
        "training": {"steps": 1, "lr": 0.1},
        **spec,
    }
    return Assignment.model_validate(
        {
            "round_id": "rnd-1",
            "attempt": 1,
            "submitted_by": by,
            "spec": values,
            "prompts": read and FileRef(name="prompts.jsonl", sha256=read, size_bytes=1),
            "pivot_sha256": "0" * 64,
            "deadline_unix_ms": 0,
        }
    )


def policy(*rules: dict[str, Any]) -> Policy:
    return Policy(
        allow=tuple(Rule(**{**ALL, **rule}) for rule in rules), weights=WeightLimits(enabled=True)
    )


@pytest.mark.parametrize("spec", [{}, WEIGHTS, GROW, PAIRS])
def test_an_empty_policy_lets_nothing_out(spec: dict[str, Any]) -> None:
    with pytest.raises(PolicyRefusalError, match=r"policy\.toml: no rule allows"):
        match(Policy(), assignment(**spec), TODAY)


@pytest.mark.parametrize("spec", [{}, WEIGHTS, GROW, PAIRS])
def test_what_one_rule_allows_is_allowed_by_that_rule(spec: dict[str, Any]) -> None:
    two = policy({"purpose": "oncology"}, {})
    assert match(two, assignment(**spec), TODAY) == two.allow[1]


@pytest.mark.parametrize("left_out", sorted(ALL.keys() - {"not_after", "purpose"}))
def test_a_rule_that_leaves_a_key_out_allows_nothing(left_out: str) -> None:
    rule = Rule(**{key: value for key, value in ALL.items() if key != left_out})
    with pytest.raises(PolicyRefusalError):
        match(Policy(allow=(rule,), weights=WeightLimits(enabled=True)), assignment(), TODAY)


@pytest.mark.parametrize(
    ("rule", "asked", "says"),
    [
        ({"kinds": ("logits",)}, WEIGHTS, "no rule allows weights$"),
        ({"kinds": ("logits",)}, GROW, "no rule allows grown$"),
        ({}, {"purpose": "oncology"}, "logits for purpose 'oncology'$"),
        ({}, {"by": "grace"}, "to this submitter$"),
        ({}, {"prompts": f"sha256:{OTHER}"}, "on these prompts$"),
        ({}, {"read": OTHER}, "on these prompts$"),  # another file than the spec names
        ({"not_after": date(2026, 11, 21)}, {}, "after 2026-11-22$"),
        ({}, {"top_k": 17}, "top_k is 17, k_max allows 16"),
    ],
)
def test_each_part_of_a_rule_can_say_no_and_what_no_rule_allows_is_named(
    rule: dict[str, Any], asked: dict[str, Any], says: str
) -> None:
    match(policy({}), assignment(), TODAY)
    with pytest.raises(PolicyRefusalError, match=says):
        match(policy(rule), assignment(**asked), TODAY)


def test_a_refusal_never_tells_what_other_rules_allow() -> None:
    secret = policy({"purpose": "merger-talks"}, {"submitters": ("mallory",)})
    with pytest.raises(PolicyRefusalError) as caught:
        match(secret, assignment(), TODAY)
    assert not {"merger-talks", "mallory"} & set(str(caught.value).replace("'", " ").split())


def test_two_rules_that_both_fit_allow_nothing() -> None:
    with pytest.raises(PolicyRefusalError, match="2 rules allow it, wanted exactly one") as caught:
        match(policy({}, {"approval": "auto"}), assignment(), TODAY)
    assert "disjoint" in caught.value.here


@given(
    kinds=st.sets(st.sampled_from(["logits", "grown", "weights"])),
    submitters=st.sets(st.sampled_from(["ada", "grace", "*"])),
    purpose=st.sampled_from(["radiology", "oncology", "*"]),
    spec=st.sampled_from([{}, WEIGHTS, GROW, PAIRS]),
    by=st.sampled_from(["ada", "grace"]),
)
def test_taking_a_word_out_of_a_rule_never_allows_more(
    kinds: set[str], submitters: set[str], purpose: str, spec: dict[str, Any], by: str
) -> None:
    def allows(**change: Any) -> bool:
        rule = {"kinds": kinds, "submitters": submitters, "purpose": purpose, **change}
        try:
            match(policy({**rule, "kinds": tuple(rule["kinds"])}), assignment(by=by, **spec), TODAY)
        except PolicyRefusalError:
            return False
        return True

    if not allows():
        assert not any(allows(kinds=kinds - {kind}) for kind in kinds)
        assert not any(allows(submitters=submitters - {one}) for one in submitters)


def test_pairs_that_no_rule_names_are_not_judged() -> None:
    """Whether the spec or the file to be read names them."""
    asked = assignment(read=None, **{**PAIRS, "pairs": f"sha256:{OTHER}"})
    read = FileRef(name="pairs.jsonl", sha256=OTHER, size_bytes=1)
    for one in (asked, assignment(**PAIRS).model_copy(update={"pairs": read})):
        with pytest.raises(PolicyRefusalError, match="on these prompts"):
            match(policy({}), one, TODAY)
    # A second file beside the one that the kind asks about is not what the budget is charged for.
    both = assignment().model_copy(update={"pairs": read})
    assert both.public_set == both.prompts


def test_weights_need_their_switch_besides_a_rule() -> None:
    with pytest.raises(ValueError, match="enabled is false"):
        Policy(allow=(Rule(**ALL),))


def read(tmp_path: Path, text: str) -> Policy:
    path = tmp_path / "policy.toml"
    path.write_text(text, encoding="utf-8")
    return load_policy(path)


def test_what_init_writes_is_read_and_allows_nothing_until_kinds_are_named(tmp_path: Path) -> None:
    fresh = read(tmp_path, POLICY)
    (rule,) = fresh.allow
    assert (rule.kinds, rule.approval, fresh.weights.enabled) == ((), "manual", False)
    assert (fresh.logits, fresh.prompts) == (LogitLimits(), PromptRules())
    for spec in ({}, WEIGHTS, GROW, PAIRS):
        with pytest.raises(PolicyRefusalError):
            match(fresh, assignment(purpose="general", **spec), TODAY)
    opened = read(tmp_path, POLICY.replace("kinds = []", 'kinds = ["logits"]'))
    match(opened, assignment(purpose="general"), TODAY)


@pytest.mark.parametrize(
    ("flat", "kinds"),
    [
        ("", ()),
        ("ship_logits = true", ("logits",)),
        ("grow_experts = true", ()),  # it needs ship_logits as well
        ("ship_logits = true\ngrow_experts = true", ("logits", "grown")),
        ("ship_scores = true\nship_weights = true", ("scores", "weights")),
    ],
)
def test_the_flat_form_means_what_it_meant(tmp_path: Path, flat: str, kinds: Any) -> None:
    found = read(tmp_path, flat + "\nmax_top_k = 3\nmax_positions_per_round = 7\n")
    assert found.allow[0].kinds == kinds
    assert found.allow[0].approval == "auto"
    assert (found.logits.k_max, found.logits.positions_per_round) == (3, 7)
    for spec, kind in (({}, "logits"), (GROW, "grown"), (WEIGHTS, "weights")):
        asked = assignment(top_k=3, by="anybody", **spec)
        if kind in kinds:
            match(found, asked, TODAY)
        else:
            with pytest.raises(PolicyRefusalError):
                match(found, asked, TODAY)


def test_submitters_of_the_flat_form_are_held_to(tmp_path: Path) -> None:
    found = read(tmp_path, 'ship_logits = true\nsubmitters = ["ada"]')
    match(found, assignment(by="ada"), TODAY)
    with pytest.raises(PolicyRefusalError, match="submitter"):
        match(found, assignment(by="grace"), TODAY)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("ship_logit = true", "ship_logit"),
        ("ship_logits = ", "is not TOML"),
        ("ship_logits = 'maybe'", "ship_logits"),
        ("version = 2\nship_logits = true", "ship_logits"),
        ("version = 3", "version"),
        ('[[allow]]\npurpose = "x"', "wanted `version = 2`"),
        ("version = 2\n[[allow]]\n", "purpose"),
        ('version = 2\n[[allow]]\npurpose = "x"\nkinds = ["all"]', "kinds"),
        ('version = 2\n[[allow]]\npurpose = "x"\nprompt_sets = ["abc"]', "prompt_sets"),
        ('version = 2\n[[allow]]\npurpose = "x"\napproval = "none"', "approval"),
        ("version = 2\n[logits]\nk_max = 0", "k_max"),
    ],
)
def test_a_policy_that_cannot_be_read_is_no_policy(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(ConfigError, match=rf"policy\.toml.*{says}"):
        read(tmp_path, text)


def test_a_policy_that_is_no_text_or_not_there_is_no_policy(tmp_path: Path) -> None:
    (tmp_path / "policy.toml").write_bytes(b"\xff\xfe")
    for name, says in (("policy.toml", "is not TOML"), ("none.toml", "cannot be read")):
        with pytest.raises(ConfigError, match=says):
            load_policy(tmp_path / name)
