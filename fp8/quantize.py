"""Split tensors into E4M3 codes and one scale per block, and undo it.

`quantize_*` make codes, the thing to store and to feed to hardware. `fake_quantize*` give what
`dequantize` would give back, by arithmetic and without codes: torch's up-cast from 8 bits costs
about five times as much on a CPU as the whole of it.
NaN or infinity anywhere in a block makes the whole block NaN: the cast alone would hide infinity
as 448. The caller sees it in the loss. No gradient passes through; the layer's backward is its own.
Shapes: M, N = rows, columns; m, n = blocks along them, the last one maybe short.
"""

from typing import Final, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from fp8.formats import E4M3
from fp8.recipe import BlockScaling

DEFAULT: Final = BlockScaling()

# fp32 bit patterns.
_EXPONENT_MASK: Final = 0x7F800000
_MANTISSA_BITS: Final = 23
# amax / 448 <= 2**k exactly when amax <= 1.75 * 2**(k + 8): adding the part of the mantissa above
# 1.75 carries into the exponent for every larger mantissa, without a division or a logarithm.
_CARRY_ABOVE_MAX: Final = 0x1FFFFF
_MAX_EXPONENT: Final = 8
# x + 1.5 * 2**20 * 2**E, with 2**E <= |x| < 2**(E+1), has a last place of 2**(E-3): the addition
# itself rounds x to three bits of mantissa, to nearest even, and the subtraction is exact.
_ROUNDING_SHIFT: Final = 1.5 * 2.0 ** (_MANTISSA_BITS - E4M3.mantissa_bits)
# Between these scales a block can be rounded without being scaled: every E4M3-normal value has its
# exponent in its own bits (below, fp32 is subnormal), and the shift does not overflow.
_LOWEST_SCALE_IN_PLACE: Final = 2.0**-120
_HIGHEST_SCALE_IN_PLACE: Final = 2.0**90


class Quantized(NamedTuple):
    """A tensor as codes and scales: block (i, j) stands for codes * scale[i, j]."""

    codes: Tensor
    """float8_e4m3fn, the shape of the tensor."""
    scale: Tensor
    """float32, one per block: [..., M, n] for 1 x block, [m, n] for block x block."""
    block: tuple[int, int]
    """Rows and columns of a block."""


def block_scale(amax: Tensor, recipe: BlockScaling = DEFAULT) -> Tensor:
    """Return the scale of blocks whose largest absolute value is amax.

    Args: amax: float32, at least 0, any shape.
    Returns: float32 like amax; 1 where amax is 0; NaN where it is not finite. amax / scale is at
        most 448 (an fp32 scale: but for its rounding), so no cast ever has to saturate; it is
        above 224 for a power of two, unless scale is clamped at 2**-126.
    """
    if recipe.scale_format == "power_of_two":
        exponent = (amax.view(torch.int32) + _CARRY_ABOVE_MAX) >> _MANTISSA_BITS
        scale = ((exponent - _MAX_EXPONENT).clamp_(min=1) << _MANTISSA_BITS).view(torch.float32)
    else:
        scale = (amax / E4M3.max).clamp_(min=torch.finfo(torch.float32).tiny)
    # amax * 0 is 0, or NaN for NaN and infinity; amax == 0 has no block to scale.
    return scale.masked_fill_(amax == 0, 1.0).add_(amax * 0.0)


def quantize_1x128(x: Tensor, recipe: BlockScaling = DEFAULT) -> Quantized:
    """Quantise blocks of `recipe.block` along the last axis; the last may be short.

    Args: x: [..., M, N], any float dtype; it is up-cast before scaling.
    Returns: x is restored to within max(2**-4 * |x|, 2**-10 * scale) by `dequantize`; what rounds
        to more than fp32 can hold (|x| above 3.29e38) comes back as infinity.
    """
    columns = _block_count(x.shape[-1], recipe.block)
    padded = pad(x.detach().float(), (0, columns * recipe.block - x.shape[-1]))
    blocks = padded.reshape(*x.shape[:-1], columns, recipe.block)
    scale = block_scale(blocks.abs().amax(-1), recipe)
    codes = (blocks / scale.unsqueeze(-1)).to(E4M3.dtype).flatten(-2)
    return Quantized(codes[..., : x.shape[-1]].contiguous(), scale, (1, recipe.block))


def quantize_128x128(w_MN: Tensor, recipe: BlockScaling = DEFAULT) -> Quantized:
    """Quantise square tiles of a matrix; the transpose has the same codes, transposed."""
    tiles_mbnb = _tiles(w_MN.detach().float(), recipe.block)
    scale_mn = block_scale(tiles_mbnb.abs().amax((1, 3)), recipe)
    codes = (tiles_mbnb / scale_mn[:, None, :, None]).to(E4M3.dtype).flatten(2).flatten(0, 1)
    M, N = w_MN.shape
    return Quantized(codes[:M, :N].contiguous(), scale_mn, (recipe.block, recipe.block))


def dequantize(q: Quantized) -> Tensor:
    """Return codes * scale in float32; exact when the scales are powers of two."""
    rows, columns = q.block
    M, N = q.codes.shape[-2:] if q.codes.ndim > 1 else (1, q.codes.shape[-1])
    scale = q.scale.repeat_interleave(columns, -1)[..., :N]
    if rows > 1:
        scale = scale.repeat_interleave(rows, -2)[..., :M, :]
    return q.codes.float() * scale


def fake_quantize(x: Tensor, recipe: BlockScaling = DEFAULT, dim: int = -1) -> Tensor:
    """Return what quantising x in 1 x block along `dim` and dequantising it gives.

    Equal as numbers to `dequantize(quantize_1x128(x))` for dim -1; a zero loses its sign.

    Args: x: any shape and float dtype; dim: the axis that the GEMM sums over.
    Returns: float32, the shape of x, new.
    """
    source, out = x.detach().float(), torch.empty(x.shape, dtype=torch.float32, device=x.device)
    size, dim = x.shape[dim], dim % x.ndim
    whole = size - size % recipe.block
    # Two views instead of padding: the short last block would cost a copy of everything.
    if whole:
        shape = (whole // recipe.block, recipe.block)
        part, part_out = source.narrow(dim, 0, whole), out.narrow(dim, 0, whole)
        blocks, blocks_out = (
            torch.unflatten(part, dim, shape),
            torch.unflatten(part_out, dim, shape),
        )
        _round(blocks, (dim + 1,), recipe, blocks_out)
    if size > whole:
        tail = size - whole
        _round(source.narrow(dim, whole, tail), (dim,), recipe, out.narrow(dim, whole, tail))
    return out


def fake_quantize_128x128(w_MN: Tensor, recipe: BlockScaling = DEFAULT) -> Tensor:
    """Return what quantising w in square tiles and dequantising it gives; float32, new."""
    tiles_mbnb = _tiles(w_MN.detach().float(), recipe.block)
    out = torch.empty_like(tiles_mbnb, memory_format=torch.contiguous_format)
    _round(tiles_mbnb, (1, 3), recipe, out)
    M, N = w_MN.shape
    return out.flatten(2).flatten(0, 1)[:M, :N].contiguous()


def _round(x: Tensor, dims: tuple[int, ...], recipe: BlockScaling, out: Tensor) -> None:
    """Write x, rounded to E4M3 with one scale per block (its axes: dims), to out."""
    if x.numel() == 0:
        return
    torch.abs(x, out=out)  # out is scratch until the end: an allocation costs as much as a pass
    scale = block_scale(out.amax(dims, keepdim=True), recipe)
    if recipe.scale_format == "power_of_two" and _is_in_place(scale):
        _round_to_e4m3(x, scale * E4M3.smallest_normal, out)
        return
    _round_to_e4m3(x / scale, torch.full_like(scale, E4M3.smallest_normal), out)
    out.mul_(scale)


def _round_to_e4m3(x: Tensor, smallest_normal: Tensor, out: Tensor) -> None:
    """Round to three bits of mantissa, and below smallest_normal to its eighths."""
    magnitude = torch.bitwise_and(x.view(torch.int32), _EXPONENT_MASK).view(torch.float32)
    # maximum hands NaN on, from x (its exponent bits give infinity) and from the scale.
    torch.maximum(magnitude, smallest_normal, out=magnitude)
    torch.add(x, magnitude, alpha=_ROUNDING_SHIFT, out=out)
    out.sub_(magnitude, alpha=_ROUNDING_SHIFT)


def _is_in_place(scale: Tensor) -> bool:
    lowest, highest = torch.aminmax(scale)
    return bool(lowest >= _LOWEST_SCALE_IN_PLACE) and bool(highest <= _HIGHEST_SCALE_IN_PLACE)


def _block_count(size: int, block: int) -> int:
    return -(-size // block)


def _tiles(w_MN: Tensor, block: int) -> Tensor:
    """View a matrix, padded with zeros, as [m, block, n, block]."""
    M, N = w_MN.shape
    m, n = _block_count(M, block), _block_count(N, block)
    if (m * block, n * block) != (M, N):
        w_MN = pad(w_MN, (0, n * block - N, 0, m * block - M))
    return w_MN.reshape(m, block, n, block)
