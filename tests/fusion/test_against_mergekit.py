"""Merges equal mergekit's, wherever both have the method and mean the same by it.

mergekit is the extra `mergekit`; without it nothing here runs. What is called differently there,
or is another thing (measured with 0.1.5):

- `lambda` is our weight; `weight` a source's weight; `int8_mask` (coarser votes) stays off.
- `normalize` divides by the weights' sum, or in elections by those of the sources that agree. Our
  linear and task_arithmetic never do so unasked, our elections always do: there it is set.
- ties, breadcrumbs and sce keep int(density * N) entries, ours the nearest whole number, at least
  one, and all of equal size: densities here make N * density whole, and entries differ.
- sce's share is `select_topk`.
- dare and della there rescale to the delta's L1 norm as it was (`rescale`); ours divide by the
  keep probability, as the papers, so that each entry is right on average. What is dropped at
  random differs anyway: they are compared where nothing is.
- slerp and karcher there turn whole models, ours with around="origin". Karcher there stops after
  10 steps or at 1e-5 unless told otherwise.
- model_stock there wants two models beside the base; a negative mean cosine, which ours takes as
  0, goes through its ratio.
"""

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from fusion.merge import MergeSettings, merge_tensor

mergekit = pytest.importorskip("mergekit.merge_methods")
torch = pytest.importorskip("torch")

NAMES = "abcd"
SEEDS = st.integers(0, 2**32 - 1)
Array = NDArray[np.float64]


def models(seed: int, count: int, shape: tuple[int, ...] = (8, 10)) -> tuple[Array, list[Array]]:
    """A base, and models that have something in common."""
    rng = np.random.default_rng(seed)
    base, shared = rng.normal(size=shape), 0.5 * rng.normal(size=shape)
    return base, [base + 0.3 * (shared + rng.normal(size=shape)) for _ in range(count)]


def theirs(method: str, base: Array | None, tuned: list[Array], **parameters: object) -> Array:
    tensors = [torch.from_numpy(x) for x in ([] if base is None else [base]) + tuned]
    found = mergekit.merge_tensors(
        tensors, method, parameters=parameters, base_index=None if base is None else 0
    )
    return np.asarray(found)


def ours(base: Array, tuned: list[Array], asked: MergeSettings) -> Array:
    deltas = {name: model - base for name, model in zip(NAMES, tuned, strict=False)}
    return base + merge_tensor("w", deltas, asked, base=base)


def by_name(weights: list[float]) -> dict[str, float]:
    return dict(zip(NAMES, weights, strict=False))


def same(found: Array, wanted: Array) -> None:
    assert np.abs(found - wanted).max() <= 1e-6


WEIGHTS = [0.5, 1.0, 0.25]
DENSITIES = [0.1, 0.25, 0.5, 1.0]


@given(SEEDS, st.booleans())
@settings(max_examples=10, deadline=None)
def test_linear(seed: int, normalize: bool) -> None:
    base, tuned = models(seed, 3)
    asked = MergeSettings(method="linear", weights=by_name(WEIGHTS), normalize=normalize)
    wanted = theirs("linear", None, tuned, weight=WEIGHTS, normalize=normalize)
    if not normalize:  # theirs is a sum of models; the base is then in it 1.75 times
        wanted = wanted - (sum(WEIGHTS) - 1) * base
    same(ours(base, tuned, asked), wanted)


@given(SEEDS, st.booleans(), st.sampled_from([0.5, 1.0]))
@settings(max_examples=10, deadline=None)
def test_task_arithmetic(seed: int, normalize: bool, weight: float) -> None:
    base, tuned = models(seed, 3)
    asked = MergeSettings(
        method="task_arithmetic", weights=by_name(WEIGHTS), normalize=normalize, weight=weight
    )
    how = {"weight": WEIGHTS, "normalize": normalize, "lambda": weight}
    same(ours(base, tuned, asked), theirs("task_arithmetic", base, tuned, **how))


@given(SEEDS, st.sampled_from(DENSITIES), st.sampled_from([0.5, 1.0]))
@settings(max_examples=20, deadline=None)
def test_ties(seed: int, density: float, weight: float) -> None:
    base, tuned = models(seed, 3)
    asked = MergeSettings(method="ties", weights=by_name(WEIGHTS), density=density, weight=weight)
    how = {"weight": WEIGHTS, "normalize": True, "lambda": weight, "density": density}
    same(ours(base, tuned, asked), theirs("ties", base, tuned, **how))


@given(SEEDS, st.sampled_from(["dare_linear", "dare_ties", "della"]))
@settings(max_examples=10, deadline=None)
def test_random_drops_that_drop_nothing(seed: int, method: str) -> None:
    base, tuned = models(seed, 3)
    rank = {"epsilon": 0.0} if method == "della" else {}
    asked = MergeSettings(method=method, weights=by_name(WEIGHTS), density=1.0, **rank)
    how = {"weight": WEIGHTS, "normalize": method != "dare_linear", "density": 1.0, **rank}
    same(ours(base, tuned, asked), theirs(method, base, tuned, **how))


@given(SEEDS, st.sampled_from([0.25, 0.5]), st.sampled_from([0.1, 0.25]))
@settings(max_examples=20, deadline=None)
def test_breadcrumbs(seed: int, density: float, gamma: float) -> None:
    base, tuned = models(seed, 3)
    asked = MergeSettings(
        method="breadcrumbs", weights=by_name(WEIGHTS), density=density, gamma=gamma, weight=1.0
    )
    how = {"weight": WEIGHTS, "normalize": False, "density": density, "gamma": gamma}
    same(ours(base, tuned, asked), theirs("breadcrumbs", base, tuned, **how))


@given(SEEDS, st.sampled_from(DENSITIES))
@settings(max_examples=20, deadline=None)
def test_sce(seed: int, density: float) -> None:
    base, tuned = models(seed, 3)
    asked = MergeSettings(method="sce", density=density)
    same(ours(base, tuned, asked), theirs("sce", base, tuned, select_topk=density))


@given(SEEDS, st.integers(2, 4))
@settings(max_examples=20, deadline=None)
def test_model_stock(seed: int, count: int) -> None:
    base, tuned = models(seed, count)
    units = [(model - base).ravel() / np.linalg.norm(model - base) for model in tuned]
    assume(np.square(sum(units)).sum() > count)  # the mean cosine of two is above 0
    asked = MergeSettings(method="model_stock")
    same(ours(base, tuned, asked), theirs("model_stock", base, tuned))


@given(SEEDS, st.sampled_from([0.0, 0.3, 0.5, 1.0]))
@settings(max_examples=20, deadline=None)
def test_slerp_of_whole_models(seed: int, t: float) -> None:
    base, tuned = models(seed, 2)
    asked = MergeSettings(method="slerp", weights=by_name([1 - t, t]), around="origin")
    same(ours(base, tuned, asked), theirs("slerp", tuned[0], tuned[1:], t=t))


@given(SEEDS, st.integers(1, 4))
@settings(max_examples=20, deadline=None)
def test_karcher_of_whole_models(seed: int, count: int) -> None:
    base, tuned = models(seed, count)
    asked = MergeSettings(method="karcher", around="origin")
    wanted = theirs("karcher", None, tuned, max_iter=200, tol=1e-10)
    same(ours(base, tuned, asked), wanted)
