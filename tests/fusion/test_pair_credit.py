"""How sources judged the pairs: laws of shares, whatever the numbers."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st

from fp8.train import TrainConfig
from fusion.pair_credit import judgement
from fusion.pair_scores import PairScores
from fusion.preference import PreferenceSettings

LOGS = st.lists(st.floats(-50, -0.01), min_size=3, max_size=3)


def settings(**changed: Any) -> PreferenceSettings:
    train = TrainConfig(steps=1, lr=1e-3, warmup_steps=0, decay_steps=0)
    return PreferenceSettings(**({"train": train, "batch_size": 1} | changed))


def scores(chosen: list[float], rejected: list[float]) -> PairScores:
    tokens = np.full(len(chosen), 2)
    return PairScores(np.asarray(chosen), tokens, np.asarray(rejected), tokens)


@pytest.mark.parametrize("fusion", ["mean", "max_margin"])
@pytest.mark.parametrize("judge", ["given", "experts"])
@examples(max_examples=25)
@given(LOGS, LOGS, LOGS, LOGS)
def test_shares_are_parts_of_one_and_a_source_that_is_the_pivot_has_none(
    fusion: str,
    judge: str,
    yes: list[float],
    no: list[float],
    two: list[float],
    no_2: list[float],
) -> None:
    pivot = scores(yes, no)
    how = settings(fusion=fusion, judge=judge)
    told = judgement(pivot, {"same": pivot, "a": scores(two, no_2), "b": scores(no, yes)}, how)
    assert told["same"]["share"] == 0
    assert told["same"]["stronger"] == 0
    assert sum(row["share"] for row in told.values()) == pytest.approx(1) or all(
        row["share"] == 0 for row in told.values()
    )
    assert all(0 <= row[key] <= 1 for row in told.values() for key in ("agrees", "stronger"))


def test_the_source_that_knows_better_moves_the_reference() -> None:
    pivot = scores([-4.0, -4.0], [-4.0, -4.0])
    sources = {
        "knows": scores([-2.0, -2.0], [-8.0, -8.0]),
        "errs": scores([-8.0, -8.0], [-2.0] * 2),
    }
    told = judgement(pivot, sources, settings())
    assert told["knows"] == {"agrees": 1, "margin": 3, "stronger": 1, "share": 1, "turned": 1}
    assert told["errs"] == {"agrees": 0, "margin": -3, "stronger": 0, "share": 0, "turned": 1}
    # Its word against the file's: the better answer is the one that the sources say.
    turned = judgement(pivot, {"errs": sources["errs"]}, settings(judge="experts"))
    assert turned["errs"] == {"agrees": 0, "margin": -3, "stronger": 1, "share": 1, "turned": 1}
    assert judgement(pivot, {}, settings()) == {}
