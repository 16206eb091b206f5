"""Laws of rounding at random."""

from unittest import mock

import pytest
import torch
from hypothesis import given
from torch import Tensor

from fp8.formats import E2M1, FloatFormat, decode
from fp8.quantize import Quantized, dequantize, fake_quantize, quantize
from fp8.recipe import QuantSpec
from tests.fp8.oracles import (
    as_bytes,
    element_scale,
    formats,
    law,
    middling,
    neighbours,
    sample,
    seeds,
    values_of,
)


def at_random(fmt: FloatFormat) -> QuantSpec:
    return QuantSpec(format=fmt, block=(1, 32), stochastic=True)


@formats
def test_rounding_at_random_is_right_on_average(fmt: FloatFormat) -> None:
    torch.manual_seed(0)
    x = torch.cat([torch.randn(31), torch.tensor([6.0])])[None]
    times = 20_000
    y = fake_quantize(x.expand(times, 32), at_random(fmt)).double()
    scale = element_scale(quantize(x, at_random(fmt)), (1, 32))
    below, above = (v * scale for v in neighbours(x / scale, fmt))
    deviation = ((x - below) * (above - x) / times).sqrt()
    assert bool(((y.mean(0) - x).abs() <= 4 * deviation + 1e-12).all())
    assert bool(((y == below) | (y == above)).all())


@formats
@law(25)
@given(seed=seeds, exponent=middling)
def test_rounding_at_random_gives_a_neighbour(fmt: FloatFormat, seed: int, exponent: int) -> None:
    x = sample((9, 100), seed, exponent)
    torch.manual_seed(seed)
    q = quantize(x, at_random(fmt))
    below, above = neighbours(x / element_scale(q, (9, 100)), fmt)
    values = values_of(q, 100).double()
    assert bool(((values == below) | (values == above)).all())


@formats
@pytest.mark.parametrize("draw", [0.0, 1 - 2.0**-24], ids=["least", "largest"])
def test_a_value_that_has_a_code_is_never_moved(fmt: FloatFormat, draw: float) -> None:
    codes = torch.arange(256, dtype=torch.uint8)[None].view(fmt.dtype)
    x = decode(codes, fmt)
    x = x[x.isfinite()][None]
    spec = QuantSpec(format=fmt, block=(1, 512), stochastic=True)
    with mock.patch("torch.rand_like", lambda t: torch.full_like(t, draw)):
        assert torch.equal(fake_quantize(x, spec), x)
        assert torch.equal(dequantize(quantize(x, spec)), x)


@pytest.mark.parametrize("scale_format", ["power_of_two", "e4m3"])
def test_the_same_seed_gives_the_same_codes(scale_format: str) -> None:
    spec = QuantSpec(format=E2M1, block=(1, 16), scale_format=scale_format, stochastic=True)  # type: ignore[arg-type]
    x, found = sample((64, 128), 0), []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        found.append(as_bytes(quantize(x, spec).codes))
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])
    torch.manual_seed(1)
    assert torch.equal(fake_quantize(x, spec), dequantize(_seeded(x, spec)))


def _seeded(x: Tensor, spec: QuantSpec) -> Quantized:
    torch.manual_seed(1)
    return quantize(x, spec)
