"""Split tensors into codes and one scale per block, and undo it.

`quantize` makes codes, the thing to store and to feed to hardware. `fake_quantize` gives what
`dequantize` would give back, by arithmetic and without codes: on a CPU that is the faster way.
NaN or infinity anywhere in a block makes the whole block NaN: the cast alone would hide infinity
as the largest code. The caller sees it in the loss. No gradient passes through; the layer's
backward is its own.
"""

import itertools
import math
from collections.abc import Iterator
from typing import Final, NamedTuple

import torch
from torch import Tensor

from fp8.formats import E2M1, E4M3, E5M2, FloatFormat, decode, encode
from fp8.recipe import Block, QuantSpec
from fp8.rounding import round_at_random, round_to_nearest, rounding_in_one

DEFAULT: Final = QuantSpec()

# fp32 bit patterns.
_MANTISSA_BITS: Final = 23
_MANTISSA_MASK: Final = 0x7FFFFF
_TINY: Final = torch.finfo(torch.float32).tiny
# Between these scales a block can be rounded without being scaled: every normal value of the
# format has its exponent in its own bits (below, fp32 is subnormal), and no sum overflows.
_LOWEST_SCALE_IN_PLACE: Final = 2.0**-110
_HIGHEST_SCALE_IN_PLACE: Final = 2.0**80

# Between the exponent biases of fp16 and E4M3.
_LIFT: Final = 2.0**8


class Quantized(NamedTuple):
    """A matrix as codes and scales: block (i, j) stands for codes * scale[i, j]."""

    codes: Tensor
    """[R, C] of spec.format.dtype; two to a byte, [R, ceil(C / 2)], for E2M1."""
    scale: Tensor
    """float32, one per block: [ceil(R / rows), ceil(C / columns)]; e4m3 scales too."""
    spec: QuantSpec
    outer: Tensor | None = None
    """float32, what e4m3 scales are multiplied by: [R, 1] or [1, 1]."""
    columns: int | None = None
    """C, where packed codes do not tell."""


def block_scale(amax: Tensor, spec: QuantSpec = DEFAULT) -> Tensor:
    """Return the scale of blocks whose largest absolute value is amax.

    Args: amax: float32, at least 0, any shape.
    Returns: float32 like amax; 1 where amax is 0; NaN where it is not finite. amax / scale is at
        most spec.format.max (an fp32 scale: but for its rounding), so no cast ever has to
        saturate; it is above half of it for a power of two, unless scale is clamped at 2**-126.
    """
    if spec.scale_format == "fp32":
        scale = (amax / spec.format.max).clamp_(min=_TINY)
    else:
        scale = _power_of_two(amax, spec.format.max)
    # amax * 0 is 0, or NaN for NaN and infinity; amax == 0 has no block to scale.
    return scale.masked_fill_(amax == 0, 1.0).add_(amax * 0.0)


def quantize(x_RC: Tensor, spec: QuantSpec = DEFAULT, *, amax: Tensor | None = None) -> Quantized:
    """Quantise a matrix; blocks at its edges may be short.

    Args: x_RC: any float dtype; it is up-cast before scaling. amax: what to take for the largest
        value of every block; larger ones saturate. Give NaN where x is not finite: with amax
        given nobody looks.
    Returns: x is restored to within max(2**-(m+1) * |x|, subnormal / 2 * scale) by `dequantize`,
        m the format's bits of mantissa; twice that when rounding is stochastic. A block whose
        e4m3 scale is subnormal (14,000 times below its outer one) may clip by a third.
    """
    if x_RC.ndim != 2:
        raise ValueError(f"quantize takes a matrix; found shape {tuple(x_RC.shape)}: flatten it")
    source = x_RC.detach().float()
    values = torch.empty_like(source, memory_format=torch.contiguous_format)
    scale, outer = _empty_scale(source, spec, 1), _outer_scale(source, spec, 1)
    for x, unit, own in _blocks((source, values, scale), spec.block, 1):
        _set_scale(x, own, spec, outer, amax)
        whole = own if outer is None else own * _at(outer, own)
        unit.copy_(x)
        if spec.scale_format == "power_of_two":  # then the same, and faster
            unit.mul_(whole.reciprocal())
        else:
            unit.div_(whole)
    if amax is not None or spec.scale_format != "power_of_two":
        values.clamp_(-spec.format.max, spec.format.max)
    if spec.stochastic:
        round_at_random(values, spec.format)
    columns = x_RC.shape[1] if spec.format is E2M1 else None
    return Quantized(encode(values, spec.format), scale, spec, outer, columns)


def dequantize(q: Quantized) -> Tensor:
    """Return codes * scale in float32; exact when the scales are powers of two."""
    values = _values(q.codes, q.spec.format)
    if q.columns is not None:
        values = values[:, : q.columns].contiguous()
    lift = _LIFT if q.spec.format is E4M3 else 1.0
    if lift > 1 and _overflows(q.scale * lift):
        values, lift = values * lift, 1.0
    for block, own in _blocks((values, q.scale), q.spec.block, 1):
        block.mul_(own * lift)
        if q.outer is not None:
            block.mul_(_at(q.outer, own))
    return values


def fake_quantize(
    x: Tensor,
    spec: QuantSpec = DEFAULT,
    dim: int = -1,
    *,
    amax: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Return what quantising x in blocks along `dim` and dequantising it gives.

    Equal as numbers to `dequantize(quantize(x))` for dim -1, and to that of the transpose for the
    other axis of a matrix; a zero loses its sign.

    Args: x: any shape and float dtype; tiles of several rows need a matrix. dim: the axis that
        the GEMM sums over. amax: as for `quantize`. dtype: of the result; bfloat16 holds it
        exactly if spec.exact_in_bfloat16.
    Returns: the shape of x, new.
    """
    rounding = None if spec.stochastic else rounding_in_one(x.device)
    source, dim = x.detach() if rounding else x.detach().float(), dim % x.ndim
    out = torch.empty(x.shape, dtype=dtype if rounding else torch.float32, device=x.device)
    scale, outer = _empty_scale(source, spec, dim), _outer_scale(source, spec, dim)
    for block, rounded, own in _blocks((source, out, scale), spec.block, dim):
        if rounding:
            _set_scale(block, own, spec, outer, amax)
            whole = own if outer is None else own * _at(outer, own)
            inverse = whole.reciprocal() if spec.scale_format == "power_of_two" else None
            rounding(block, whole, inverse, spec.format, rounded)
            continue
        _set_scale(block, own, spec, outer, amax)
        if amax is None and _is_in_place(own, spec):
            round_to_nearest(block, own * spec.format.smallest_normal, spec.format, rounded)
            continue
        whole = own if outer is None else own * _at(outer, own)
        torch.div(block, whole, out=rounded)
        rounded.clamp_(-spec.format.max, spec.format.max)
        if spec.stochastic:
            round_at_random(rounded, spec.format)
        else:
            normal = torch.full_like(own, spec.format.smallest_normal)
            round_to_nearest(rounded, normal, spec.format, rounded)
        rounded.mul_(whole)
    return out.to(dtype)


def _power_of_two(amax: Tensor, largest: float) -> Tensor:
    """The smallest power of two s with amax / s <= largest, at least 2**-126.

    amax <= largest * 2**k exactly when its mantissa does not pass that of `largest`: adding what
    lies above it carries into the exponent for every larger one, without division or logarithm.
    """
    mantissa, exponent = math.frexp(largest)
    carry = _MANTISSA_MASK - int((mantissa * 2 - 1) * 2**_MANTISSA_BITS)
    power = ((amax.view(torch.int32) + carry) >> _MANTISSA_BITS) - (exponent - 1)
    return (power.clamp_(min=1) << _MANTISSA_BITS).view(torch.float32)


def _set_scale(
    x: Tensor, own: Tensor, spec: QuantSpec, outer: Tensor | None, amax: Tensor | None
) -> None:
    """Write the scales of blocks x [n, rows, m, columns] to own [n, 1, m, 1]."""
    if amax is not None:
        if outer is not None:
            raise ValueError("amax was given, but e4m3 scales have two levels: leave it out")
        own.copy_(block_scale(amax.float(), spec).expand_as(own))
        return
    largest = _largest(x, tuple(range(1, x.ndim, 2)))
    if outer is None:
        own.copy_(block_scale(largest, spec))
        return
    wanted = largest / spec.format.max / _at(outer, own)
    rounded = wanted.clamp(E4M3.smallest_subnormal, E4M3.max).to(E4M3.dtype).float()
    own.copy_(rounded.masked_fill_(largest == 0, 1.0).add_(largest * 0.0))


def _largest(x: Tensor, axes: tuple[int, ...]) -> Tensor:
    """The largest magnitude along axes, kept as 1, in float32; NaN if there is one."""
    if x.dtype != torch.float32:
        return x.abs().amax(axes, keepdim=True).float()
    # Two readings of x cost less than |x|, whose memory would be new every time; torch's maximum
    # of 16-bit floats is so slow that there it is the other way round.
    return torch.maximum(x.amax(axes, keepdim=True), -x.amin(axes, keepdim=True))


def _outer_scale(x: Tensor, spec: QuantSpec, dim: int) -> Tensor | None:
    """Second-level scales, so that the first-level ones fit E4M3; None if there is one level."""
    if spec.scale_format != "e4m3":
        return None
    axes = tuple(range(x.ndim)) if spec.outer[0] is None else (dim,)
    largest = _largest(x, axes) if x.numel() else torch.zeros([1] * x.ndim, device=x.device)
    scale = _power_of_two(largest, spec.format.max * E4M3.max)
    return scale.masked_fill_(largest == 0, 1.0).add_(largest * 0.0)


def _is_in_place(scale: Tensor, spec: QuantSpec) -> bool:
    if spec.scale_format != "power_of_two" or spec.stochastic:
        return False
    lowest, highest = torch.aminmax(scale)
    return bool(lowest >= _LOWEST_SCALE_IN_PLACE) and bool(highest <= _HIGHEST_SCALE_IN_PLACE)


def _values(codes: Tensor, fmt: FloatFormat) -> Tensor:
    """The values of codes, those of E4M3 divided by _LIFT; float32, new.

    Both 8-bit formats are fp16 with bits missing: a shift is six times as fast as torch's cast.
    E4M3's NaN is lost, and comes back with the scale of its block.
    """
    if fmt is E4M3:
        wide = codes.view(torch.int8).to(torch.int16).bitwise_left_shift_(7)
        return wide.bitwise_and_(~0x4000).view(torch.float16).float()
    if fmt is E5M2:
        return (
            codes.view(torch.int8)
            .to(torch.int16)
            .bitwise_left_shift_(8)
            .view(torch.float16)
            .float()
        )
    return decode(codes, fmt)


def _overflows(scale: Tensor) -> bool:
    """Whether to lift values before scaling them; a compiler fuses that, and cannot look."""
    return torch.compiler.is_compiling() or bool(scale.isinf().any())


def _empty_scale(x: Tensor, spec: QuantSpec, dim: int) -> Tensor:
    counts = [
        sum(count for _, count, _ in _segments(size, width))
        for size, width in zip(x.shape, _widths(x.ndim, spec.block, dim), strict=True)
    ]
    return torch.empty(counts, dtype=torch.float32, device=x.device)


def _blocks(tensors: tuple[Tensor, ...], block: Block, dim: int) -> Iterator[tuple[Tensor, ...]]:
    """Cut tensors of one shape, and last their scales, into parts whose blocks are all whole.

    Two parts an axis instead of padding: the short last block would cost a copy of everything.
    Yields: views [n, rows, m, columns] of the tensors and [n, 1, m, 1] of the scales.
    """
    *same, scale = tensors
    sizes, widths = same[0].shape, _widths(same[0].ndim, block, dim)
    axes = [_segments(size, width) for size, width in zip(sizes, widths, strict=True)]
    for part in itertools.product(*axes):
        views, own = list(same), scale
        for axis, (start, count, width) in reversed(list(enumerate(part))):
            views = [
                torch.unflatten(v.narrow(axis, start, count * width), axis, (count, width))
                for v in views
            ]
            own = own.narrow(axis, start and own.shape[axis] - count, count).unsqueeze(axis + 1)
        yield *views, own


def _segments(size: int, width: int | None) -> list[tuple[int, int, int]]:
    """Cut an axis into whole blocks and the short last one: (start, blocks, width) of each."""
    if size == 0:
        return []
    if width is None or width >= size:
        return [(0, 1, size)]
    whole, rest = size // width, size % width
    return [(0, whole, width)] + ([(whole * width, 1, rest)] if rest else [])


def _widths(ndim: int, block: Block, dim: int) -> list[int | None]:
    rows, columns = block
    if rows is not None and rows > 1 and ndim != 2:
        raise ValueError(f"tiles of {rows} rows need a matrix; found {ndim} dimensions")
    return [columns if axis == dim else rows for axis in range(ndim)]


def _at(outer: Tensor, own: Tensor) -> Tensor:
    """View second-level scales beside first-level ones [n, 1, m, 1]."""
    for axis in range(own.ndim // 2):
        outer = outer.unsqueeze(2 * axis + 1)
    return outer
