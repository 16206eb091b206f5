"""Laws of the E4M3 block quantisers. `nearest` is the oracle: a table of all codes, no cast."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fp8.formats import E4M3
from fp8.quantize import (
    block_scale,
    dequantize,
    fake_quantize,
    fake_quantize_128x128,
    quantize_1x128,
    quantize_128x128,
)
from fp8.recipe import BlockScaling

P2 = BlockScaling()
FP32 = BlockScaling(scale_format="fp32")
both_recipes = pytest.mark.parametrize("recipe", [P2, FP32], ids=["p2", "fp32"])
FINITE_CODES = torch.tensor([c for c in range(256) if c & 0x7F != 0x7F], dtype=torch.uint8)
VALUES = FINITE_CODES.view(E4M3.dtype).double()
POSITIVE = VALUES[:127]  # 0 and up, in order

# Blocks of any magnitude fp32 has, with values scattered over many binades, zeros and ties.
seeds = st.integers(0, 2**31)
exponents = st.integers(-140, 118)
shapes = st.sampled_from([(1, 1), (3, 128), (5, 129), (130, 300), (2, 3, 200), (128, 96), (257, 7)])


def sample(shape: tuple[int, ...], seed: int, exponent: int) -> Tensor:
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=rng, dtype=torch.float64)
    x = x * torch.exp2(torch.randint(-24, 1, shape, generator=rng).double())
    coarse = torch.rand(shape, generator=rng) < 0.3  # five bits of mantissa: ties are common
    mantissa, power = torch.frexp(x)
    x = torch.where(coarse, torch.ldexp((mantissa * 32).round() / 32, power), x)
    x = x * (torch.rand(shape, generator=rng) > 0.05)
    return (x * 2.0**exponent).clamp(-3.4e38, 3.4e38).float()


def nearest(x: Tensor) -> Tensor:
    """Round to the nearest value of the table, ties to the even code, saturating; in float64."""
    magnitude = x.double().abs()
    above = torch.searchsorted(POSITIVE, magnitude).clamp(max=126)
    below = (above - 1).clamp(min=0)
    up, down = POSITIVE[above] - magnitude, magnitude - POSITIVE[below]
    take_up = (up < down) | ((up == down) & (above % 2 == 0))
    return torch.where(take_up, POSITIVE[above], POSITIVE[below]) * x.sign()


def test_all_finite_codes_come_back() -> None:
    for exponent in (-100, -9, 0, 5, 100):
        x = torch.stack([VALUES, VALUES]).float() * 2.0**exponent
        wide = BlockScaling(block=254)  # 448 is in the block, so the scale is 2**exponent
        q = quantize_1x128(x, wide)
        assert (q.scale == 2.0**exponent).all()
        assert torch.equal(q.codes[0].view(torch.uint8), FINITE_CODES)
        assert torch.equal(dequantize(q), x)
        assert torch.equal(fake_quantize(x, wide), x)


@both_recipes
@settings(max_examples=80, deadline=None)
@given(shape=shapes, seed=seeds, exponent=exponents)
def test_arithmetic_rounding_is_the_cast(
    recipe: BlockScaling, shape: tuple[int, ...], seed: int, exponent: int
) -> None:
    x = sample(shape, seed, exponent)
    assert torch.equal(fake_quantize(x, recipe), dequantize(quantize_1x128(x, recipe)))
    by_columns = dequantize(quantize_1x128(x.transpose(-1, -2), recipe)).transpose(-1, -2)
    assert torch.equal(fake_quantize(x, recipe, dim=-2), by_columns)
    if x.ndim == 2:
        tiles = dequantize(quantize_128x128(x, recipe))
        assert torch.equal(fake_quantize_128x128(x, recipe), tiles)


@settings(max_examples=50, deadline=None)
@given(shape=shapes, seed=seeds, exponent=exponents)
def test_the_cast_is_the_nearest_code_ties_to_even(
    shape: tuple[int, ...], seed: int, exponent: int
) -> None:
    x = sample(shape, seed, exponent)
    q = quantize_1x128(x)
    scale = q.scale.repeat_interleave(128, -1)[..., : shape[-1]]
    assert torch.equal(q.codes.double(), nearest(x.double() / scale.double()))


def test_every_midpoint_goes_to_the_even_code() -> None:
    midpoints = (POSITIVE[1:] + POSITIVE[:-1]) / 2
    x = torch.cat([midpoints, torch.tensor([448.0], dtype=torch.float64)]).float()[None]
    even = torch.where(torch.arange(126) % 2 == 0, POSITIVE[:-1], POSITIVE[1:])
    recipe = BlockScaling(block=127)
    assert torch.equal(fake_quantize(x, recipe)[0, :-1].double(), even)
    assert torch.equal(quantize_1x128(x, recipe).codes[0, :-1].double(), even)


@both_recipes
@settings(max_examples=40, deadline=None)
@given(seed=seeds, exponent=exponents)
def test_quantisation_is_odd_and_monotone(recipe: BlockScaling, seed: int, exponent: int) -> None:
    x = sample((4, 128), seed, exponent).sort(-1).values
    y = fake_quantize(x, recipe)
    assert torch.equal(fake_quantize(-x, recipe), -y)
    assert bool((y.diff(dim=-1) >= 0).all())


@both_recipes
@settings(max_examples=40, deadline=None)
@given(seed=seeds, exponent=st.integers(-100, 118))
def test_the_error_is_at_most_half_a_step(recipe: BlockScaling, seed: int, exponent: int) -> None:
    x = sample((6, 300), seed, exponent)
    scale = quantize_1x128(x, recipe).scale.repeat_interleave(128, -1)[:, :300].double()
    bound = torch.maximum(2.0**-4 * x.double().abs(), 2.0**-10 * scale)
    slack = 1.0 if recipe is P2 else 1 + 1e-5  # x / scale itself rounds unless scale is 2**k
    assert bool(((fake_quantize(x, recipe).double() - x.double()).abs() <= bound * slack).all())


@given(amax=st.floats(2.0**-117, 3.4028234663852886e38, width=32))
def test_a_power_of_two_scale_is_the_smallest_that_fits(amax: float) -> None:
    scale = float(block_scale(torch.tensor([amax])))
    assert torch.frexp(torch.tensor(scale))[0] == 0.5
    assert 224 < amax / scale <= 448


@settings(max_examples=300)
@given(amax=st.floats(2.0**-117, 3.4028234663852886e38, width=32))
def test_an_fp32_scale_puts_the_largest_value_on_448(amax: float) -> None:
    x = torch.tensor([[amax, -amax, amax / 2]])
    assert quantize_1x128(x, FP32).codes.double().tolist() == [[448.0, -448.0, 224.0]]


@both_recipes
@pytest.mark.parametrize("amax", [1e-45, 1e-38, 2e-36, 1.3e36, 3e38])
def test_tiny_and_huge_blocks_stay_finite(recipe: BlockScaling, amax: float) -> None:
    x = torch.linspace(-1, 1, 128)[None] * amax
    y = fake_quantize(x, recipe)
    assert bool(y.isfinite().all())
    assert float((y - x).abs().max()) <= max(amax / 16, 2.0**-135)
    assert torch.equal(y, dequantize(quantize_1x128(x, recipe)))


@both_recipes
def test_a_zero_block_has_scale_one_and_stays_zero(recipe: BlockScaling) -> None:
    x = torch.zeros(2, 256)
    x[0, 128:] = 3.0
    q = quantize_1x128(x, recipe)
    assert q.scale[1].tolist() == [1.0, 1.0]
    assert q.scale[0, 0] == 1.0
    assert torch.equal(fake_quantize(x, recipe), x)


@both_recipes
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_infinity_are_never_hidden(recipe: BlockScaling, bad: float) -> None:
    x = torch.ones(130, 260)
    x[1, 130] = bad
    for y in (fake_quantize(x, recipe), dequantize(quantize_1x128(x, recipe))):
        assert bool(y[1, 128:256].isnan().all())
        assert int(y.isnan().sum()) == 128
    for y in (fake_quantize_128x128(x, recipe), dequantize(quantize_128x128(x, recipe))):
        assert bool(y[:128, 128:256].isnan().all())
        assert int(y.isnan().sum()) == 128 * 128


@settings(max_examples=40, deadline=None)
@given(seed=seeds, shift=st.integers(-60, 60))
def test_scaling_by_two_to_the_k_moves_only_the_scales(seed: int, shift: int) -> None:
    x = sample((5, 300), seed, 0)
    x[:, ::50] = 1.0  # a scale of 1 marks zero blocks and would not move
    one, other = quantize_1x128(x), quantize_1x128(x * 2.0**shift)
    assert torch.equal(one.codes.view(torch.uint8), other.codes.view(torch.uint8))
    assert torch.equal(one.scale * 2.0**shift, other.scale)


@settings(max_examples=40, deadline=None)
@given(shape=shapes, seed=seeds, exponent=exponents)
def test_quantising_twice_is_quantising_once(
    shape: tuple[int, ...], seed: int, exponent: int
) -> None:
    once = fake_quantize(sample(shape, seed, exponent))
    assert torch.equal(fake_quantize(once), once)


@both_recipes
@settings(max_examples=30, deadline=None)
@given(seed=seeds, rows=st.integers(1, 300), columns=st.integers(1, 300))
def test_ragged_equals_padded_with_zeros(
    recipe: BlockScaling, seed: int, rows: int, columns: int
) -> None:
    x = sample((rows, columns), seed, 0)
    padded = torch.zeros(384, 384)
    padded[:rows, :columns] = x
    for quantise in (
        lambda t: fake_quantize(t, recipe),
        lambda t: fake_quantize(t, recipe, dim=0),
        lambda t: fake_quantize_128x128(t, recipe),
    ):
        assert torch.equal(quantise(x), quantise(padded)[:rows, :columns])
    assert quantize_1x128(x, recipe).scale.shape == (rows, -(-columns // 128))


@both_recipes
def test_square_tiles_transpose_exactly(recipe: BlockScaling) -> None:
    w = sample((200, 300), 0, 0)
    one, other = quantize_128x128(w, recipe), quantize_128x128(w.t(), recipe)
    assert torch.equal(one.codes.view(torch.uint8).t(), other.codes.view(torch.uint8))
    assert torch.equal(one.scale.t(), other.scale)


def test_rows_do_not_see_each_other() -> None:
    x = sample((64, 200), 0, 0)
    order = torch.randperm(64, generator=torch.Generator().manual_seed(0))
    assert torch.equal(fake_quantize(x[order]), fake_quantize(x)[order])
    assert torch.equal(fake_quantize(x[3:4]), fake_quantize(x)[3:4])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_are_upcast_before_scaling(dtype: torch.dtype) -> None:
    x = sample((7, 200), 3, 0).to(dtype)
    y = fake_quantize(x)
    assert y.dtype == torch.float32
    assert torch.equal(y, fake_quantize(x.float()))
    assert torch.equal(y.bfloat16().float(), y)  # power-of-two scales: exact in bf16


def test_views_and_empty_tensors_are_fine() -> None:
    x = sample((130, 260), 4, 0)
    assert torch.equal(fake_quantize(x[:, ::2]), fake_quantize(x[:, ::2].contiguous()))
    assert torch.equal(
        fake_quantize(x[:1].expand(200, 260), dim=0), fake_quantize(x[:1].repeat(200, 1), dim=0)
    )
    for dim in (0, 1):
        assert fake_quantize(torch.empty(0, 256), dim=dim).shape == (0, 256)


def test_the_source_is_left_alone() -> None:
    x = sample((130, 260), 5, 0)
    before = x.clone()
    for recipe in (P2, FP32):
        fake_quantize(x, recipe)
        fake_quantize_128x128(x[:128, :256], recipe)
        quantize_1x128(x, recipe)
        quantize_128x128(x[:128, :256], recipe)
    assert torch.equal(x, before)


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"block": 0}, "block"),
        ({"scale_format": "e8m0"}, "scale_format"),
        ({"gemm": "fp16"}, "gemm"),
        ({"gemm": "bfloat16", "scale_format": "fp32"}, "power_of_two"),
    ],
)
def test_a_recipe_without_meaning_is_refused(settings: dict[str, object], word: str) -> None:
    with pytest.raises(ValueError, match=word):
        BlockScaling(**settings)  # type: ignore[arg-type]
