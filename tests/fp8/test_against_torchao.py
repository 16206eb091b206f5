"""Our codes beside those of torchao 0.18, where it is installed: it is no dependency of ours."""

import pytest
import torch
from torch import Tensor

from fp8.formats import E4M3, E5M2, FloatFormat
from fp8.quantize import dequantize, quantize
from fp8.recipe import MXFP8, NVFP4, ROW, TENSOR, Block, QuantSpec, ScaleFormat

pytest.importorskip("torchao", reason="torchao is not installed: pip install 'torchao==0.18.*'")
from torchao.float8.config import ScalingGranularity
from torchao.float8.float8_utils import tensor_to_scale, to_fp8_saturated
from torchao.prototype.mx_formats.config import ScaleCalculationMode
from torchao.prototype.mx_formats.mx_tensor import to_mx
from torchao.prototype.mx_formats.nvfp4_tensor import nvfp4_quantize

# They multiply by max / amax or its like, we divide by amax / max: the last place of fp32 tips the
# codes of values on a border, of which bf16, with its 8 bits, has many.
TIPPED = 1e-3


def sample(seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(256, 384, generator=rng)
    return (x * torch.exp2(torch.randint(-10, 6, (256, 1), generator=rng).float())).to(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("scale_format", ["power_of_two", "fp32"])
@pytest.mark.parametrize("fmt", [E4M3, E5M2], ids=lambda f: f.name)
@pytest.mark.parametrize("block", [ROW, TENSOR], ids=str)
def test_row_and_tensor_wise_codes_are_torchaos(
    block: Block, fmt: FloatFormat, scale_format: ScaleFormat, dtype: torch.dtype
) -> None:
    x = sample(dtype=dtype)
    per_row = block == ROW
    encode_scale = tensor_to_scale(
        x,
        fmt.dtype,
        scaling_granularity=(
            ScalingGranularity.AXISWISE if per_row else ScalingGranularity.TENSORWISE
        ),
        axiswise_dim=-1 if per_row else None,
        round_scales_to_power_of_2=scale_format == "power_of_two",
    )
    theirs = to_fp8_saturated(x.float() * encode_scale, fmt.dtype)
    ours = quantize(x, QuantSpec(format=fmt, block=block, scale_format=scale_format))
    if scale_format == "power_of_two":
        assert torch.equal(ours.scale.flatten(), encode_scale.reciprocal().flatten())
        assert torch.equal(ours.codes.view(torch.uint8), theirs.view(torch.uint8))
    else:
        torch.testing.assert_close(
            ours.scale.flatten(), encode_scale.reciprocal().flatten(), rtol=1e-6, atol=0.0
        )
        assert float((ours.codes.float() != theirs.float()).float().mean()) <= TIPPED


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_mxfp8_codes_and_scales_are_torchaos_when_it_rounds_scales_up(dtype: torch.dtype) -> None:
    x = sample(1, dtype)
    scale, codes = to_mx(x, E4M3.dtype, 32, ScaleCalculationMode.RCEIL)
    ours = quantize(x, MXFP8().input)
    assert torch.equal(ours.codes.view(torch.uint8), codes.view(torch.uint8))
    assert torch.equal(ours.scale, scale.float())


def test_torchaos_default_mxfp8_scales_saturate_where_ours_do_not() -> None:
    x = sample(2)
    scale, codes = to_mx(x, E4M3.dtype, 32, ScaleCalculationMode.FLOOR)
    ours = quantize(x, MXFP8().input)
    ratio = (ours.scale / scale.float()).unique().tolist()
    assert set(ratio) == {1.0, 2.0}  # rounded down, an amax of 1.75 to 2 does not fit
    largest = x.float().abs().unflatten(1, (-1, 32)).amax(-1)
    theirs = codes.float() * scale.float().repeat_interleave(32, 1)
    for values, within in ((dequantize(ours), True), (theirs, False)):
        kept = values.abs().unflatten(1, (-1, 32)).amax(-1)
        assert bool(((kept - largest).abs() <= largest * 2**-4).all()) is within


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_nvfp4_codes_and_scales_are_torchaos_with_our_second_level_scale(
    dtype: torch.dtype,
) -> None:
    """But for the smallest scales: theirs stop at E4M3's smallest normal, ours go below it."""
    x = sample(3, dtype)
    ours = quantize(x, NVFP4(outer="tensor").input)
    assert ours.outer is not None
    scale, codes = nvfp4_quantize(x, 16, ours.outer)
    normal = ours.scale >= E4M3.smallest_normal
    assert 0.5 < float(normal.float().mean()) < 1
    assert torch.equal(ours.scale[normal], scale.float()[normal])
    assert bool((scale.float()[~normal] == E4M3.smallest_normal).all())
    two_codes = normal.repeat_interleave(8, 1)
    found, wanted = (t.view(torch.uint8)[two_codes] for t in (ours.codes, codes))
    assert float((found != wanted).float().mean()) <= 2 * TIPPED  # two codes to a byte
