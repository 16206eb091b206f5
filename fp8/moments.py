"""AdamW's moments in 8 bits each: their codes.

First moment m: E4M3, one power-of-two scale per GROUP elements, rounded to nearest.
Second moment v is never negative, so the sign's bit is a third bit of mantissa: five bits of
exponent, three of mantissa, no zero, no NaN ("E5M3"). Code c stands for
scale * 2**(c >> 3) * (1 + (c & 7) / 8), which makes two laws plain. v is zero only where the whole
group is (its scale is then 0): a v that underflows stays at its floor, the scale, and no step
divides a live m by nothing. And the fp32 bits of v are (c << 20) + the bits of the scale.
v is rounded with a dither, not to nearest: an average that forgets 5 % a step never leaves a code
whose neighbour is 6 % away, so v would only ever grow. The dither is a pure function of step and
position, so resumed runs and other devices draw the same.

Shapes: G = groups, B = elements of a group (GROUP; the last group may be short).
"""

from typing import Final

import torch
from torch import Tensor

from fp8.formats import E4M3, encode
from fp8.quantize import block_scale

GROUP: Final = 128

# fp32 bit patterns.
MANTISSA_BITS: Final = 23
CODE_SHIFT: Final = 20
"""Bits of an fp32 mantissa below the third: what three bits of mantissa round away."""
BELOW_CODE: Final = (1 << CODE_SHIFT) - 1
V_EXPONENT: Final = 31
"""Octaves between v's scale, the value of code 0, and the octave of the group's largest v."""

# A Weyl sequence: 2**32 over the golden ratio.
POSITION_STRIDE: Final = 0x9E3779B9
# Two odd multipliers of MurmurHash3's 32-bit finaliser (public domain), as int32.
MIX_1: Final = 0x85EBCA6B - (1 << 32)
MIX_2: Final = 0xC2B2AE35 - (1 << 32)


def groups_of(elements: int) -> int:
    """Count the groups, and so the scales, of a tensor."""
    return -(-elements // GROUP)


def encode_first(m_GB: Tensor) -> tuple[Tensor, Tensor]:
    """Round m to nearest E4M3. Returns codes, uint8 [G, B], and scales, float32 [G].

    Restored to within max(2**-4 * |m|, 2**-10 * scale). A group with NaN or infinity gets the
    scale NaN: all of it reads as NaN from then on, which no loss can hide.
    """
    scale_G = block_scale(m_GB.abs().amax(-1))
    return encode(m_GB / scale_G[:, None], E4M3).view(torch.uint8), scale_G


def decode_first(codes_GB: Tensor, scale_G: Tensor) -> Tensor:
    """Return m, float32 [G, B], new; exact. A code of NaN has its NaN from its group's scale."""
    # Sign, exponent and mantissa moved into a float16, which then is 2**-8 of the value: a
    # thirteenth of what torch's up-cast from 8 bits costs on a CPU.
    halves_GB = codes_GB.view(torch.int8).to(torch.int16).bitwise_left_shift_(7)
    halves_GB = halves_GB.bitwise_and_(-0x4080).view(torch.float16)
    return halves_GB.float().mul_(256.0).mul_(scale_G[:, None])


def encode_second(v_GB: Tensor, dither_B: Tensor) -> tuple[Tensor, Tensor]:
    """Round v up or down by a dither. Returns codes, uint8 [G, B], and scales, float32 [G].

    Restored to within v / 8, and on average over the steps to v itself; what is below the scale
    (about 2**-31 of the group's largest) comes back as the scale. Infinity stays infinity.
    """
    top_G = (v_GB.amax(-1).view(torch.int32) + BELOW_CODE) >> MANTISSA_BITS
    # At least one, unless the whole group is zero: then the floor is not zero either.
    scale_G = (top_G - V_EXPONENT).clamp_(min=1).mul_(top_G > 0) << MANTISSA_BITS
    bits_GB = v_GB.view(torch.int32) + dither_B[: v_GB.shape[-1]]
    bits_GB.sub_(scale_G[:, None]).bitwise_right_shift_(CODE_SHIFT).clamp_(min=0)
    return bits_GB.to(torch.uint8), scale_G.view(torch.float32)


def decode_second(codes_GB: Tensor, scale_G: Tensor) -> Tensor:
    """Return v, float32 [G, B], new; exact."""
    bits_GB = codes_GB.to(torch.int32).bitwise_left_shift_(CODE_SHIFT)
    return bits_GB.add_(scale_G.view(torch.int32)[:, None]).view(torch.float32)


def dither(step: int, device: torch.device) -> Tensor:
    """Return what is added below the last kept bit: int32 [GROUP] in [0, 2**20).

    At one step the positions fill the range evenly; from step to step all of them move together,
    as if at random.
    """
    positions = torch.arange(GROUP, dtype=torch.int64, device=device).mul_(POSITION_STRIDE)
    return ((positions + dither_start(step)) & 0xFFFFFFFF).bitwise_right_shift_(12).int()


def dither_start(step: int) -> int:
    """Return the 32-bit fraction at which the positions' sequence starts: a hash of the step.

    An even sequence over the steps would fall in with the even decay of v, and bias it.
    """
    h = (step * POSITION_STRIDE) & 0xFFFFFFFF
    h = ((h ^ (h >> 16)) * MIX_1) & 0xFFFFFFFF
    h = ((h ^ (h >> 13)) * MIX_2) & 0xFFFFFFFF
    return h ^ (h >> 16)


def round_stochastically(x: Tensor, seed: Tensor, first: int = 0) -> Tensor:
    """Round float32 to one of the two bfloat16 beside it, so that the mean is x.

    Args: x: contiguous; seed: int32, one element; first: the index of x's first element.
    Returns: bfloat16; a pure function of (x, seed, index). NaN and infinity stay.
    """
    index = torch.arange(first, first + x.numel(), dtype=torch.int64, device=x.device)
    h = index.mul_(POSITION_STRIDE).to(torch.int32).add_(seed)
    h.bitwise_xor_((h >> 16) & 0xFFFF).mul_(MIX_1)
    h.bitwise_xor_((h >> 13) & 0x7FFFF).mul_(MIX_2)
    noise = h.bitwise_xor_(h >> 16).bitwise_and_(0xFFFF)
    rounded = x.view(torch.int32) + noise.view(x.shape)
    as_bf16 = (rounded >> 16).to(torch.int16).view(torch.bfloat16)
    return torch.where(x.isfinite(), as_bf16, x.to(torch.bfloat16))
