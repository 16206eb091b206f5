"""The 8-bit AdamW step as one kernel: each moment, gradient and weight is read and written once.

The same arithmetic as `fp8.adamw.reference_steps`, operation by operation: no fused multiply-add,
division and square root rounded correctly. Codes and scales are the same bits. So are the weights,
but where torch's square root on a CPU is a unit in the last place off, as it is for a fifth of all
numbers. Codes and bfloat16 are made by integer arithmetic: it needs no GPU with 8-bit floats, and
Triton's interpreter, whose casts truncate, computes the same.
Shapes: G = groups of a program (GROUPS), B = elements of a group.
"""
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, import-untyped"
# Triton reads the annotations of kernels itself, so these have none but tl.constexpr.

from collections.abc import Iterable
from typing import Final

import triton
import triton.language as tl

from fp8 import moments as rules
from fp8.adamw import Factors, Operands
from fp8.backends.triton_quantize import largest_bits, scale_of

GROUPS: Final = 16

_GROUP = tl.constexpr(rules.GROUP)
_MANTISSA_BITS = tl.constexpr(rules.MANTISSA_BITS)
_CODE_SHIFT = tl.constexpr(rules.CODE_SHIFT)
_BELOW_CODE = tl.constexpr(rules.BELOW_CODE)
_V_EXPONENT = tl.constexpr(rules.V_EXPONENT)
_POSITION_STRIDE = tl.constexpr(rules.POSITION_STRIDE)
_MIX_1 = tl.constexpr(rules.MIX_1 % (1 << 32))
_MIX_2 = tl.constexpr(rules.MIX_2 % (1 << 32))
# E4M3: bits of 2**-6, its smallest normal number; codes count from there by exponents of 2**-7.
_E4M3_NORMAL_BITS = tl.constexpr((127 - 6) << 23)
_E4M3_BASE = tl.constexpr((127 - 7) << 3)
_HALF_LESS_ONE = tl.constexpr((1 << 19) - 1)
# Adding 2**14 leaves a last place of 2**-9, E4M3's step below its smallest normal number.
_SUBNORMAL_SHIFT = tl.constexpr(16384.0)
_SUBNORMAL_SHIFT_BITS = tl.constexpr((127 + 14) << 23)


@triton.jit
def _decode_e4m3(code):
    """Return the float32 of an int32 in 0..255."""
    magnitude = code & 0x7F
    normal = ((magnitude + _E4M3_BASE) << _CODE_SHIFT).to(tl.float32, bitcast=True)
    small = magnitude.to(tl.float32) * 0.001953125
    value = tl.where(magnitude < 8, small, normal)
    value = tl.where(magnitude == 0x7F, float("nan"), value)
    return tl.where(code >= 0x80, -value, value)


@triton.jit
def _encode_e4m3(x):
    """Round float32, at most 448 or NaN, to nearest even. Returns int32 in 0..255."""
    bits = x.to(tl.int32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    tie = (magnitude >> _CODE_SHIFT) & 1
    normal = ((magnitude + _HALF_LESS_ONE + tie) >> _CODE_SHIFT) - _E4M3_BASE
    shifted = magnitude.to(tl.float32, bitcast=True) + _SUBNORMAL_SHIFT
    small = shifted.to(tl.int32, bitcast=True) - _SUBNORMAL_SHIFT_BITS
    code = tl.where(magnitude < _E4M3_NORMAL_BITS, small, normal)
    code = tl.where(magnitude > 0x7F800000, 0x7F, code)
    return code | ((bits >> 24) & 0x80)


@triton.jit
def _to_bf16(x, noise):
    """Add 16 bits of noise below the last bit kept, and cut; NaN and infinity stay."""
    bits = x.to(tl.uint32, bitcast=True)
    cut = ((bits + noise) & 0xFFFF0000).to(tl.float32, bitcast=True)
    is_finite = (bits & 0x7F800000) != 0x7F800000
    return tl.where(is_finite, cut, x).to(tl.bfloat16)


@triton.jit
def _nearest_noise(x):
    """Return what, added before the cut, rounds to nearest even."""
    return 0x7FFF + ((x.to(tl.uint32, bitcast=True) >> 16) & 1)


@triton.jit
def _random_noise(index, seed):
    """Return the noise of `fp8.moments.round_stochastically`; both are uint32."""
    h = index * _POSITION_STRIDE + seed
    h = (h ^ (h >> 16)) * _MIX_1
    h = (h ^ (h >> 13)) * _MIX_2
    return (h ^ (h >> 16)) & 0xFFFF


@triton.jit(do_not_specialize=["dither_start"])
def _step_kernel(  # noqa: PLR0913
    param, master, seed, grad, m_codes, m_scale, v_codes, v_scale, n, dither_start,
    beta1, one_minus_beta1, beta2, one_minus_beta2, keep, step_size, correction, eps,
    HAS_MASTER: tl.constexpr, HAS_SEED: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    group = tl.program_id(0).to(tl.int64) * GROUPS + tl.arange(0, GROUPS)
    place = tl.arange(0, _GROUP)
    index = group[:, None] * _GROUP + place[None, :]
    inside, is_group = index < n, group * _GROUP < n

    g = tl.load(grad + index, mask=inside, other=0.0).to(tl.float32)
    m = _decode_e4m3(tl.load(m_codes + index, mask=inside, other=0).to(tl.int32))
    m = m * tl.load(m_scale + group, mask=is_group, other=1.0)[:, None]
    v_base = tl.load(v_scale + group, mask=is_group, other=0.0).to(tl.int32, bitcast=True)
    v_bits = tl.load(v_codes + index, mask=inside, other=0).to(tl.int32) << _CODE_SHIFT
    # Beyond the end this is the floor, which is the largest of no group.
    v = (v_bits + v_base[:, None]).to(tl.float32, bitcast=True)

    m = m * beta1 + g * one_minus_beta1
    v = v * beta2 + (g * g) * one_minus_beta2
    denominator = tl.sqrt_rn(v) * correction + eps
    change = tl.div_rn(m, denominator) * step_size

    if HAS_MASTER:
        weight = tl.load(master + index, mask=inside, other=0.0) * keep - change
        tl.store(master + index, weight, mask=inside)
        tl.store(param + index, _to_bf16(weight, _nearest_noise(weight)), mask=inside)
    else:
        weight = tl.load(param + index, mask=inside, other=0.0).to(tl.float32) * keep - change
        if HAS_SEED:
            random = tl.load(seed).to(tl.uint32, bitcast=True)
            noise = _random_noise(index.to(tl.uint32), random)
            tl.store(param + index, _to_bf16(weight, noise), mask=inside)
        else:
            tl.store(param + index, weight, mask=inside)

    # By a power of two a product is exact where the quotient is, and a fraction of its price.
    scale, reciprocal = scale_of(largest_bits(m, 1), True)
    tl.store(m_scale + group, scale, mask=is_group)
    code = _encode_e4m3(m * reciprocal[:, None])
    tl.store(m_codes + index, code.to(tl.uint8), mask=inside)

    v_bits = v.to(tl.int32, bitcast=True)
    top = (tl.max(v_bits, axis=1) + _BELOW_CODE) >> _MANTISSA_BITS
    base = tl.where(top > 0, tl.maximum(top - _V_EXPONENT, 1) << _MANTISSA_BITS, 0)
    tl.store(v_scale + group, base.to(tl.float32, bitcast=True), mask=is_group)
    start = dither_start.to(tl.uint32)
    dither = ((place.to(tl.uint32) * _POSITION_STRIDE + start) >> 12).to(tl.int32)
    above = v_bits + dither[None, :] - base[:, None]
    code = tl.maximum(above >> _CODE_SHIFT, 0)
    tl.store(v_codes + index, code.to(tl.uint8), mask=inside)


def triton_steps(work: Iterable[Operands], factors: Factors, step: int) -> None:
    """Do `fp8.adamw.reference_steps`, one kernel for each of them."""
    start = rules.dither_start(step)
    start -= (1 << 32) * (start >= 1 << 31)  # as an int32: the same kernel for every step
    for operands in work:
        param, master, seed, *others = operands
        if param.numel() == 0:
            continue
        _step_kernel[(triton.cdiv(param.numel(), GROUPS * rules.GROUP),)](
            param,
            param if master is None else master,
            param if seed is None else seed,
            *others,
            param.numel(),
            start,
            *factors,
            HAS_MASTER=master is not None,
            HAS_SEED=seed is not None,
            GROUPS=GROUPS,
            enable_fp_fusion=False,
        )
