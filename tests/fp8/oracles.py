"""What the quantisers are held against, tables of all codes and blocks spelled out, and on what."""

import itertools
from collections.abc import Mapping
from typing import Final

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import pad

from fp8.formats import E2M1, E4M3, E5M2, E8M0, FloatFormat, decode
from fp8.quantize import Quantized
from fp8.recipe import ROW, TENSOR, QuantSpec

SPECS: Final = {
    "block": QuantSpec(),
    "block e5m2": QuantSpec(format=E5M2),
    "tile": QuantSpec(block=(128, 128)),
    "row": QuantSpec(block=ROW),
    "tensor": QuantSpec(block=TENSOR, format=E5M2),
    "mxfp8": QuantSpec(block=(1, 32)),
    "mxfp4": QuantSpec(block=(1, 32), format=E2M1),
    "tile16 e2m1": QuantSpec(block=(16, 16), format=E2M1),
    "block fp32": QuantSpec(scale_format="fp32"),
    "tile fp32": QuantSpec(block=(128, 128), scale_format="fp32"),
    "row fp32": QuantSpec(block=ROW, scale_format="fp32"),
    "tensor fp32": QuantSpec(block=TENSOR, scale_format="fp32", format=E5M2),
    "nvfp4": QuantSpec(block=(1, 16), format=E2M1, scale_format="e4m3"),
    "nvfp4 tensor": QuantSpec(block=(1, 16), format=E2M1, scale_format="e4m3", outer=TENSOR),
    "nvfp4 tile": QuantSpec(block=(16, 16), format=E2M1, scale_format="e4m3", outer=TENSOR),
    "e4m3 by e4m3": QuantSpec(block=(1, 16), scale_format="e4m3"),
}
ONE_LEVEL: Final = {n: s for n, s in SPECS.items() if s.scale_format != "e4m3"}
POWERS: Final = {n: s for n, s in SPECS.items() if s.scale_format == "power_of_two"}


def magnitudes(fmt: FloatFormat) -> Tensor:
    """Every finite value of the format from its definition, in order, in float64; 0 but for E8M0.

    The order is that of the codes: an even place is an even code.
    """
    if fmt is E8M0:
        return 2.0 ** torch.arange(-127.0, 128.0, dtype=torch.float64)
    steps = 2**fmt.mantissa_bits
    below = [k * fmt.smallest_subnormal for k in range(steps)]
    normal = (
        fmt.smallest_normal * 2.0**e * (1 + k / steps)
        for e, k in itertools.product(range(64), range(steps))
    )
    return torch.tensor([*below, *(v for v in normal if v <= fmt.max)], dtype=torch.float64)


def nearest(x: Tensor, fmt: FloatFormat) -> Tensor:
    """Round to the nearest value of the table, ties to the even code, saturating; in float64."""
    table, magnitude = magnitudes(fmt), x.double().abs()
    above = torch.searchsorted(table, magnitude).clamp(max=len(table) - 1)
    below = (above - 1).clamp(min=0)
    up, down = table[above] - magnitude, magnitude - table[below]
    take_up = (up < down) | ((up == down) & (above % 2 == 0))
    return torch.where(take_up, table[above], table[below]) * x.sign()


def neighbours(x: Tensor, fmt: FloatFormat) -> tuple[Tensor, Tensor]:
    """The values of the table at or below x and at or above it, in float64."""
    table = magnitudes(fmt)
    table = torch.cat([-table[1:].flip(0), table])
    above = torch.searchsorted(table, x.double().clamp(-fmt.max, fmt.max))
    below = torch.where(table[above] == x, above, above - 1)
    return table[below], table[above]


def sides(shape: tuple[int, ...], spec: QuantSpec) -> tuple[int, int]:
    """Rows and columns of a block of a matrix of that shape."""
    rows, columns = spec.block
    return rows or shape[0] or 1, columns or shape[1] or 1


def block_amax(x: Tensor, spec: QuantSpec) -> Tensor:
    """The largest absolute value of each block, as zero padding would give it."""
    rows, columns = sides(tuple(x.shape), spec)
    x = pad(x.abs(), (0, -x.shape[1] % columns, 0, -x.shape[0] % rows))
    return x.view(x.shape[0] // rows, rows, -1, columns).amax((1, 3))


def spread(scale: Tensor, shape: tuple[int, ...], spec: QuantSpec) -> Tensor:
    """One scale per element, from one per block."""
    rows, columns = sides(shape, spec)
    return scale.repeat_interleave(rows, 0).repeat_interleave(columns, 1)[: shape[0], : shape[1]]


def sample(shape: tuple[int, ...], seed: int, exponent: int = 0) -> Tensor:
    """Values over 24 binades below 2**exponent or so; many ties, some zeros."""
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=rng, dtype=torch.float64)
    x = x * torch.exp2(torch.randint(-24, 1, shape, generator=rng).double())
    coarse = torch.rand(shape, generator=rng) < 0.3  # five bits of mantissa: ties are common
    mantissa, power = torch.frexp(x)
    x = torch.where(coarse, torch.ldexp((mantissa * 32).round() / 32, power), x)
    x = x * (torch.rand(shape, generator=rng) > 0.05)
    return (x * 2.0**exponent).clamp(-3.4e38, 3.4e38).float()


def as_bytes(codes: Tensor) -> Tensor:
    """Codes to compare bit by bit."""
    return codes.view(torch.uint8)


seeds = st.integers(0, 2**31)
exponents = st.integers(-140, 118)  # all magnitudes that fp32 has
middling = st.integers(-80, 80)  # no scale is clamped, no scale factor overflows
shapes = st.sampled_from(
    [(1, 1), (3, 128), (5, 129), (20, 33), (130, 300), (128, 96), (129, 7), (17, 16)]
)
formats = pytest.mark.parametrize("fmt", [E4M3, E5M2, E2M1], ids=lambda fmt: fmt.name)


def each(specs: Mapping[str, QuantSpec]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("spec", specs.values(), ids=specs.keys())


def law(examples: int) -> settings:
    return settings(max_examples=examples, deadline=None)


def element_scale(q: Quantized, shape: tuple[int, ...]) -> Tensor:
    """What each element was divided by, in float64 (an fp32 product, where there are two)."""
    scale = spread(q.scale, shape, q.spec)
    return (scale if q.outer is None else scale * q.outer).double()


def values_of(q: Quantized, columns: int) -> Tensor:
    """The numbers that the codes are, without scales."""
    return decode(q.codes, q.spec.format)[:, :columns]
