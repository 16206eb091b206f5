"""What is told of nothing is told by nothing, and what is told of all is told to the end."""

import math
from statistics import NormalDist

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from participant.canary_stats import FALSE_ALARMS, exposure, share_interval
from participant.policy import GateRules

LIMITS = GateRules()


def _draws(seed: int, shift: float) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.normal(shift, 1, 100), rng.normal(0, 1, 1000)


def test_equal_scores_pass_the_default_limits_nearly_always() -> None:
    found = [exposure(*_draws(seed, 0)) for seed in range(200)]
    alarms = sum(one.auc_low > LIMITS.auc_max or one.tpr_low > LIMITS.tpr_max for one in found)
    assert alarms <= 2
    # Of the true values 0.5 and 0.01, intervals of 95 % miss one in twenty or so.
    assert sum(not one.auc_low <= 0.5 <= one.auc_high for one in found) <= 20
    assert np.mean([one.bits for one in found]) == pytest.approx(1.443, abs=0.05)


def test_the_interval_holds_the_area_of_two_shifted_normals() -> None:
    # P(N(1, 1) > N(0, 1)) = Phi(1 / sqrt 2)
    found = [exposure(*_draws(seed, 1)) for seed in range(200)]
    assert sum(one.auc_low <= 0.76025 <= one.auc_high for one in found) >= 180


def test_records_that_all_stand_out_are_all_found() -> None:
    found = exposure(np.full(64, 2.0), np.linspace(0, 1, 1000))
    assert (found.auc, found.tpr) == (1, 1)
    assert found.auc_low > 0.9
    assert found.tpr_low > 0.9
    assert found.bits == pytest.approx(np.log2(1001))


def test_ties_tell_nothing() -> None:
    found = exposure(np.zeros(50), np.zeros(50))
    assert (found.auc, found.tpr, found.bits) == (0.5, 0, pytest.approx(0, abs=0.1))


@given(st.integers(0, 300), st.integers(1, 300))
def test_a_share_lies_in_its_interval(found: int, of: int) -> None:
    found = min(found, of)
    low, high = share_interval(found, of)
    assert 0 <= low <= found / of + 1e-9
    assert found / of - 1e-9 <= high <= 1


@pytest.mark.parametrize("of", [1, 2, 5, 40])
def test_however_few_there_are_the_interval_holds_the_share_in_95_of_100_cases(of: int) -> None:
    for share in (0.01, 0.03, 0.2, 0.5, 0.97):
        chance = [math.comb(of, n) * share**n * (1 - share) ** (of - n) for n in range(of + 1)]
        intervals = [share_interval(n, of) for n in range(of + 1)]
        held = [low <= share <= high for low, high in intervals]
        assert sum(c for c, is_held in zip(chance, held, strict=True) if is_held) >= 0.95


def test_one_record_that_stands_out_is_no_proof() -> None:
    found = exposure(np.array([2.0]), np.linspace(0, 1, 900))
    assert found.tpr == 1
    assert found.tpr_low <= LIMITS.tpr_max
    assert found.auc_low <= LIMITS.auc_max


@pytest.mark.parametrize(("planted", "held_out"), [([], [1.0]), ([1.0], []), ([np.nan], [1.0])])
def test_what_cannot_be_compared_is_refused(planted: list[float], held_out: list[float]) -> None:
    with pytest.raises(ValueError, match="both kinds"):
        exposure(np.asarray(planted), np.asarray(held_out))


def test_a_few_records_by_chance_alike_prove_nothing() -> None:
    rng = np.random.default_rng(0)
    found = [exposure(rng.normal(0, 1, 2), rng.normal(0, 1, 900)) for _ in range(300)]
    assert sum(one.auc_low > LIMITS.auc_max or one.tpr_low > LIMITS.tpr_max for one in found) <= 9


def test_both_limits_of_a_release_allow_the_same_of_normal_scores() -> None:
    score_at = NormalDist().inv_cdf
    shift = score_at(LIMITS.tpr_max) - score_at(FALSE_ALARMS)
    assert NormalDist().cdf(shift / math.sqrt(2)) == pytest.approx(LIMITS.auc_max, abs=0.005)


@pytest.mark.parametrize(("area", "stopped"), [(0.60, (0, 10)), (0.75, (160, 200))])
def test_what_fifty_records_can_decide(area: float, stopped: tuple[int, int]) -> None:
    """What the demo plants: usual experts (an area of 0.6) go, those that tell much stay."""
    shift = math.sqrt(2) * NormalDist().inv_cdf(area)
    rng = np.random.default_rng(0)
    found = [exposure(rng.normal(shift, 1, 49), rng.normal(0, 1, 949)) for _ in range(200)]
    least, most = stopped
    over = sum(o.auc_low > LIMITS.auc_max or o.tpr_low > LIMITS.tpr_max for o in found)
    assert least <= over <= most
