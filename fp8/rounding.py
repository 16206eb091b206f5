"""Round float32 to a small format by arithmetic: no cast, no table, the same bits everywhere."""

import functools
import os
from collections.abc import Callable
from typing import Final

import torch
from torch import Tensor

from fp8.formats import FloatFormat

_EXPONENT_MASK: Final = 0x7F800000
_MANTISSA_BITS: Final = 23

_compiled = os.environ.get("FP8_COMPILE") == "1"

Rounding = Callable[[Tensor, Tensor, Tensor | None, FloatFormat, Tensor], None]
"""x, scale, 1 / scale if that is exact, format, out: rounds x / scale and writes it * scale."""


def compile_quantizers(enabled: bool = True) -> None:
    """Round by compiled code in this process, or operation by operation; the bits are the same.

    The first use takes seconds. FP8_COMPILE=1 in the environment switches it on from the start.
    """
    global _compiled
    _compiled = enabled


def round_to_nearest(x: Tensor, normal: Tensor, fmt: FloatFormat, out: Tensor) -> None:
    """Round to the format's bits of mantissa, and below `normal` to its even parts.

    x + 1.5 * 2**(23 - m) * 2**E, with 2**E <= |x| < 2**(E+1), has a last place of 2**(E-m): the
    addition itself rounds x to m bits, to nearest even, and the subtraction is exact.
    """
    shift = _shift(fmt)
    magnitude = torch.bitwise_and(x.view(torch.int32), _EXPONENT_MASK).view(torch.float32)
    # maximum hands NaN on, from x (its exponent bits give infinity) and from the scale.
    torch.maximum(magnitude, normal, out=magnitude)
    torch.add(x, magnitude, alpha=shift, out=out)
    out.sub_(magnitude, alpha=shift)


def round_at_random(x: Tensor, fmt: FloatFormat) -> None:
    """Round x in place to a neighbour, each as likely as the other is far.

    The rest is compared, not added: x / step + 0.9999 may round up to what is two steps away.
    """
    magnitude = torch.bitwise_and(x.view(torch.int32), _EXPONENT_MASK).view(torch.float32)
    step = magnitude.clamp_(min=fmt.smallest_normal).mul_(2.0**-fmt.mantissa_bits)
    below = x.div_(step).floor()
    x.sub_(below)
    torch.add(below, torch.rand_like(x) < x, out=x).mul_(step)


def rounding_in_one(device: torch.device) -> Rounding | None:
    """Return what rounds in one pass on this device; None where step by step is faster.

    That is a CPU that compiles nothing. Inside another's compilation it becomes part of that.
    """
    if torch.compiler.is_compiling() or device.type != "cpu":
        return round_scaled if device.type == "cpu" else round_scaled_by_bits
    return _compiled_rounding() if _compiled else None


def round_scaled(
    x: Tensor, scale: Tensor, inverse: Tensor | None, fmt: FloatFormat, out: Tensor
) -> None:
    """Round x / scale to the format and write its product with scale to out.

    One expression without a look at bits, which a compiler makes one pass of. With c = 2**(23-m)
    + 1 and exact ties, c*u - (c*u - u) is u rounded to m bits of mantissa, to nearest even
    (Veltkamp's splitting; the test compares it with the table of all codes). It must not be
    contracted to fused multiply-adds: inductor's code for CPUs is not, its Triton code may be.
    """
    unit = x.float() / scale if inverse is None else x.float() * inverse
    unit = unit.clamp(-fmt.max, fmt.max)
    split = unit * (2.0 ** (_MANTISSA_BITS - fmt.mantissa_bits) + 1)
    shift = 1.5 * 2.0**_MANTISSA_BITS * fmt.smallest_subnormal
    small = unit.abs() < fmt.smallest_normal
    rounded = torch.where(small, (unit + shift) - shift, split - (split - unit))
    out.copy_(rounded * scale)


def round_scaled_by_bits(
    x: Tensor, scale: Tensor, inverse: Tensor | None, fmt: FloatFormat, out: Tensor
) -> None:
    """Do what `round_scaled` does in a way that fused multiply-adds leave alone.

    The products are by powers of two, or 1.5 times one, and so exact with or without fusing.
    """
    unit = x.float() / scale if inverse is None else x.float() * inverse
    unit = unit.clamp(-fmt.max, fmt.max)
    magnitude = torch.bitwise_and(unit.view(torch.int32), _EXPONENT_MASK).view(torch.float32)
    shift = magnitude.clamp(min=fmt.smallest_normal) * _shift(fmt)
    out.copy_(((unit + shift) - shift) * scale)


@functools.cache
def _compiled_rounding() -> Rounding:
    # Every shape is compiled apart: with shapes left open the code takes six times as long.
    config = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, 256)
    compiled: Rounding = torch.compile(round_scaled, dynamic=False)
    return compiled


def _shift(fmt: FloatFormat) -> float:
    """What, times the power of two below |x|, has its last place where x's is to be."""
    return 1.5 * 2.0 ** (_MANTISSA_BITS - fmt.mantissa_bits)
