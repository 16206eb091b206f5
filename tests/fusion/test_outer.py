import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import nn

from fusion.merge import MergeError
from fusion.outer import OUTER, OuterSettings, OuterState, load_outer, outer_step, save_outer

State = dict[str, NDArray[np.float32]]
METHODS = sorted(OUTER)
SHA = "a" * 64


def state(seed: int, scale: float = 1.0) -> State:
    rng = np.random.default_rng(seed)
    return {
        "w": (scale * rng.normal(size=(3, 4))).astype(np.float32),
        "b": (scale * rng.normal(size=4)).astype(np.float32),
    }


def round_of(number: int) -> dict[str, State]:
    return {name: state(10 * number + i, 0.1) for i, name in enumerate("abc")}


def mean_of(deltas: dict[str, State], name: str) -> NDArray[np.float64]:
    return np.mean([d[name].astype(np.float64) for d in deltas.values()], axis=0)


def after(rounds: int, settings: OuterSettings) -> tuple[State, OuterState | None]:
    pivot, memory = state(99), None
    for number in range(rounds):
        pivot, memory = outer_step(pivot, round_of(number), settings, memory)
    return pivot, memory


def close(found: State, wanted: State, by: float = 1e-6) -> None:
    assert found.keys() == wanted.keys()
    for name in wanted:
        assert found[name] == pytest.approx(wanted[name], abs=by), name


# ---------------------------------------------------------------------------- the optimizers
@pytest.mark.parametrize(
    ("method", "given"),
    [
        ("diloco", {"momentum": 0.9, "nesterov": True, "lr": 0.7}),
        ("fedavgm", {"momentum": 0.9, "lr": 1.0}),
        ("fedavg", {"lr": 1.0}),
    ],
)
def test_a_step_is_sgds_with_minus_delta_for_the_gradient(
    method: str, given: dict[str, float]
) -> None:
    parameters = {n: nn.Parameter(torch.from_numpy(v).double()) for n, v in state(99).items()}
    optimizer = torch.optim.SGD(list(parameters.values()), **given)
    for number in range(5):
        for name, parameter in parameters.items():
            parameter.grad = -torch.from_numpy(mean_of(round_of(number), name))
        optimizer.step()
    found, _ = after(5, OuterSettings(method=method))
    close(found, {n: p.detach().numpy() for n, p in parameters.items()})


def fedopt(method: str, rounds: int, lr: float, beta: float, beta2: float, tau: float) -> State:
    """Algorithm 2 of arXiv 2003.00295, number by number."""
    pivot = {n: v.astype(np.float64).ravel().tolist() for n, v in state(99).items()}
    m = {n: [0.0] * len(v) for n, v in pivot.items()}
    v = {n: [tau**2] * len(values) for n, values in pivot.items()}
    for number in range(rounds):
        for name, values in pivot.items():
            for i, d in enumerate(mean_of(round_of(number), name).ravel().tolist()):
                m[name][i] = beta * m[name][i] + (1 - beta) * d
                old = v[name][i]
                v[name][i] = {
                    "fedadagrad": old + d * d,
                    "fedadam": beta2 * old + (1 - beta2) * d * d,
                    "fedyogi": old - (1 - beta2) * d * d * math.copysign(1, old - d * d),
                }[method]
                values[i] += lr * m[name][i] / (math.sqrt(v[name][i]) + tau)
    shapes = state(99)
    return {n: np.asarray(x).reshape(shapes[n].shape) for n, x in pivot.items()}


@pytest.mark.parametrize("method", ["fedadagrad", "fedadam", "fedyogi"])
def test_adaptive_steps_are_the_papers_formulas(method: str) -> None:
    beta = 0.0 if method == "fedadagrad" else 0.9
    found, _ = after(4, OuterSettings(method=method))
    close(found, fedopt(method, 4, 0.01, beta, 0.99, 1e-3))
    given = {"lr": 0.3, "momentum": 0.5, "tau": 0.1}
    given |= {} if method == "fedadagrad" else {"beta2": 0.8}
    found, _ = after(3, OuterSettings(method=method, **given))
    close(found, fedopt(method, 3, 0.3, 0.5, given.get("beta2", 0.0), 0.1), by=2e-6)


def test_adagrad_is_torchs_which_starts_and_ends_the_root_alike() -> None:
    parameters = {n: nn.Parameter(torch.from_numpy(v).double()) for n, v in state(99).items()}
    optimizer = torch.optim.Adagrad(
        list(parameters.values()), lr=0.01, initial_accumulator_value=1e-6, eps=1e-3
    )
    for number in range(4):
        for name, parameter in parameters.items():
            parameter.grad = -torch.from_numpy(mean_of(round_of(number), name))
        optimizer.step()
    found, _ = after(4, OuterSettings(method="fedadagrad"))
    close(found, {n: p.detach().numpy() for n, p in parameters.items()})


def test_fedavg_is_the_mean_of_the_models_weighted_by_their_text() -> None:
    base, deltas = state(0), round_of(1)
    weights = {"a": 100.0, "b": 300.0, "c": 0.0}
    found, _ = outer_step(base, deltas, OuterSettings(method="fedavg"), None, weights)
    models = {w: {n: base[n] + deltas[w][n] for n in base} for w in deltas}
    close(found, {n: 0.25 * models["a"][n] + 0.75 * models["b"][n] for n in base})


# ---------------------------------------------------------------------------- laws
@pytest.mark.parametrize("method", METHODS)
def test_the_order_of_the_participants_changes_no_bit(method: str) -> None:
    settings, deltas = OuterSettings(method=method), round_of(1)
    weights = {"a": 1.0, "b": 2.0, "c": 5.0}
    wanted = outer_step(state(0), deltas, settings, None, weights)
    for order in itertools.permutations(deltas):
        found = outer_step(state(0), {n: deltas[n] for n in order}, settings, None, weights)
        assert all(np.array_equal(found[0][n], wanted[0][n]) for n in wanted[0])
        for a, b in ((found[1].first, wanted[1].first), (found[1].second, wanted[1].second)):
            assert all(np.array_equal(a[n], b[n]) for n in b)


@pytest.mark.parametrize("method", METHODS)
def test_no_change_at_first_moves_nothing_and_inputs_stay(method: str) -> None:
    base, zero = state(0), {n: np.zeros_like(v) for n, v in state(0).items()}
    found, memory = outer_step(base, {"a": zero}, OuterSettings(method=method))
    assert all(np.array_equal(found[n], base[n]) for n in base)
    assert memory.rounds == 1
    assert all(np.array_equal(base[n], state(0)[n]) for n in base)


@given(st.sampled_from(METHODS), st.floats(0.01, 100))
def test_only_the_ratio_of_the_participants_weights_counts(method: str, by: float) -> None:
    settings, weights = OuterSettings(method=method), {"a": 1.0, "b": 2.0, "c": 5.0}
    scaled = {n: by * w for n, w in weights.items()}
    close(
        outer_step(state(0), round_of(1), settings, None, scaled)[0],
        outer_step(state(0), round_of(1), settings, None, weights)[0],
    )


@pytest.mark.parametrize("method", METHODS)
def test_a_state_kept_on_disk_goes_on_bit_for_bit(method: str, tmp_path: Path) -> None:
    settings, file = OuterSettings(method=method), tmp_path / "outer.safetensors"
    wanted, _ = after(4, settings)
    pivot, memory = after(2, settings)
    assert memory is not None
    save_outer(file, memory, settings, pivot_sha256=SHA)
    assert [f.name for f in tmp_path.iterdir()] == [file.name]
    memory = load_outer(file, settings, pivot_sha256=SHA)
    for number in (2, 3):
        pivot, memory = outer_step(pivot, round_of(number), settings, memory)
    assert all(np.array_equal(pivot[n], wanted[n]) for n in wanted)
    assert memory.rounds == 4


# ---------------------------------------------------------------------------- refusals
def test_a_state_of_another_run_is_refused(tmp_path: Path) -> None:
    settings, file = OuterSettings(method="diloco"), tmp_path / "outer.safetensors"
    _, memory = after(1, settings)
    assert memory is not None
    save_outer(file, memory, settings, pivot_sha256=SHA)
    load_outer(file, OuterSettings(method="diloco", lr=0.1), pivot_sha256=SHA)
    for other, sha, says in (
        (OuterSettings(method="fedavgm"), SHA, "has settings"),
        (OuterSettings(method="diloco", momentum=0.5), SHA, "has settings"),
        (settings, "b" * 64, "has pivot_sha256"),
    ):
        with pytest.raises(MergeError, match=says):
            load_outer(file, other, pivot_sha256=sha)
    file.write_bytes(file.read_bytes()[:-3])
    with pytest.raises(MergeError, match="cannot be read"):
        load_outer(file, settings, pivot_sha256=SHA)
    with pytest.raises(MergeError, match="cannot be read"):
        load_outer(tmp_path / "none", settings, pivot_sha256=SHA)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"method": "magic"}, "unknown outer method"),
        ({"method": "fedavg", "momentum": 0.9}, "fedavg does not read momentum; it reads lr"),
        ({"method": "diloco", "tau": 0.9}, "does not read tau"),
        ({"method": "fedadagrad", "beta2": 0.9}, "does not read beta2"),
        ({"method": "diloco", "momentum": 1.0}, "momentum is 1.0"),
        ({"method": "fedadam", "beta2": -0.1}, "beta2 is -0.1"),
        ({"method": "fedadam", "tau": 0.0}, "tau is 0.0"),
        ({"method": "fedavg", "lr": math.nan}, "lr is nan"),
    ],
)
def test_settings_that_do_not_fit_are_refused(given: dict[str, object], says: str) -> None:
    with pytest.raises(MergeError, match=says):
        OuterSettings(**given)


def test_deltas_and_weights_that_do_not_fit_are_refused() -> None:
    base, settings, deltas = state(0), OuterSettings(method="diloco"), round_of(1)
    for sent, weights, says in (
        ({}, None, "without a delta"),
        ({"a": {"w": base["w"]}}, None, "do not share"),
        ({"a": {**base, "b": np.full(4, np.inf, np.float32)}}, None, "a delta of b holds NaN"),
        (deltas, {"a": 1.0}, "differ in"),
        (deltas, {"a": 1.0, "b": -1.0, "c": 1.0}, "at least 0"),
        (deltas, dict.fromkeys("abc", 0.0), "not all 0"),
    ):
        with pytest.raises(MergeError, match=says):
            outer_step(base, sent, settings, None, weights)
    with pytest.raises(MergeError, match="of the outer state"):
        outer_step(base, deltas, settings, OuterState(1, {"w": base["w"]}))
