"""What the quantisers keep when their input is scaled, cut, padded, permuted or turned."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fp8.formats import E4M3, E5M2, FloatFormat
from fp8.quantize import dequantize, fake_quantize, quantize
from fp8.recipe import QuantSpec
from tests.fp8.oracles import (
    POWERS,
    SPECS,
    as_bytes,
    each,
    exponents,
    law,
    middling,
    sample,
    seeds,
    shapes,
    values_of,
)


@each(SPECS)
@law(8)
@given(seed=seeds, shift=st.integers(-60, 60))
def test_scaling_by_two_to_the_k_moves_only_the_scales(
    spec: QuantSpec, seed: int, shift: int
) -> None:
    x = sample((20, 300), seed)
    x[:, ::8] = 1.0  # a scale of 1 marks zero blocks and would not move
    one, other = quantize(x, spec), quantize(x * 2.0**shift, spec)
    assert torch.equal(as_bytes(one.codes), as_bytes(other.codes))
    if one.outer is None or other.outer is None:
        assert torch.equal(one.scale * 2.0**shift, other.scale)
    else:
        assert torch.equal(one.scale, other.scale)
        assert torch.equal(one.outer * 2.0**shift, other.outer)


@each(POWERS)
@law(10)
@given(shape=shapes, seed=seeds, exponent=exponents)
def test_quantising_twice_is_quantising_once(
    spec: QuantSpec, shape: tuple[int, int], seed: int, exponent: int
) -> None:
    once = fake_quantize(sample(shape, seed, exponent), spec)
    assert torch.equal(fake_quantize(once, spec), once)


@each(SPECS)
@law(8)
@given(seed=seeds, rows=st.integers(1, 140), columns=st.integers(1, 140))
def test_ragged_equals_padded_with_zeros(
    spec: QuantSpec, seed: int, rows: int, columns: int
) -> None:
    x, padded = sample((rows, columns), seed), torch.zeros(256, 256)
    padded[:rows, :columns] = x
    wanted = fake_quantize(padded, spec)[:rows, :columns]
    assert torch.equal(fake_quantize(x, spec), wanted)
    assert torch.equal(dequantize(quantize(x, spec)), wanted)
    assert torch.equal(fake_quantize(x, spec, 0), fake_quantize(padded, spec, 0)[:rows, :columns])


@each({name: spec for name, spec in SPECS.items() if spec.row_independent})
@law(8)
@given(seed=seeds, row=st.integers(0, 63))
def test_a_row_is_quantised_as_if_it_were_alone(spec: QuantSpec, seed: int, row: int) -> None:
    x, y = sample((64, 200), seed), fake_quantize(sample((64, 200), seed), spec)
    order = torch.randperm(64, generator=torch.Generator().manual_seed(seed))
    assert torch.equal(fake_quantize(x[order], spec), y[order])
    assert torch.equal(fake_quantize(x[row : row + 1], spec), y[row : row + 1])
    x[row] *= 1e3  # neither those before nor those after notice
    others = torch.arange(64) != row
    assert torch.equal(fake_quantize(x, spec)[others], y[others])


@each({name: spec for name, spec in SPECS.items() if not spec.row_independent})
def test_rows_that_share_a_scale_do_see_each_other(spec: QuantSpec) -> None:
    x = sample((8, 200), 0)
    before = fake_quantize(x, spec)
    x[7] *= 1e7
    assert not torch.equal(fake_quantize(x, spec)[:7], before[:7])


# Transposes


@each({name: spec for name, spec in SPECS.items() if spec.block[0] == spec.block[1]})
@law(8)
@given(seed=seeds, exponent=middling)
def test_square_tiles_transpose_exactly(spec: QuantSpec, seed: int, exponent: int) -> None:
    w = sample((140, 300), seed, exponent)
    one, other = quantize(w, spec), quantize(w.t(), spec)
    assert torch.equal(values_of(one, 300).t(), values_of(other, 140))
    assert torch.equal(one.scale.t(), other.scale)
    assert torch.equal(fake_quantize(w, spec, dim=0), fake_quantize(w, spec, dim=1))


in_range = st.floats(0, 1)


@pytest.mark.parametrize("fmt", [E4M3, E5M2], ids=lambda fmt: fmt.name)
@pytest.mark.parametrize("width", [128, 32])
@law(15)
@given(seed=seeds, share=in_range, shape=shapes)
def test_requantised_rows_are_the_quantised_columns_while_nothing_is_subnormal(
    fmt: FloatFormat, width: int, seed: int, share: float, shape: tuple[int, int]
) -> None:
    spec = QuantSpec(format=fmt, block=(1, width))
    # amax / scale is above max / 2: what is at least this part of amax is a normal number.
    reach = math.log2(fmt.max / 2 / fmt.smallest_normal)
    rng = torch.Generator().manual_seed(seed)
    sign = torch.randint(2, shape, generator=rng) * 2 - 1
    x = torch.exp2(torch.rand(shape, generator=rng) * reach * share) * sign
    found = fake_quantize(dequantize(quantize(x, spec)).t(), spec)
    assert torch.equal(found, fake_quantize(x.t(), spec))


@pytest.mark.parametrize(
    ("ratio", "least", "most"), [(1, 1.0, 1.001), (200, 1.0, 1.01), (2e4, 1.2, 3.0), (2e6, 20, 50)]
)
def test_requantised_columns_are_as_good_up_to_a_range_of_ten_thousand(
    ratio: float, least: float, most: float
) -> None:
    x = torch.randn(512, 512, generator=torch.Generator().manual_seed(0))
    x[:, ::128] *= ratio  # one outlier channel in every block

    def error(y_CR: Tensor) -> float:
        return float(((y_CR - x.t()).norm(dim=1) / x.t().norm(dim=1)).median())

    via_rows = error(fake_quantize(dequantize(quantize(x)).t()))
    assert least <= via_rows / error(fake_quantize(x.t())) <= most
