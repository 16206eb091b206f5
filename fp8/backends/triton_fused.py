"""Triton kernels that normalise or gate and quantise in one pass: nothing wide is written.

Every value is rounded to the dtype it would have been stored in before it is quantised, so the
codes are those of the separate steps. exp and rsqrt are the device's own: a last place of fp32 may
differ from torch's, which moves a code only where a value sits on a rounding border.
Shapes: R, C = rows, columns; r, c = blocks of 128 along them, the last one maybe short.
"""
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, import-untyped"
# Triton reads the annotations of kernels itself, so these have none but tl.constexpr.

import torch
import triton
import triton.language as tl
from torch import Tensor

from fp8.backends.triton_quantize import (
    as_bytes,
    blocks,
    by_rows,
    codes_of,
    empty_codes,
    empty_scale,
    fixed,
    largest_bits,
    load_quantized,
    load_tile,
    round_to,
    scale_of,
    store_columns,
    store_rows,
    tiles,
    tuned,
    with_unit_stride,
)


@triton.jit
def _rmsnorm_quantize(  # noqa: PLR0913 - pointers and sizes
    x, weight, y, codes, scale, rstd,
    R, C, stride, eps, P2: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    # One row a program, as BLOCKS x 128, so that the amax of a block is that of a line. Not
    # autotuned: the number of warps orders the sum, and a sum must not depend on a timing.
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCKS)[:, None] * 128 + tl.arange(0, 128)[None, :]
    inside = at < C
    source = tl.load(x + row * stride + at, mask=inside, other=0.0).to(tl.float32)
    mean_square = tl.sum(tl.sum(source * source, 1), 0) / C
    row_rstd = tl.rsqrt(mean_square + eps)
    normal = round_to(source * row_rstd, y.dtype.element_ty)
    gain = tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
    out = round_to(normal * gain, y.dtype.element_ty)
    block_scale, reciprocal = scale_of(largest_bits(out, 1), P2)
    quantized = codes_of(out, block_scale[:, None], reciprocal[:, None], P2)
    tl.store(y + row * C + at, out.to(y.dtype.element_ty), mask=inside)
    tl.store(codes + row * C + at, quantized, mask=inside)
    lines = tl.arange(0, BLOCKS)
    tl.store(scale + lines.to(tl.int64) * R + row, block_scale, mask=lines * 128 < C)
    tl.store(rstd + row, row_rstd)


@tuned(rows=(8, 16, 32), warps=(4, 8))
@triton.jit
def _swiglu_quantize(  # noqa: PLR0913 - pointers and sizes
    gate, up, codes, scale, gate_codes, gate_scale,
    up_codes, up_scale, R, C, gate_stride, up_stride,
    P2: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    rows, block = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.program_id(1)
    g = load_tile(gate, rows, block, R, C, gate_stride)
    store_rows(g, gate_codes, gate_scale, rows, block, R, C, P2)
    u = load_tile(up, rows, block, R, C, up_stride)
    store_rows(u, up_codes, up_scale, rows, block, R, C, P2)
    product = round_to(g / (1.0 + tl.exp(-g)) * u, gate.dtype.element_ty)
    store_rows(product, codes, scale, rows, block, R, C, P2)


@tuned(rows=(), warps=(8, 16))
@triton.jit
def _swiglu_backward_quantize(  # noqa: PLR0913 - pointers and sizes
    dp, gate_codes, gate_scale, up_codes, up_scale,
    dg_codes, dg_scale, dg_codes_t, dg_scale_t,
    du_codes, du_scale, du_codes_t, du_scale_t,
    R, C, stride, gate_r, gate_c, up_r, up_c,
    P2: tl.constexpr,
):  # fmt: skip
    row_block, block = tl.program_id(0), tl.program_id(1)
    rows = row_block * 128 + tl.arange(0, 128)
    d = load_tile(dp, rows, block, R, C, stride)
    g = load_quantized(gate_codes, gate_scale, rows, block, R, C, gate_r, gate_c)
    du = round_to(d * (g / (1.0 + tl.exp(-g))), dp.dtype.element_ty)
    store_rows(du, du_codes, du_scale, rows, block, R, C, P2)
    store_columns(du, du_codes_t, du_scale_t, row_block, block, R, C, P2)
    # Read again what the caches hold, rather than keep three tiles of fp32 in registers.
    d = load_tile(dp, rows, block, R, C, stride)
    g = load_quantized(gate_codes, gate_scale, rows, block, R, C, gate_r, gate_c)
    u = load_quantized(up_codes, up_scale, rows, block, R, C, up_r, up_c)
    sigmoid = 1.0 / (1.0 + tl.exp(-g))
    swish = g * sigmoid
    dg = round_to(d * u * (sigmoid + swish - swish * sigmoid), dp.dtype.element_ty)
    store_rows(dg, dg_codes, dg_scale, rows, block, R, C, P2)
    store_columns(dg, dg_codes_t, dg_scale_t, row_block, block, R, C, P2)


def rmsnorm_quantize(
    x: Tensor, weight: Tensor, eps: float, power_of_two: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Y [R, C], its codes [R, C] and scales [R, c], rstd [R]; see fp8.ops."""
    R, C = x.shape
    x, y = with_unit_stride(x), torch.empty(R, C, dtype=x.dtype, device=x.device)
    codes, scale = empty_codes(R, C, x), empty_scale(R, C, x)
    rstd = torch.empty(R, dtype=torch.float32, device=x.device)
    lines = triton.next_power_of_2(blocks(C))
    if x.numel():
        _rmsnorm_quantize[(R,)](
            x, weight.contiguous(), y, as_bytes(codes), scale, rstd, R, C, x.stride(0), eps,
            P2=power_of_two, BLOCKS=lines, num_warps=min(16, max(1, lines // 4)),
        )  # fmt: skip
    return y, codes, scale, rstd


def swiglu_quantize(gate: Tensor, up: Tensor, power_of_two: bool) -> tuple[Tensor, ...]:
    """Codes [R, C] and scales [R, c] of silu(gate) * up, of gate and of up; see fp8.ops."""
    R, C = gate.shape
    gate, up = with_unit_stride(gate), with_unit_stride(up)
    made = [(empty_codes(R, C, gate), empty_scale(R, C, gate)) for _ in range(3)]
    outputs = [tensor for pair in made for tensor in pair]
    if gate.numel():
        _swiglu_quantize[by_rows(R, C)](
            gate, up, *_pointers(outputs), R, C, gate.stride(0), up.stride(0),
            P2=power_of_two, **fixed(ROWS=32),
        )  # fmt: skip
    return tuple(outputs)


def swiglu_backward_quantize(
    dp: Tensor,
    gate_codes: Tensor,
    gate_scale: Tensor,
    up_codes: Tensor,
    up_scale: Tensor,
    power_of_two: bool,
) -> tuple[Tensor, ...]:
    """Codes and scales of d_gate [R, C], of its transpose; then those of d_up; see fp8.ops."""
    R, C = dp.shape
    dp, gate_codes, up_codes = with_unit_stride(dp), gate_codes.contiguous(), up_codes.contiguous()
    made = [
        (empty_codes(R, C, dp), empty_scale(R, C, dp), empty_codes(C, R, dp), empty_scale(C, R, dp))
        for _ in range(2)
    ]
    outputs = [tensor for four in made for tensor in four]
    if dp.numel():
        _swiglu_backward_quantize[tiles(R, C)](
            dp, as_bytes(gate_codes), gate_scale, as_bytes(up_codes), up_scale,
            *_pointers(outputs), R, C, dp.stride(0), *gate_scale.stride(), *up_scale.stride(),
            P2=power_of_two,
        )  # fmt: skip
    return tuple(outputs)


def _pointers(tensors: list[Tensor]) -> list[Tensor]:
    return [as_bytes(t) if t.dtype == torch.float8_e4m3fn else t for t in tensors]
