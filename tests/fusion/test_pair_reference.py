"""What sources make of the reference: laws of fusing, and the least that a liar may be worth."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fusion.pair_reference import LOUDEST, Fusion, fused_reference, move, quietened
from fusion.pair_scores import LEAST, PairScores

LOGS = st.floats(-50, 0)
SOURCES = st.lists(st.lists(LOGS, min_size=3, max_size=3), min_size=1, max_size=4)
FUSIONS: tuple[Fusion, ...] = ("mean", "max_margin")


def numbers(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def of(pivot: Tensor, yes: Tensor, no: Tensor, fusion: Fusion, *, clip: bool = True) -> Tensor:
    """The reference of a pivot [2, N] and sources [S, N] by side."""
    gap = torch.stack([yes, no], dim=1) - pivot
    return fused_reference(pivot, gap, fusion=fusion, clip=clip)


@pytest.mark.parametrize("fusion", FUSIONS)
@given(SOURCES, st.lists(LOGS, min_size=3, max_size=3), st.randoms())
def test_sources_may_come_in_any_order(
    fusion: Fusion, sources: list[list[float]], pivot: list[float], random: Any
) -> None:
    shuffled = random.sample(sources, len(sources))
    base = torch.stack([numbers(*pivot), numbers(*reversed(pivot))])
    for clip in (True, False):
        one, two = (
            of(base, rows, rows, fusion, clip=clip)
            for rows in (torch.tensor(x, dtype=torch.float64) for x in (sources, shuffled))
        )
        assert torch.allclose(one, two, rtol=0, atol=1e-12)


@pytest.mark.parametrize("fusion", FUSIONS)
@given(SOURCES, st.lists(LOGS, min_size=3, max_size=3), st.floats(0, 20))
def test_a_source_weaker_than_the_pivot_is_the_pivot(
    fusion: Fusion, sources: list[list[float]], pivot: list[float], worse: float
) -> None:
    base = torch.stack([numbers(*pivot)] * 2)
    rows = torch.tensor(sources, dtype=torch.float64)
    weak_yes, weak_no = (base[0] - worse)[None], (base[1] + worse)[None]
    mixed = of(base, rows, rows, fusion)
    assert (mixed[0] >= base[0]).all()
    assert (mixed[1] <= base[1]).all()
    assert torch.equal(of(base, weak_yes, weak_no, fusion), base)
    joined = of(base, torch.cat([rows, weak_yes]), torch.cat([rows, weak_no]), fusion)
    assert ((joined - base).abs() <= (mixed - base).abs() + 1e-12).all()
    if fusion == "max_margin":
        assert torch.equal(joined, mixed), "what is not farthest changes nothing"


def test_max_margin_takes_the_farthest_source_of_each_side_for_itself() -> None:
    base = torch.stack([numbers(-5.0), numbers(-5.0)])
    yes, no = numbers(-4.0, -1.0, -9.5)[:, None], numbers(-9.0, -5.5, -1.5)[:, None]
    assert of(base, yes, no, "max_margin").flatten().tolist() == [-1.0, -9.0]
    assert of(base, yes, no, "max_margin", clip=False).flatten().tolist() == [-9.5, -9.0]
    assert float(of(base, yes, no, "mean")[0]) == pytest.approx(-5 + 5 / 3)
    assert float(of(base, yes, no, "mean", clip=False)[0]) == pytest.approx(-14.5 / 3)
    none = torch.empty((0, 2, 1), dtype=torch.float64)
    assert torch.equal(fused_reference(base, none, fusion="mean"), base)


@given(
    st.lists(st.floats(0, 1e3, allow_subnormal=False), min_size=1, max_size=6), st.floats(1, 1e9)
)
def test_no_source_is_louder_than_allowed_and_the_quiet_ones_stay_as_they_are(
    far: list[float], lie: float
) -> None:
    loud = numbers(*far, max(far) * lie)
    turned = quietened(loud)
    assert (turned > 0).all()
    speaking = loud[loud > 0]
    if len(speaking) < 3:
        assert (turned == 1).all(), "of two nobody can say which is the loud one"
        return
    most = LOUDEST * float(speaking.quantile(0.5))
    assert (loud * turned <= most * (1 + 1e-12) + 1e-300).all()
    assert (turned[loud <= most] == 1).all()


def scores(margin: np.ndarray) -> PairScores:
    """Four tokens an answer, around -8 nats; the chosen one likelier by `margin` nats a token."""
    tokens = np.full(len(margin), 4)
    return PairScores(-8 + 2 * margin, tokens, -8 - 2 * margin, tokens)


def test_a_liar_among_three_who_know_is_worth_no_more_than_twice_one_of_them() -> None:
    generator = np.random.default_rng(0)
    pivot = scores(np.zeros(200))
    honest = {f"expert-{n}": scores(generator.normal(0.5, 0.2, 200)) for n in range(3)}
    tokens = np.full(200, 4)
    liar = PairScores(LEAST * tokens, tokens, np.zeros(200), tokens)  # all wrong, and dead sure
    how: Any = {"length": "pivot", "judge": "experts"}
    alone, joined = (move(pivot, {**honest, **more}, **how) for more in ({}, {"a-liar": liar}))
    assert int(alone.swapped.sum()) <= 2
    assert int(joined.swapped.sum()) <= 40
    assert 0 < float(joined.turned[0]) < 0.1
    assert (joined.turned[1:] == 1).all()
    heard = joined.gap.abs().mean((1, 2))
    assert float(heard[0]) <= LOUDEST * float(heard[1:].max())
    # Where the file is the judge, whoever prefers the other answer is weaker, and not heard.
    given = move(pivot, {**honest, "a-liar": liar}, length="pivot", judge="given")
    without = move(pivot, honest, length="pivot", judge="given")
    one, two = (fused_reference(x.pivot, x.gap, fusion="max_margin") for x in (given, without))
    assert torch.equal(one, two)
