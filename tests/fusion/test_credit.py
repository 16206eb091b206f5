from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fusion.credit import ALL, Routing, leave_one_out, summed
from fusion.suspicion import Signs


def routing(seed: int, documents: int) -> tuple[Routing, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    tokens = rng.integers(1, 9, documents)
    offsets = np.concatenate([[0], np.cumsum(tokens)])
    weights = rng.dirichlet([1, 1, 1], size=int(tokens.sum())).astype(np.float32)
    made = Routing(("base", "a", "b"), tokens, summed(weights, offsets))
    return made, weights, np.repeat(np.arange(documents), tokens)


@given(st.integers(0, 50), st.integers(1, 12))
def test_a_share_is_the_mean_weight_over_the_domains_own_tokens(seed: int, documents: int) -> None:
    made, weights, doc_of_row = routing(seed, documents)
    domains = ["x" if doc % 3 else "y" for doc in range(documents)]
    shares = made.shares(domains)
    assert shares.keys() == {ALL, *domains}
    for domain in set(domains):
        rows = np.asarray([domains[doc] == domain for doc in doc_of_row])
        assert list(shares[domain].values()) == pytest.approx(weights[rows].mean(axis=0), abs=1e-5)
    assert list(shares[ALL].values()) == pytest.approx(weights.mean(axis=0), abs=1e-5)
    assert made.shares()[ALL] == pytest.approx(shares[ALL])


def test_a_routing_is_read_back_as_it_was(tmp_path: Path) -> None:
    made, _, _ = routing(3, 5)
    made.save(tmp_path / "routing.npz")
    assert Routing.load(tmp_path / "routing.npz").shares() == made.shares()


def test_domains_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="2 domains for 3 documents"):
        routing(0, 3)[0].shares(["x", "y"])


def test_leaving_out_who_gave_all_loses_all_and_who_gave_nothing_nothing() -> None:
    base, whole = {"x": 2.0, "y": 2.0}, {"x": 1.0, "y": 1.5}
    found = leave_one_out(whole, {"a": base, "b": whole, "c": {"x": 1.5, "y": 1.5}}, base)
    assert found["a"] == {"x": 1.0, "y": 1.0}
    assert found["b"] == {"x": 0.0, "y": 0.0}
    assert found["c"] == {"x": 0.5, "y": 0.0}


def test_where_the_round_gained_nothing_nobody_has_credit() -> None:
    assert leave_one_out({"x": 2.1}, {"a": {"x": 2.5}}, {"x": 2.0}) == {"a": {"x": 0.0}}


def test_who_was_left_out_and_why_is_read_back(tmp_path: Path) -> None:
    made, _, _ = routing(3, 5)
    signs = {"c": Signs(false_nats=3.0, lies=0.2, worst_lie=20.0)}
    told = replace(made, signs=signs, excluded=("c",))
    told.save(tmp_path / "routing.npz")
    back = Routing.load(tmp_path / "routing.npz")
    assert (back.signs, back.excluded) == (signs, ("c",))
    assert back.judged() == {
        "c": {"false_nats": 3.0, "lies": 0.2, "worst_lie": 20.0, "excluded": 1.0}
    }
