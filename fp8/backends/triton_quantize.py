"""Triton quantisers to E4M3: one read of the source, codes and scales of both directions.

Each kernel gives the codes of `fp8.quantize`. Triton's interpreter (TRITON_INTERPRET=1, set before
this module is imported) runs all of them on a CPU; its casts truncate, so there, and only there,
rounding to nearest even is done by arithmetic.
Scales of 1 x 128 blocks are laid out by blocks, [R, n] with strides (1, R): what the scaled GEMM
of Hopper reads, so nothing has to be copied between quantiser and GEMM.
Shapes: R, C = rows, columns; r, c = blocks of 128 along them, the last one maybe short.
"""
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, import-untyped"
# Triton reads the annotations of kernels itself, so these have none but tl.constexpr.

from collections.abc import Callable
from typing import Any, Final

import torch
import triton
import triton.language as tl
from torch import Tensor

INTERPRETED: Final = bool(triton.knobs.runtime.interpret)
BLOCK: Final = 128

# Constants of kernels. fp32 bit patterns, as in fp8.quantize.
_INTERPRETED = tl.constexpr(INTERPRETED)
_ABS_MASK = tl.constexpr(0x7FFFFFFF)
_EXPONENT_MASK = tl.constexpr(0x7F800000)  # also the bits of infinity
_SIGN_MASK = tl.constexpr(-0x80000000)
_CARRY_ABOVE_MAX = tl.constexpr(0x1FFFFF)
_TINY_BITS = tl.constexpr(0x00800000)
_SMALLEST_NORMAL_BITS = tl.constexpr(0x3C800000)  # 2**-6
_RECIPROCAL_BITS = tl.constexpr(254 << 23)
_ROUNDING_SHIFT = tl.constexpr(1.5 * 2.0**20)
_MAX = tl.constexpr(448.0)
_NAN_CODE = tl.constexpr(0x7F)


@triton.jit
def largest_bits(tile, axis: tl.constexpr):
    """Bits of the largest magnitude along `axis`; as integers NaN > inf > finite, so NaN wins."""
    return tl.max(tile.to(tl.int32, bitcast=True) & _ABS_MASK, axis)


@triton.jit
def scale_of(amax_bits, POWER_OF_TWO: tl.constexpr):
    """Decode scale of a block and, for powers of two, its reciprocal; the rule of block_scale."""
    if POWER_OF_TWO:
        exponent = tl.maximum(((amax_bits + _CARRY_ABOVE_MAX) >> 23) - 8, 1)
        bits = tl.where(amax_bits == 0, 127, exponent) << 23
        scale = bits.to(tl.float32, bitcast=True)
        reciprocal = (-bits + _RECIPROCAL_BITS).to(tl.float32, bitcast=True)
    else:
        amax = amax_bits.to(tl.float32, bitcast=True)
        exact = tl.div_rn(amax, tl.full(amax.shape, _MAX, tl.float32))
        bits = tl.maximum(exact.to(tl.int32, bitcast=True), _TINY_BITS)
        scale = tl.where(amax_bits == 0, 1.0, bits.to(tl.float32, bitcast=True))
        reciprocal = scale  # not used: x / scale and x * (1 / scale) round differently
    is_finite = amax_bits < _EXPONENT_MASK
    nan = float("nan")
    return tl.where(is_finite, scale, nan), tl.where(is_finite, reciprocal, nan)


@triton.jit
def codes_of(tile, scale, reciprocal, POWER_OF_TWO: tl.constexpr):
    """E4M3 codes, as bytes, of tile / scale; scale and reciprocal broadcast to the tile."""
    if POWER_OF_TWO:
        scaled = tile * reciprocal
    else:
        scaled = tl.div_rn(tile, tl.broadcast_to(scale, tile.shape))
    if _INTERPRETED:
        return _rounded_codes(scaled)
    # cvt.rn.satfinite: to nearest even, saturating, NaN to 0x7F.
    return scaled.to(tl.float8e4nv).to(tl.uint8, bitcast=True)


@triton.jit
def _rounded_codes(scaled):
    """Do what the cast of the hardware does; the interpreter's truncates and garbles NaN."""
    # An amax divided by its fp32 scale may land an ulp above 448.
    scaled = tl.clamp(scaled, -_MAX, _MAX, propagate_nan=tl.PropagateNan.ALL)
    bits = scaled.to(tl.int32, bitcast=True)
    magnitude_bits = tl.maximum(bits & _EXPONENT_MASK, _SMALLEST_NORMAL_BITS)
    shift = magnitude_bits.to(tl.float32, bitcast=True) * _ROUNDING_SHIFT
    rounded = (scaled + shift) - shift
    signed = rounded.to(tl.int32, bitcast=True) | (bits & _SIGN_MASK)  # the sum loses that of zero
    codes = signed.to(tl.float32, bitcast=True).to(tl.float8e4nv).to(tl.uint8, bitcast=True)
    return tl.where(scaled == scaled, codes, tl.full(codes.shape, _NAN_CODE, tl.uint8))


@triton.jit
def values_of(codes):
    """Decode bytes to fp32. NaN codes are wrong in the interpreter; a NaN scale covers them."""
    return codes.to(tl.float8e4nv, bitcast=True).to(tl.float32)


@triton.jit
def round_to(x, DTYPE: tl.constexpr):
    """Round fp32 to DTYPE, to nearest even, and back."""
    if tl.float32 == DTYPE:
        return x
    if _INTERPRETED and tl.bfloat16 == DTYPE:  # the interpreter's cast truncates
        bits = x.to(tl.int32, bitcast=True)
        nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000
        return tl.where(x == x, nearest.to(tl.float32, bitcast=True), x)
    return x.to(DTYPE).to(tl.float32)


@triton.jit
def store_rows(tile, codes, scale, rows, block, R, C, P2: tl.constexpr):
    """Quantise tile [rows, 128 columns of block `block`] along its rows and store it."""
    cols = block * 128 + tl.arange(0, 128)
    scale_r, reciprocal_r = scale_of(largest_bits(tile, 1), P2)
    quantized = codes_of(tile, scale_r[:, None], reciprocal_r[:, None], P2)
    at = rows.to(tl.int64)[:, None] * C + cols[None, :]
    tl.store(codes + at, quantized, mask=(rows < R)[:, None] & (cols < C)[None, :])
    tl.store(scale + block.to(tl.int64) * R + rows, scale_r, mask=rows < R)


@triton.jit
def store_columns(
    tile, codes_t, scale_t, row_block, block, R, C,
    P2: tl.constexpr,
):  # fmt: skip
    """Quantise tile [128, 128] along its columns and store the transpose."""
    rows = row_block * 128 + tl.arange(0, 128)
    cols = block * 128 + tl.arange(0, 128)
    scale_c, reciprocal_c = scale_of(largest_bits(tile, 0), P2)
    # Bytes go through shared memory, not floats: a quarter of the traffic.
    quantized = tl.trans(codes_of(tile, scale_c[None, :], reciprocal_c[None, :], P2))
    at = cols.to(tl.int64)[:, None] * R + rows[None, :]
    tl.store(codes_t + at, quantized, mask=(cols < C)[:, None] & (rows < R)[None, :])
    tl.store(scale_t + row_block.to(tl.int64) * C + cols, scale_c, mask=cols < C)


@triton.jit
def load_tile(x, rows, block, R, C, stride):
    """Load [rows, 128 columns of block `block`] as fp32, zeros outside."""
    cols = block * 128 + tl.arange(0, 128)
    at = rows.to(tl.int64)[:, None] * stride + cols[None, :]
    inside = (rows < R)[:, None] & (cols < C)[None, :]
    return tl.load(x + at, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def load_quantized(codes, scale, rows, block, R, C, scale_r, scale_c):
    """Load [rows, 128 columns of block `block`] of codes and scales as fp32 values."""
    cols = block * 128 + tl.arange(0, 128)
    at = rows.to(tl.int64)[:, None] * C + cols[None, :]
    inside = (rows < R)[:, None] & (cols < C)[None, :]
    values = values_of(tl.load(codes + at, mask=inside, other=0))
    scale_at = rows.to(tl.int64) * scale_r + block.to(tl.int64) * scale_c
    return values * tl.load(scale + scale_at, mask=rows < R, other=1.0)[:, None]


def tuned(rows: tuple[int, ...], warps: tuple[int, ...]) -> Callable[[Any], Any]:
    """Autotune a kernel over ROWS (none: it has no such constant) and warps, by number of columns.

    Every choice gives the same bits, so the choice may depend on the machine. The interpreter has
    nothing to time: there `fixed` names the constants.
    """
    if INTERPRETED:
        return lambda kernel: kernel
    configs = [
        triton.Config({"ROWS": size} if size else {}, num_warps=w)
        for size in rows or (0,)
        for w in warps
    ]
    tune: Callable[[Any], Any] = triton.autotune(configs, key=["C"])
    return tune


def fixed(**constants: int) -> dict[str, int]:
    """Constants that autotuning would choose, in the interpreter; else none."""
    return constants if INTERPRETED else {}


@tuned(rows=(16, 32, 64), warps=(4, 8))
@triton.jit
def _quantize_1x128(
    x, codes, scale, R, C, stride,
    P2: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    block = tl.program_id(1)
    store_rows(load_tile(x, rows, block, R, C, stride), codes, scale, rows, block, R, C, P2)


@tuned(rows=(), warps=(4, 8, 16))
@triton.jit
def _quantize_1x128_dual(  # noqa: PLR0913 - pointers and sizes
    x, codes, scale, codes_t, scale_t, R, C, stride,
    P2: tl.constexpr,
):  # fmt: skip
    row_block, block = tl.program_id(0), tl.program_id(1)
    rows = row_block * 128 + tl.arange(0, 128)
    tile = load_tile(x, rows, block, R, C, stride)
    store_rows(tile, codes, scale, rows, block, R, C, P2)
    store_columns(tile, codes_t, scale_t, row_block, block, R, C, P2)


@tuned(rows=(), warps=(4, 8, 16))
@triton.jit
def _quantize_128x128_dual(w, codes, codes_t, scale, R, C, stride, P2: tl.constexpr):
    row_block, block = tl.program_id(0), tl.program_id(1)
    rows, cols = row_block * 128 + tl.arange(0, 128), block * 128 + tl.arange(0, 128)
    tile = load_tile(w, rows, block, R, C, stride)
    tile_scale, reciprocal = scale_of(tl.max(largest_bits(tile, 1), 0)[None], P2)
    quantized = codes_of(tile, tile_scale[:, None], reciprocal[:, None], P2)
    inside = (rows < R)[:, None] & (cols < C)[None, :]
    tl.store(codes + rows.to(tl.int64)[:, None] * C + cols[None, :], quantized, mask=inside)
    at_t = cols.to(tl.int64)[:, None] * R + rows[None, :]
    tl.store(codes_t + at_t, tl.trans(quantized), mask=tl.trans(inside))
    at = row_block * tl.num_programs(1) + block + tl.arange(0, 1)
    tl.store(scale + at, tile_scale)


@tuned(rows=(), warps=(4, 8, 16))
@triton.jit
def _transpose_requantize(codes, scale, codes_t, scale_t, R, C, scale_r, scale_c):
    row_block, block = tl.program_id(0), tl.program_id(1)
    rows = row_block * 128 + tl.arange(0, 128)
    tile = load_quantized(codes, scale, rows, block, R, C, scale_r, scale_c)
    store_columns(tile, codes_t, scale_t, row_block, block, R, C, True)


def empty_codes(rows: int, columns: int, like: Tensor) -> Tensor:
    """New E4M3 codes [rows, columns]."""
    return torch.empty(rows, columns, dtype=torch.float8_e4m3fn, device=like.device)


def empty_scale(rows: int, columns: int, like: Tensor) -> Tensor:
    """New scales of 1 x 128 blocks [rows, ceil(columns / 128)] with strides (1, rows)."""
    return torch.empty(blocks(columns), rows, dtype=torch.float32, device=like.device).t()


def as_bytes(codes: Tensor) -> Tensor:
    """Same memory as uint8: the kernels encode and decode by themselves."""
    return codes.view(torch.uint8)


def blocks(size: int) -> int:
    """Blocks of 128 along an axis."""
    return -(-size // BLOCK)


def with_unit_stride(x: Tensor) -> Tensor:
    """Return x, copied only if neighbours in a row are not neighbours in memory."""
    return x if x.stride(-1) == 1 else x.contiguous()


def tiles(rows: int, columns: int) -> tuple[int, int]:
    """Grid of one program per 128 x 128 tile."""
    return blocks(rows), blocks(columns)


def by_rows(rows: int, columns: int) -> Callable[[dict[str, Any]], tuple[int, int]]:
    """Grid of one program per ROWS x 128 tile, with ROWS from the launch."""
    return lambda meta: (triton.cdiv(rows, meta["ROWS"]), blocks(columns))


def quantize_1x128(x: Tensor, power_of_two: bool) -> tuple[Tensor, Tensor]:
    """Codes [R, C] and scales [R, c] of 1 x 128 blocks; see fp8.ops."""
    R, C = x.shape
    x, codes, scale = with_unit_stride(x), empty_codes(R, C, x), empty_scale(R, C, x)
    if x.numel():
        _quantize_1x128[by_rows(R, C)](
            x, as_bytes(codes), scale, R, C, x.stride(0), P2=power_of_two, **fixed(ROWS=32)
        )
    return codes, scale


def quantize_1x128_dual(x: Tensor, power_of_two: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Codes [R, C], scales [R, c]; codes [C, R], scales [C, r] of the transpose; see fp8.ops."""
    R, C = x.shape
    x, codes, scale = with_unit_stride(x), empty_codes(R, C, x), empty_scale(R, C, x)
    codes_t, scale_t = empty_codes(C, R, x), empty_scale(C, R, x)
    if x.numel():
        _quantize_1x128_dual[tiles(R, C)](
            x, as_bytes(codes), scale, as_bytes(codes_t), scale_t, R, C, x.stride(0),
            P2=power_of_two,
        )  # fmt: skip
    return codes, scale, codes_t, scale_t


def quantize_128x128_dual(w: Tensor, power_of_two: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Codes [R, C], their transpose [C, R], scales [r, c] of square tiles; see fp8.ops."""
    R, C = w.shape
    w, codes, codes_t = with_unit_stride(w), empty_codes(R, C, w), empty_codes(C, R, w)
    scale = torch.empty(blocks(R), blocks(C), dtype=torch.float32, device=w.device)
    if w.numel():
        _quantize_128x128_dual[tiles(R, C)](
            w, as_bytes(codes), as_bytes(codes_t), scale, R, C, w.stride(0), P2=power_of_two
        )
    return codes, codes_t, scale


def transpose_requantize(codes: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Codes [C, R] and scales [C, r] of the transpose of codes [R, C]; see fp8.ops."""
    R, C = codes.shape
    codes = codes.contiguous()
    codes_t, scale_t = empty_codes(C, R, codes), empty_scale(C, R, codes)
    if codes.numel():
        _transpose_requantize[tiles(R, C)](
            as_bytes(codes), scale, as_bytes(codes_t), scale_t, R, C,
            scale.stride(0), scale.stride(1),
        )  # fmt: skip
    return codes_t, scale_t
