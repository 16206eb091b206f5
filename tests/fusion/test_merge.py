import math
from itertools import permutations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from fusion.merge import MERGES, MergeError, MergeSettings, merge, merge_tensor, subtract

State = dict[str, NDArray[np.float32]]
METHODS = sorted(MERGES)
SEEDS = st.integers(0, 2**32 - 1)


def state(seed: int, scale: float = 1.0) -> State:
    rng = np.random.default_rng(seed)
    return {
        "w": (rng.normal(size=(4, 5)) * scale).astype(np.float32),
        "b": (rng.normal(size=3) * scale).astype(np.float32),
        "scalar": np.asarray(rng.normal() * scale, np.float32),
        "empty": np.zeros((0, 3), np.float32),
    }


DELTAS = {name: state(seed, 0.1 * seed) for seed, name in ((1, "a"), (2, "b"), (3, "c"))}
ZERO = {name: np.zeros_like(value) for name, value in state(0).items()}


def some(method: str) -> dict[str, State]:
    """As many sources as the method takes."""
    return dict(list(DELTAS.items())[: MERGES[method].sources])


def fisher_for(method: str, deltas: dict[str, State]) -> dict[str, State] | None:
    if method != "fisher":
        return None
    return {
        name: {n: np.abs(v) for n, v in state(len(delta) + ord(name[0])).items()}
        for name, delta in deltas.items()
    }


def whole(method: str, **given: float) -> MergeSettings:
    """Settings under which nothing is dropped."""
    full = {"density": 1.0, "epsilon": 0.0, "gamma": 0.0}
    return MergeSettings(
        method=method, **{k: v for k, v in full.items() if k in MERGES[method].defaults}, **given
    )


def close(found: State, wanted: State, by: float = 1e-6) -> None:
    assert found.keys() == wanted.keys()
    for name in wanted:
        assert found[name] == pytest.approx(wanted[name], abs=by), name


# ------------------------------------------------------------------------------- all methods
@pytest.mark.parametrize("method", METHODS)
def test_the_order_of_the_sources_changes_no_bit(method: str) -> None:
    # Summed as they come, 1e15 - 1e15 + 1 is 1 and 1e15 + 1 - 1e15 is 0 in fp32.
    values = {"a": 1e15, "b": -1e15, "c": 1.0}
    wide = {n: {"w": np.asarray([[x, 1.0]], np.float32)} for n, x in values.items()}
    for base, deltas in ((state(0), some(method)), ({"w": np.zeros((1, 2), np.float32)}, wide)):
        deltas = dict(list(deltas.items())[: MERGES[method].sources])
        fisher = fisher_for(method, deltas) if "b" in base else None
        if method == "fisher" and fisher is None:
            fisher = {name: {"w": np.ones((1, 2), np.float32)} for name in deltas}
        settings = MergeSettings(method=method)
        wanted = merge(base, deltas, settings, fisher=fisher)
        for order in permutations(deltas):
            found = merge(base, {n: deltas[n] for n in order}, settings, fisher=fisher)
            assert all(np.array_equal(found[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("method", [m for m in METHODS if m != "fisher"])
def test_without_names_the_order_changes_no_bit_either(method: str) -> None:
    deltas = list(some(method).values())
    wanted = merge(state(0), deltas, method)
    for order in permutations(deltas):
        found = merge(state(0), order, method)
        assert all(np.array_equal(found[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("method", [m for m in METHODS if m not in ("slerp", "iso_c")])
def test_one_source_at_weight_one_with_nothing_dropped_is_that_source(method: str) -> None:
    deltas = {"a": DELTAS["a"]}
    settings = whole(method, weight=1.0)
    found = merge(state(0), deltas, settings, fisher=fisher_for(method, deltas))
    close(found, {name: base + DELTAS["a"][name] for name, base in state(0).items()})
    assert all(value.dtype == np.float32 for value in found.values())


IDENTICAL_ARE_KEPT = sorted(set(METHODS) - {"task_arithmetic", "breadcrumbs", "iso_c", "tsv"})


@pytest.mark.parametrize("method", IDENTICAL_ARE_KEPT)
def test_equal_sources_merge_to_what_each_of_them_is(method: str) -> None:
    deltas = {name: DELTAS["a"] for name in "xyz"[: MERGES[method].sources]}
    settings = whole(method, weight=1.0)
    found = merge(ZERO, deltas, settings, fisher=fisher_for(method, deltas))
    close(found, DELTAS["a"], by=2e-5 if method == "wudi" else 1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_no_change_merges_to_the_base_and_inputs_stay(method: str) -> None:
    base, deltas = state(0), dict.fromkeys("ab", ZERO)
    found = merge(base, deltas, MergeSettings(method=method), fisher=fisher_for(method, deltas))
    assert all(np.array_equal(found[name], state(0)[name]) for name in base)
    assert all(np.array_equal(base[name], state(0)[name]) for name in base)
    assert not any(value.any() for value in ZERO.values())


@pytest.mark.parametrize("method", METHODS)
def test_twice_the_weight_is_twice_the_change(method: str) -> None:
    deltas = some(method)
    once, twice = (
        merge(
            ZERO, deltas, MergeSettings(method=method, weight=w), fisher=fisher_for(method, deltas)
        )
        for w in (0.5, 1.0)
    )
    close({name: 2 * value for name, value in once.items()}, twice)


LENGTHS_SCALE = [m for m in METHODS if m != "wudi"]  # a step of Adam has a length of its own


@pytest.mark.parametrize("method", LENGTHS_SCALE)
def test_deltas_times_a_power_of_two_give_the_change_times_it(method: str) -> None:
    deltas = some(method)
    scaled = {name: {n: 4 * v for n, v in delta.items()} for name, delta in deltas.items()}
    settings, fisher = MergeSettings(method=method), fisher_for(method, deltas)
    small, large = (merge(ZERO, d, settings, fisher=fisher) for d in (deltas, scaled))
    close({name: 4 * value for name, value in small.items()}, large, by=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_a_tensor_is_merged_alike_in_stretches_and_at_once(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    deltas = some(method)
    settings, fisher = MergeSettings(method=method), fisher_for(method, deltas)
    at_once = merge(ZERO, deltas, settings, fisher=fisher)
    monkeypatch.setattr("fusion.merge_methods.STRETCH", 7)
    monkeypatch.setattr("fusion.merge_angles.STRETCH", 7)
    close(merge(ZERO, deltas, settings, fisher=fisher), at_once)


# -------------------------------------------------------------------------------- entry by entry
def test_linear_is_the_mean_and_task_arithmetic_the_sum() -> None:
    base = state(0)
    mean, total = merge(base, DELTAS, "linear"), merge(base, DELTAS, "task_arithmetic", weight=1)
    for name, value in base.items():
        change = sum(delta[name].astype(np.float64) for delta in DELTAS.values())
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
    found = merge(ZERO, DELTAS, "ties", density=density)
    for name in ("w", "b", "scalar"):
        wanted = slow_ties([delta[name] for delta in DELTAS.values()], density)
        assert found[name] == pytest.approx(wanted, abs=1e-6)


AGREEING = {n: {k: np.abs(v) + 0.01 for k, v in d.items()} for n, d in DELTAS.items()}


@pytest.mark.parametrize("method", ["ties", "dare_linear", "dare_ties", "della"])
def test_where_nothing_is_dropped_and_signs_agree_the_mean_is_left(method: str) -> None:
    close(merge(ZERO, AGREEING, whole(method)), merge(ZERO, AGREEING, "linear"))


@pytest.mark.parametrize(
    "pair", [("dare_ties", "ties"), ("della", "ties"), ("dare_linear", "linear")]
)
def test_where_nothing_is_dropped_only_the_consensus_is_left(pair: tuple[str, str]) -> None:
    close(*(merge(ZERO, DELTAS, whole(method)) for method in pair))


def test_breadcrumbs_with_nothing_dropped_are_task_arithmetic() -> None:
    close(merge(ZERO, DELTAS, whole("breadcrumbs")), merge(ZERO, DELTAS, "task_arithmetic"))


def test_breadcrumbs_keep_the_band_below_the_largest() -> None:
    delta = np.asarray([1, -2, 3, -4, 5, -6, 7, -8, 9, -10], np.float32)
    settings = MergeSettings(method="breadcrumbs", density=0.3, gamma=0.2, weight=1.0)
    found = merge_tensor("w", {"a": delta}, settings)
    assert found.tolist() == [0, 0, 0, 0, 0, -6, 7, -8, 0, 0]


@pytest.mark.parametrize("method", ["dare_linear", "della"])
def test_dropping_at_random_is_right_on_average(method: str) -> None:
    deltas = {"a": np.asarray([[0.5, -1.0, 2.0], [3.0, 0.0, -0.25]])}
    draws = [
        merge_tensor("w", deltas, MergeSettings(method=method, density=0.4, seed=seed))
        for seed in range(4000)
    ]
    # An entry x is x / p with probability p, so its mean strays by |x| sqrt((1 - p) / p / 4000).
    kept = 0.4 if method == "dare_linear" else 0.3
    stray = np.abs(deltas["a"]) * math.sqrt((1 - kept) / kept / 4000)
    assert (np.abs(np.mean(draws, axis=0) - deltas["a"]) <= 4.5 * stray).all()


@given(SEEDS, st.sampled_from(["dare_linear", "dare_ties", "della"]))
def test_what_is_dropped_depends_on_seed_tensor_and_source_alone(seed: int, method: str) -> None:
    delta = np.ones((6, 50), np.float32)
    settings = MergeSettings(method=method, seed=seed)

    def kept(tensor: str, source: str) -> NDArray[np.bool_]:
        return merge_tensor(tensor, {source: delta}, settings) != 0

    again = merge_tensor("w", {"z": np.zeros_like(delta), "a": delta}, settings) != 0
    assert np.array_equal(kept("w", "a"), kept("w", "a"))
    assert np.array_equal(kept("w", "a"), again)
    other = MergeSettings(method=method, seed=seed + 1)
    for drawn in (
        kept("v", "a"),
        kept("w", "b"),
        merge_tensor("w", {"a": delta}, other) != 0,
    ):
        assert not np.array_equal(kept("w", "a"), drawn)


def test_della_keeps_large_entries_of_a_row_more_often() -> None:
    delta = np.tile(np.arange(1.0, 6.0), (4000, 1))
    settings = MergeSettings(method="della", density=0.5, epsilon=0.4)
    kept = (merge_tensor("w", {"a": delta}, settings) != 0).mean(axis=0)
    assert kept == pytest.approx([0.1, 0.3, 0.5, 0.7, 0.9], abs=0.04)


def test_sce_is_the_energy_weighted_mean_when_all_is_selected_and_signs_agree() -> None:
    found = merge(ZERO, AGREEING, whole("sce"))
    for name in ("w", "b"):
        rows = np.stack([delta[name] for delta in AGREEING.values()]).astype(np.float64)
        energy = np.square(rows).reshape(3, -1).mean(axis=1)
        wanted = np.tensordot(energy / energy.sum(), rows, axes=1)
        assert found[name] == pytest.approx(wanted, abs=1e-6)


def test_sce_takes_the_entries_on_which_the_sources_differ_most_and_erases_minorities() -> None:
    deltas = {"a": np.asarray([4.0, 1.0, 1.0, 1.0]), "b": np.asarray([-3.0, 1.1, 1.0, 1.0])}
    found = merge_tensor("w", deltas, MergeSettings(method="sce", density=0.25))
    assert found.tolist() == [4.0, 0, 0, 0]


# ------------------------------------------------------------------------------- Fisher
def test_equal_fisher_information_is_linear_and_where_there_is_none_too() -> None:
    for value in (0.0, 2.5):
        same = {n: {k: np.full_like(v, value) for k, v in ZERO.items()} for n in DELTAS}
        found = merge(ZERO, DELTAS, MergeSettings(method="fisher"), fisher=same)
        close(found, merge(ZERO, DELTAS, "linear"))


def test_fisher_follows_the_one_source_that_knows() -> None:
    sure = {n: {k: np.full_like(v, n == "b") for k, v in ZERO.items()} for n in DELTAS}
    close(merge(ZERO, DELTAS, MergeSettings(method="fisher"), fisher=sure), DELTAS["b"])


# ------------------------------------------------------------------------------- angles
@given(SEEDS, st.floats(0, 1))
def test_slerp_stays_on_the_sphere_and_ends_at_its_ends(seed: int, t: float) -> None:
    rng = np.random.default_rng(seed)
    a, b = (x / np.linalg.norm(x) for x in rng.normal(size=(2, 3, 4)))

    def at(share: float) -> NDArray[np.float64]:
        weights = {"a": 1 - share, "b": share}
        return merge_tensor("w", {"a": a, "b": b}, MergeSettings(method="slerp", weights=weights))

    assert np.linalg.norm(at(t)) == pytest.approx(1, abs=1e-9)
    assert at(0.0) == pytest.approx(a, abs=1e-9)
    assert at(1.0) == pytest.approx(b, abs=1e-9)


@given(SEEDS, st.integers(1, 5))
def test_karchers_mean_has_the_mean_length_and_no_tangent_left(seed: int, count: int) -> None:
    rng = np.random.default_rng(seed)
    rows = rng.normal(size=(count, 12)) + 1.5  # in one half space, where the mean is one point
    names = "abcde"[:count]
    found = merge_tensor("w", dict(zip(names, rows, strict=True)), MergeSettings(method="karcher"))
    lengths = np.linalg.norm(rows, axis=1)
    assert np.linalg.norm(found) == pytest.approx(lengths.mean())
    centre, units = found / np.linalg.norm(found), rows / lengths[:, None]
    angles = np.arccos(np.clip(units @ centre, -1, 1))
    logs = [
        angle * (u - np.cos(angle) * centre) / np.sin(angle) if angle > 1e-7 else 0 * u
        for angle, u in zip(angles, units, strict=True)
    ]
    assert np.linalg.norm(np.mean(logs, axis=0)) < 1e-6


def test_karcher_of_two_of_one_length_is_their_slerp() -> None:
    a, b = (x / np.linalg.norm(x) for x in np.random.default_rng(0).normal(size=(2, 7)))
    for share in (0.2, 0.5, 0.9):
        weights = {"a": 1 - share, "b": share}
        found = [
            merge_tensor("w", {"a": a, "b": b}, MergeSettings(method=m, weights=weights))
            for m in ("slerp", "karcher")
        ]
        assert found[0] == pytest.approx(found[1], abs=1e-8)


def test_around_the_origin_whole_models_are_turned() -> None:
    base = np.asarray([1.0, 0.0])
    deltas = {"a": np.asarray([0.0, 0.0]), "b": np.asarray([-1.0, 1.0])}
    for method in ("slerp", "karcher"):
        settings = MergeSettings(method=method, around="origin")
        found = base + merge_tensor("w", deltas, settings, base=base)
        assert found == pytest.approx([math.sqrt(0.5)] * 2)


@pytest.mark.parametrize("cosine", [-0.5, 0.0, 0.3, 1.0])
def test_model_stock_shrinks_the_mean_by_the_papers_ratio(cosine: float) -> None:
    a, b = np.asarray([1.0, 0.0]), np.asarray([cosine, math.sqrt(1 - cosine**2)])
    found = merge_tensor("w", {"a": a, "b": b}, MergeSettings(method="model_stock"))
    wanted = max(0, 2 * cosine / (1 + cosine)) * (a + b) / 2
    assert found == pytest.approx(wanted, abs=1e-12)


# ------------------------------------------------------------------------------- matrices
def wudi_objective(x: NDArray[np.float64], deltas: list[NDArray[np.float64]]) -> float:
    return sum(
        float(np.square((x - d) @ d.T).sum() / np.square(d).sum()) for d in deltas if d.any()
    )


@given(SEEDS, st.integers(1, 4), st.sampled_from([1e-5, 1e-2, 1.0]))
def test_wudi_disturbs_no_more_than_the_mean_or_the_sum(
    seed: int, count: int, learning_rate: float
) -> None:
    rng = np.random.default_rng(seed)
    deltas = [rng.normal(size=(4, 6)) * rng.uniform(0.01, 1) for _ in range(count)]
    settings = MergeSettings(method="wudi", iterations=30, learning_rate=learning_rate)
    found = merge_tensor("w", dict(zip("abcd", deltas, strict=False)), settings)
    reached = wudi_objective(found, deltas)
    assert reached <= wudi_objective(sum(deltas), deltas) + 1e-12
    assert reached <= wudi_objective(sum(deltas) / count, deltas) + 1e-12


def test_wudi_finds_the_sum_of_sources_that_do_not_meet_and_else_nears_the_best() -> None:
    apart = [np.diag([1.0, 2.0, 0, 0]), np.diag([0, 0, 3.0, 1.0])]
    found = merge_tensor("w", dict(zip("ab", apart, strict=True)), MergeSettings(method="wudi"))
    assert found == pytest.approx(sum(apart), abs=1e-12)
    meeting = list(np.random.default_rng(0).normal(size=(3, 4, 6)))
    grams = [d.T @ d / np.square(d).sum() for d in meeting]
    best = sum(d @ g for d, g in zip(meeting, grams, strict=True)) @ np.linalg.inv(sum(grams))
    settings = MergeSettings(method="wudi", iterations=2000, learning_rate=1e-2)
    found = merge_tensor("w", dict(zip("abc", meeting, strict=True)), settings)
    assert wudi_objective(found, meeting) < wudi_objective(best, meeting) + 1e-3


def test_wudi_is_adam_by_torch_on_the_papers_objective() -> None:
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(3)
    deltas = [0.1 * rng.normal(size=(3, 5)) + np.eye(3, 5) * k for k in (0.5, -0.4)]
    tensors = [torch.from_numpy(d) for d in deltas]
    x = torch.from_numpy(sum(deltas).copy()).requires_grad_()
    optimizer = torch.optim.Adam([x], lr=1e-3)
    for _ in range(20):
        loss = sum(((x - d) @ d.T).square().sum() / d.square().sum() for d in tensors)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    settings = MergeSettings(method="wudi", iterations=20, learning_rate=1e-3)
    found = merge_tensor("w", dict(zip("ab", deltas, strict=True)), settings)
    assert found == pytest.approx(x.detach().numpy(), abs=1e-9)


def test_iso_c_keeps_directions_and_evens_out_their_strength() -> None:
    deltas = dict(zip("ab", np.random.default_rng(1).normal(size=(2, 4, 6)), strict=True))
    found = merge_tensor("w", deltas, MergeSettings(method="iso_c"))
    strengths = np.linalg.svd(sum(deltas.values()), compute_uv=False)
    assert np.linalg.svd(found, compute_uv=False) == pytest.approx([strengths.mean()] * 4)
    assert np.trace(found.T @ sum(deltas.values())) == pytest.approx(
        strengths.mean() * strengths.sum()
    )


def test_tsv_of_sources_that_do_not_meet_is_their_sum() -> None:
    apart = {"a": np.diag([1.0, 2.0, 0, 0]), "b": np.diag([0, 0, 3.0, 1.0])}
    found = merge_tensor("w", apart, MergeSettings(method="tsv"))
    assert found == pytest.approx(sum(apart.values()))
    vectors = {"a": np.asarray([1.0, 2.0]), "b": np.asarray([3.0, 0.0])}
    assert merge_tensor("b", vectors, MergeSettings(method="tsv")).tolist() == [2.0, 1.0]


# ------------------------------------------------------------------------------- weights
def test_weights_are_taken_as_given_and_told() -> None:
    weights = {"a": 0.1, "b": 1.0, "c": 0.0}
    for method, factor in (("linear", 1.0), ("task_arithmetic", 0.5)):
        settings = MergeSettings(method=method, weights=weights)
        found = merge(ZERO, DELTAS, settings)
        wanted = {k: factor * (0.1 * DELTAS["a"][k] + DELTAS["b"][k]) for k in ZERO}
        close(found, wanted)
        effective = settings.effective_weights(list("abc"))
        assert effective == {n: factor * w for n, w in weights.items()}
    divided = MergeSettings(method="linear", weights=weights, normalize=True)
    assert divided.effective_weights(list("abc"))["b"] == pytest.approx(1 / 1.1)
    close(
        merge(ZERO, DELTAS, divided),
        {k: (0.1 * DELTAS["a"][k] + DELTAS["b"][k]) / 1.1 for k in ZERO},
    )


@pytest.mark.parametrize("method", [m for m in METHODS if MERGES[m].shares == "ratio"])
def test_of_ratio_weights_only_the_ratio_counts(method: str) -> None:
    deltas = some(method)
    found = [
        merge(
            ZERO,
            deltas,
            MergeSettings(method=method, weights={n: k * (i + 1) for i, n in enumerate(deltas)}),
            fisher=fisher_for(method, deltas),
        )
        for k in (0.25, 8.0)
    ]
    close(*found)
    equal = merge(ZERO, deltas, MergeSettings(method=method), fisher=fisher_for(method, deltas))
    assert not all(np.allclose(found[0][name], equal[name]) for name in equal)


def test_subtract_gives_back_what_merge_added() -> None:
    base, tuned = state(0), state(9)
    close(merge(base, [subtract(tuned, base)], "linear"), tuned)


# ------------------------------------------------------------------------------- refusals
@pytest.mark.parametrize(
    ("deltas", "method", "says"),
    [
        (DELTAS, "magic", "unknown merge"),
        ([], "ties", "0 deltas"),
        (DELTAS, "slerp", "got 3 deltas; wanted 2: take karcher"),
        ([{"w": DELTAS["a"]["w"]}], "ties", "do not share"),
        ([{**DELTAS["a"], "b": np.zeros(4, np.float32)}], "linear", "has shape"),
        ({"a": {**DELTAS["a"], "b": np.full(3, np.nan, np.float32)}}, "linear", "b of a holds NaN"),
        (DELTAS, "fisher", "no Fisher information"),
    ],
)
def test_what_does_not_fit_the_base_is_refused(
    deltas: dict[str, State] | list[State], method: str, says: str
) -> None:
    with pytest.raises(MergeError, match=says):
        merge(state(0), deltas, method)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"method": "linear", "density": 0.5}, "linear does not read density; it reads weight"),
        ({"method": "ties", "seed": 1, "gamma": 0.1}, "does not read gamma, seed; .* density"),
        ({"method": "sce", "weights": {"a": 1.0}}, "does not read weights"),
        ({"method": "ties", "normalize": True}, "does not read normalize"),
        ({"method": "ties", "around": "origin"}, "does not read around"),
        ({"method": "ties", "density": 0.0}, "density is 0; wanted"),
        ({"method": "ties", "density": 1.5}, "density is 1.5; wanted"),
        ({"method": "ties", "density": math.nan}, "density is nan; wanted"),
        ({"method": "della", "density": 0.95, "epsilon": 0.1}, "density 0.95 and 0.1 beside"),
        ({"method": "della", "density": 0.1, "epsilon": 0.1}, "density above epsilon"),
        ({"method": "breadcrumbs", "density": 0.9, "gamma": 0.2}, "density 0.9 and 0.2"),
        ({"method": "dare_ties", "seed": -1}, "seed is -1"),
        ({"method": "wudi", "learning_rate": 0.0}, "learning_rate is 0"),
        ({"method": "linear", "weight": math.inf}, "a weight is inf"),
        ({"method": "linear", "weights": {"a": math.nan}}, "a weight is nan"),
    ],
)
def test_settings_that_say_nothing_are_refused(given: dict[str, object], says: str) -> None:
    with pytest.raises(MergeError, match=says):
        MergeSettings(**given)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"method": "linear", "weights": {"a": 1.0}}, r"differ in \['b', 'c'\]"),
        ({"method": "ties", "weights": {"a": 1.0, "b": -1.0, "c": 1.0}}, "at least 0"),
        ({"method": "ties", "weights": dict.fromkeys("abc", 0.0)}, "not all 0"),
        (
            {"method": "linear", "weights": {"a": 1.0, "b": -1.0, "c": 0.0}, "normalize": True},
            "sum to 0",
        ),
        ({"method": "slerp"}, "take karcher"),
    ],
)
def test_weights_that_do_not_fit_the_sources_are_refused(
    given: dict[str, object], says: str
) -> None:
    with pytest.raises(MergeError, match=says):
        merge(ZERO, DELTAS, MergeSettings(**given))


def test_fisher_information_goes_by_source_to_method_fisher_only() -> None:
    known = {name: {k: np.ones_like(v) for k, v in ZERO.items()} for name in DELTAS}
    with pytest.raises(MergeError, match="only to it"):
        merge(ZERO, DELTAS, "linear", fisher=known)
    with pytest.raises(MergeError, match="by source too"):
        merge(ZERO, list(DELTAS.values()), "fisher", fisher=known)
    known["a"]["w"][0] = -1
    with pytest.raises(MergeError, match=r"w of a has shape .* below 0"):
        merge(ZERO, DELTAS, "fisher", fisher=known)
    with pytest.raises(MergeError, match="give the base"):
        merge_tensor("w", {"a": ZERO["w"]}, MergeSettings(method="karcher", around="origin"))
    with pytest.raises(MergeError, match="beside settings"):
        merge(ZERO, DELTAS, MergeSettings(method="linear"), weight=1.0)
