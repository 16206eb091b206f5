"""The 8-bit float E4M3: one sign bit, four of exponent, three of mantissa; no infinity.

254 finite codes and two NaN. Source: FP8 Formats for Deep Learning (arXiv 2209.05433).
"""

from dataclasses import dataclass
from typing import Final

import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class FloatFormat:
    """A small float format, as numbers."""

    dtype: torch.dtype
    max: float
    """Largest finite value."""
    mantissa_bits: int
    smallest_normal: float
    smallest_subnormal: float
    """The step between neighbours at and below smallest_normal."""


E4M3: Final = FloatFormat(
    dtype=torch.float8_e4m3fn,
    max=448.0,
    mantissa_bits=3,
    smallest_normal=2.0**-6,
    smallest_subnormal=2.0**-9,
)
