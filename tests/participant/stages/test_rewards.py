"""Rewards: what counts as right, and what a broken one costs."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from participant.stages.rewards import REWARDS, reward


@pytest.mark.parametrize(
    ("name", "said", "right", "wanted"),
    [
        ("exact", "  Cerebral\n infarction ", "cerebral infarction", 1),
        ("exact", "<think>arthritis?</think>diabetes", "diabetes", 1),
        ("exact", "diabetes type 2", "diabetes", 0),
        ("letter", "B", "b", 1),
        ("letter", "The answer is (C).", "C", 1),
        ("letter", "A patient has fever, so it is D", "D", 1),
        ("letter", "<think>A or B</think> B.", "A", 0),
        ("letter", "BAD", "B", 0),
        ("letter", "", "A", 0),
        ("number", "3 + 4 = 7", "7", 1),
        ("number", "it is 1,200.0 mg", "1200", 1),
        ("number", "-5", "5", 0),
        ("number", "none", "5", 0),
        ("number", "9" * 400, "9" * 399 + "8", 0),
        ("format", "<think>because</think> B", "", 1),
        ("format", "<think>because</think> ", "", 0),
        ("format", "<think>a</think>b<think>c</think>d", "", 0),
        ("format", "B", "", 0),
    ],
)
def test_rewards_know_right_from_wrong(name: str, said: str, right: str, wanted: float) -> None:
    assert REWARDS[name](said, right) == wanted


@settings(deadline=None)
@given(st.text(max_size=60), st.sampled_from(["exact", "letter", "format"]), st.text(max_size=9))
def test_whatever_is_said_is_worth_between_nothing_and_all(
    said: str, name: str, right: str
) -> None:
    assert reward({name: 1.0}, said, right) in (0.0, 1.0)


@pytest.mark.parametrize("found", [math.nan, math.inf, "x", None, ZeroDivisionError])
def test_a_reward_that_fails_is_no_reward(found: object, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_said: str, _right: str) -> float:
        if isinstance(found, type):
            raise found
        return found  # type: ignore[return-value]

    monkeypatch.setitem(REWARDS, "broken", broken)
    assert reward({"exact": 1.0, "broken": 0.1}, "a", "a") is None
    assert reward({"number": 1.0}, "7", "seven") is None  # the task's own answer is no number


def test_rewards_are_added_by_their_weights() -> None:
    weights = {"letter": 1.0, "format": 0.25}
    assert reward(weights, "<think>x</think> B", "B") == 1.25
    assert reward(weights, "B", "B") == 1.0
