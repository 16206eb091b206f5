import numpy as np
import pytest

from fusion.merge import merge, subtract
from fusion.models import ModelSpec, build_model, parameter_arrays
from fusion.pairwise import merge_copies, one_source
from tests.fusion.factories import build, vocabulary_of

SPEC = ModelSpec(architecture="llama", hidden_size=32, layers=1, heads=2, vocab_size=300)


def test_each_run_gets_one_source() -> None:
    cut = [[b"a"]]
    contribution, _ = build(cut, vocabulary_of(cut), top_k=1)
    runs = one_source({"b": contribution, "a": contribution})
    assert list(runs) == ["a", "b"]
    assert all(list(given) == [name] for name, given in runs.items())


@pytest.mark.parametrize("method", ["linear", "task_arithmetic", "ties"])
def test_the_pivot_becomes_the_base_with_the_copies_changes_merged(method: str) -> None:
    pivot = build_model(SPEC, 0)
    base = parameter_arrays(pivot)
    copies = {str(seed): parameter_arrays(build_model(SPEC, seed)) for seed in (1, 2, 3)}
    merge_copies(pivot, dict(reversed(copies.items())), method, weight=0.5)
    wanted = merge(base, [subtract(c, base) for c in copies.values()], method, weight=0.5)
    found = parameter_arrays(pivot)
    assert all(np.array_equal(found[name], wanted[name]) for name in base)


def test_a_copy_of_another_model_is_refused_and_the_pivot_stays() -> None:
    pivot = build_model(SPEC, 0)
    base = parameter_arrays(pivot)
    with pytest.raises(ValueError, match="do not share"):
        merge_copies(pivot, {"a": {"w": np.zeros(3, np.float32)}})
    assert all(np.array_equal(a, parameter_arrays(pivot)[name]) for name, a in base.items())
