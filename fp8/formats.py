"""Small float formats as numbers, and their codes.

Sources: E4M3 and E5M2, FP8 Formats for Deep Learning (arXiv 2209.05433); E2M1 and E8M0, the OCP
Microscaling Formats specification 1.0. Two E2M1 codes share a byte, the first in the low half.
"""

import itertools
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor
from torch.nn.functional import pad


@dataclass(frozen=True, slots=True, kw_only=True)
class FloatFormat:
    """A small float format."""

    name: str
    dtype: torch.dtype
    max: float
    """Largest finite value."""
    mantissa_bits: int
    smallest_normal: float

    @property
    def smallest_subnormal(self) -> float:
        """The step between neighbours at and below smallest_normal."""
        return self.smallest_normal * 2.0**-self.mantissa_bits

    def __reduce__(self) -> str:
        """Copy and unpickle to the one object of that name: formats are compared by identity."""
        return self.name


# 254 finite codes and two NaN; no infinity.
E4M3: Final = FloatFormat(
    name="E4M3", dtype=torch.float8_e4m3fn, max=448.0, mantissa_bits=3, smallest_normal=2.0**-6
)
# 248 finite codes, two infinities, six NaN.
E5M2: Final = FloatFormat(
    name="E5M2", dtype=torch.float8_e5m2, max=57344.0, mantissa_bits=2, smallest_normal=2.0**-14
)
# 16 finite codes: 0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives.
E2M1: Final = FloatFormat(
    name="E2M1", dtype=torch.float4_e2m1fn_x2, max=6.0, mantissa_bits=1, smallest_normal=1.0
)
# A scale, not a value: 2**-127 to 2**127 without sign or zero, and one NaN.
E8M0: Final = FloatFormat(
    name="E8M0",
    dtype=torch.float8_e8m0fnu,
    max=2.0**127,
    mantissa_bits=0,
    smallest_normal=2.0**-127,
)

_E2M1_VALUES: Final = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def encode(values: Tensor, fmt: FloatFormat) -> Tensor:
    """Return the codes of values; those between two codes go to the nearest, ties to even.

    Args: values: float32 [..., N] within +-fmt.max, or NaN. E2M1 has no NaN: give none.
    Returns: fmt.dtype, [..., N]; for E2M1 [..., ceil(N / 2)] bytes of two codes.
    """
    if fmt is not E2M1:
        return values.to(fmt.dtype)
    middle = torch.tensor(
        [(a + b) / 2 for a, b in itertools.pairwise(_E2M1_VALUES)],
        device=values.device,
    )
    magnitude = values.abs()
    # Ties: the middle below an odd code belongs to the even one beneath it, and the other way up.
    low = torch.bucketize(magnitude, middle)
    high = torch.bucketize(magnitude, middle, right=True)
    nibbles = torch.where(low % 2 == 0, low, high).to(torch.uint8)
    nibbles = nibbles | (torch.signbit(values).to(torch.uint8) << 3)
    nibbles = pad(nibbles, (0, nibbles.shape[-1] % 2))
    return (nibbles[..., 0::2] | (nibbles[..., 1::2] << 4)).view(fmt.dtype)


def decode(codes: Tensor, fmt: FloatFormat) -> Tensor:
    """Return the values of codes in float32; for E2M1 twice as many as there are bytes."""
    if fmt is not E2M1:
        return codes.float()
    table = torch.tensor(_E2M1_VALUES, device=codes.device)
    table = torch.cat([table, -table])
    packed = codes.view(torch.uint8).int()
    return torch.stack([table[packed & 15], table[packed >> 4]], -1).flatten(-2)
