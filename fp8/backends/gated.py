"""SwiGLU between two GEMMs: silu(gate) * up and its gradients, quantised for the next GEMM.

On a GPU with block scales each is one kernel (`fp8.ops`); elsewhere the steps one by one. The codes
are the same but for the last place of exp.
Shapes: T = tokens, N = MLP width.
"""

from typing import Final, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import silu

from fp8 import ops
from fp8.backends.base import Backend, Operand, Saved, pack_scale, unpack_scale
from fp8.backends.scaled_mm import ScaledMM, ScaledOperand
from fp8.quantize import Quantized, dequantize, quantize
from fp8.recipe import QuantSpec, Recipe

KEPT: Final = QuantSpec()
"""How gate and up are kept, whatever the recipe of the GEMMs: E4M3 in 1 x 128."""


class Gated(NamedTuple):
    """Gate and up [T, N] as codes, with scales that are powers of two."""

    gate_codes: Tensor
    gate_scale: Tensor
    up_codes: Tensor
    up_scale: Tensor

    def packed(self) -> "Gated":
        """Return them as they are kept for backward, a byte for a scale."""
        gate, up = pack_scale(self.gate_scale), pack_scale(self.up_scale)
        return self._replace(gate_scale=gate, up_scale=up)

    def unpacked(self) -> "Gated":
        """Undo `packed`."""
        gate, up = unpack_scale(self.gate_scale), unpack_scale(self.up_scale)
        return self._replace(gate_scale=gate, up_scale=up)

    def values(self) -> tuple[Tensor, Tensor]:
        """Return gate and up in float32, rounded to 8 bits."""
        gate = dequantize(Quantized(self.gate_codes, self.gate_scale, KEPT))
        return gate, dequantize(Quantized(self.up_codes, self.up_scale, KEPT))


def quantized_product(
    backend: Backend, gate_TN: Tensor, up_TN: Tensor, recipe: Recipe, *, keep: bool
) -> tuple[Operand, Saved | None, Gated | None]:
    """Return silu(gate) * up as an operand and, if `keep`, as codes, beside gate and up as codes.

    The product is rounded once to the dtype of gate, and quantised from there.
    """
    if keep and _has_kernels(backend, recipe):
        codes, scale, *kept = ops.swiglu_quantize(gate_TN, up_TN, _power_of_two(recipe))
        return (
            ScaledOperand(codes, scale, "BlockWise1x128"),
            Saved(codes, scale, None),
            Gated(*kept),
        )
    product = _product(gate_TN.float(), up_TN.float(), gate_TN.dtype)
    operand, saved = backend.input(product, recipe, keep=keep, amax=None)
    if not keep:
        return operand, None, None
    gate, up = quantize(gate_TN, KEPT), quantize(up_TN, KEPT)
    return operand, saved, Gated(gate.codes, gate.scale, up.codes, up.scale)


def product_again(backend: Backend, kept: Gated, recipe: Recipe, dtype: torch.dtype) -> Saved:
    """Make the product's codes anew, from gate and up of 8 bits."""
    _, saved = backend.input(_product(*kept.values(), dtype), recipe, keep=True, amax=None)
    assert saved is not None
    return saved


def quantized_gradients(
    backend: Backend, g_product: Tensor, kept: Gated, recipe: Recipe, dual: tuple[bool, bool]
) -> tuple[tuple[Operand, Operand | None], tuple[Operand, Operand | None]]:
    """Return the gradients of gate and of up, each as [T, N] and, if its `dual`, as [N, T]."""
    if all(dual) and _has_kernels(backend, recipe):
        made = ops.swiglu_backward_quantize(g_product, *kept, _power_of_two(recipe))
        operands = [
            ScaledOperand(codes, scale, "BlockWise1x128")
            for codes, scale in zip(made[0::2], made[1::2], strict=True)
        ]
        return (operands[0], operands[1]), (operands[2], operands[3])
    (gate, up), g, dtype = kept.values(), g_product.float(), g_product.dtype
    sigmoid = gate.sigmoid()
    swish = gate * sigmoid
    g_gate = (g * up * (sigmoid + swish - swish * sigmoid)).to(dtype)
    g_up = (g * swish).to(dtype)
    return (
        backend.gradient(g_gate, recipe, dual=dual[0], amax=None),
        backend.gradient(g_up, recipe, dual=dual[1], amax=None),
    )


def _has_kernels(backend: Backend, recipe: Recipe) -> bool:
    """Whether the fused operators give what the backend reads: block scales, rows kept."""
    return isinstance(backend, ScaledMM) and recipe.input.block == (1, 128) and recipe.saves_rows


def _power_of_two(recipe: Recipe) -> bool:
    return recipe.input.scale_format == "power_of_two"


def _product(gate: Tensor, up: Tensor, dtype: torch.dtype) -> Tensor:
    return silu(gate).mul_(up).to(dtype)
