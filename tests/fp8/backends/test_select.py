import pytest
import torch

from fp8.backends.base import UnsupportedBackendError
from fp8.backends.select import BY_NAME, available, select
from fp8.recipe import RECIPES

CPU = torch.device("cpu")


@pytest.mark.parametrize("name", RECIPES)
def test_auto_takes_one_that_can_and_names_the_reasons_of_the_others(name: str) -> None:
    backend, why = select(RECIPES[name](), 64, 32, CPU)
    can = dict(available(RECIPES[name](), CPU))
    assert can.keys() == BY_NAME.keys()
    assert can[backend.name] is None
    assert can["scaled_mm"]
    assert can["scaled_mm"] in why


@pytest.mark.parametrize("name", ["scaled_mm", "transformer_engine"])
def test_one_that_is_named_and_cannot_is_an_error_with_a_remedy(name: str) -> None:
    with pytest.raises(UnsupportedBackendError, match=r"64 x 32 layer on cpu: .*; use backend="):
        select(RECIPES["block"](backend=name), 64, 32, CPU)


def test_the_emulation_can_be_asked_for() -> None:
    assert select(RECIPES["block"](backend="emulated"), 64, 32, CPU) == (BY_NAME["emulated"], "")
