from itertools import permutations

import numpy as np
import pytest
from numpy.typing import NDArray

from fusion.merge import MERGES, merge, subtract

State = dict[str, NDArray[np.float32]]
METHODS = sorted(MERGES)


def state(seed: int, scale: float = 1.0) -> State:
    rng = np.random.default_rng(seed)
    return {
        "w": (rng.normal(size=(4, 5)) * scale).astype(np.float32),
        "b": (rng.normal(size=3) * scale).astype(np.float32),
    }


DELTAS = [state(seed, 0.1 * seed) for seed in (1, 2, 3)]


@pytest.mark.parametrize("method", METHODS)
def test_the_order_of_the_sources_changes_no_bit(method: str) -> None:
    # Summed as they come, 1e30 - 1e30 + 1 is 1 and 1e30 + 1 - 1e30 is 0.
    wide = [{"w": np.asarray([x, 1.0], np.float32)} for x in (1e30, -1e30, 1.0)]
    for base, deltas in ((state(0), DELTAS), ({"w": np.zeros(2, np.float32)}, wide)):
        wanted = merge(base, deltas, method, density=1.0)
        for order in permutations(deltas):
            found = merge(base, order, method, density=1.0)
            assert all(np.array_equal(found[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("method", METHODS)
def test_one_source_at_weight_one_and_full_density_is_that_source(method: str) -> None:
    found = merge(state(0), DELTAS[:1], method, weight=1.0, density=1.0)
    for name, base in state(0).items():
        assert found[name] == pytest.approx(base + DELTAS[0][name], abs=1e-6)
        assert found[name].dtype == np.float32


@pytest.mark.parametrize("method", METHODS)
def test_no_change_merges_to_the_base_and_inputs_stay(method: str) -> None:
    base, zero = state(0), {name: np.zeros_like(v) for name, v in state(0).items()}
    found = merge(base, [zero, zero], method)
    assert all(np.array_equal(found[name], state(0)[name]) for name in base)
    assert all(np.array_equal(base[name], state(0)[name]) for name in base)


@pytest.mark.parametrize("method", METHODS)
def test_twice_the_weight_is_twice_the_change(method: str) -> None:
    zero = {name: np.zeros_like(v) for name, v in state(0).items()}
    once, twice = (merge(zero, DELTAS, method, weight=w) for w in (0.5, 1.0))
    assert all(2 * once[name] == pytest.approx(twice[name], abs=1e-6) for name in zero)


def test_linear_is_the_mean_and_task_arithmetic_the_sum() -> None:
    base = state(0)
    mean, total = merge(base, DELTAS, "linear"), merge(base, DELTAS, "task_arithmetic", weight=1)
    for name, value in base.items():
        change = sum(delta[name].astype(np.float64) for delta in DELTAS)
        assert mean[name] == pytest.approx(value + change / 3, abs=1e-6)
        assert total[name] == pytest.approx(value + change, abs=1e-6)


def slow_ties(deltas: list[NDArray[np.float32]], density: float) -> NDArray[np.float64]:
    """The paper's three steps, number by number."""
    flat = [[float(x) for x in delta.ravel()] for delta in deltas]
    kept = max(1, round(density * len(flat[0])))
    trimmed = []
    for values in flat:
        best = sorted(range(len(values)), key=lambda i: -abs(values[i]))[:kept]
        trimmed.append([x if i in best else 0.0 for i, x in enumerate(values)])
    merged = []
    for i in range(len(flat[0])):
        column = [values[i] for values in trimmed]
        sign = 1 if sum(column) > 0 else -1
        agreeing = [x for x in column if x * sign > 0]
        merged.append(sum(agreeing) / len(agreeing) if agreeing else 0.0)
    return np.asarray(merged).reshape(deltas[0].shape)


@pytest.mark.parametrize("density", [0.05, 0.2, 0.5, 1.0])
def test_ties_is_the_papers_trim_elect_and_mean(density: float) -> None:
    zero = {name: np.zeros_like(v) for name, v in state(0).items()}
    found = merge(zero, DELTAS, "ties", density=density)
    for name in zero:
        wanted = slow_ties([delta[name] for delta in DELTAS], density)
        assert found[name] == pytest.approx(wanted, abs=1e-6)


def test_subtract_gives_back_what_merge_added() -> None:
    base, tuned = state(0), state(9)
    found = merge(base, [subtract(tuned, base)], "linear")
    assert all(found[name] == pytest.approx(tuned[name], abs=1e-6) for name in tuned)


@pytest.mark.parametrize(
    ("deltas", "method", "says"),
    [
        (DELTAS, "magic", "unknown merge"),
        ([], "ties", "0 deltas"),
        ([{"w": DELTAS[0]["w"]}], "ties", "do not share"),
        ([{**DELTAS[0], "b": np.zeros(4, np.float32)}], "linear", "has shape"),
    ],
)
def test_what_does_not_fit_the_base_is_refused(deltas: list[State], method: str, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        merge(state(0), deltas, method)
