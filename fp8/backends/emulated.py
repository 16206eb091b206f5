"""FP8 on any device: values go to codes and back, and an ordinary GEMM multiplies them.

Codes and products are those of FP8 hardware; the order of the fp32 sum is not. With power-of-two
scales dequantised values fit bf16 exactly, so a bf16 GEMM is as good as an fp32 one and, where
the processor has one, faster.
"""

from typing import Final

import torch
from torch import Tensor
from torch.nn.functional import pad

from fp8.backends.base import Saved
from fp8.quantize import Quantized, dequantize, fake_quantize, quantize
from fp8.recipe import Recipe

_HADAMARD_SIZE = 16
# NVIDIA's recipe fixes the signs too; these are the bits of pi's fraction.
_SIGNS = (1, 1, -1, 1, 1, -1, 1, 1, 1, 1, -1, -1, -1, -1, -1, -1)


class Emulated:
    """The reference of all backends. Operands are dequantised values, [rows, contracted]."""

    name = "emulated"

    def refusal(
        self, recipe: Recipe, in_features: int, out_features: int, device: torch.device
    ) -> str | None:
        """Return None: it runs everything everywhere."""
        return None

    def input(
        self, x_TK: Tensor, recipe: Recipe, *, keep: bool, amax: Tensor | None
    ) -> tuple[Tensor, Saved | None]:
        """Quantise the input once if its rows are kept, twice from the source if columns are."""
        dtype = _operand_dtype(recipe, x_TK.device)
        if keep and recipe.saves_rows:
            q = quantize(x_TK, recipe.input, amax=amax)
            return dequantize(q).to(dtype), Saved(q.codes, q.scale, q.outer)
        values = fake_quantize(x_TK, recipe.input, amax=amax, dtype=dtype)
        if not keep:
            return values, None
        x_KT = (_hadamard(x_TK) if recipe.hadamard else x_TK).t()
        q = quantize(x_KT, recipe.input, amax=amax)
        return values, Saved(q.codes, q.scale, q.outer)

    def saved_input(self, saved: Saved, recipe: Recipe, tokens: int, features: int) -> Tensor:
        """Return the kept input as values [K, T]; from rows, quantised again along T."""
        dtype, spec = _operand_dtype(recipe, saved.codes.device), recipe.input
        if not recipe.saves_rows:
            length = _padded(tokens) if recipe.hadamard else tokens
            return dequantize(Quantized(*saved[:2], spec, saved.outer, length)).to(dtype)
        kept = Quantized(saved.codes, saved.scale, spec)
        if spec.block[1] is None:  # one scale per tensor serves both directions
            return dequantize(kept).t().to(dtype)
        return fake_quantize(dequantize(kept), spec, 0, dtype=dtype).t()

    def weight(self, w_NK: Tensor, recipe: Recipe) -> tuple[Tensor, Tensor]:
        """Return the weight's values; square tiles and whole tensors serve both directions."""
        dtype, spec = _operand_dtype(recipe, w_NK.device), recipe.weight
        values_NK = fake_quantize(w_NK, spec, -1, dtype=dtype)
        if spec.block[0] == spec.block[1]:
            return values_NK, values_NK.t()
        return values_NK, fake_quantize(w_NK, spec, 0, dtype=dtype).t()

    def gradient(
        self, g_TN: Tensor, recipe: Recipe, *, dual: bool, amax: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Quantise the gradient along N and along T, both from the source."""
        dtype, spec = _operand_dtype(recipe, g_TN.device), recipe.grad_output
        rows = fake_quantize(g_TN, spec, -1, amax=amax, dtype=dtype)
        if not dual:
            return rows, None
        if recipe.hadamard:
            return rows, fake_quantize(_hadamard(g_TN), spec, 0, amax=amax, dtype=dtype).t()
        if spec.block[1] is None and spec.block[0] is None:
            return rows, rows.t()
        return rows, fake_quantize(g_TN, spec, 0, amax=amax, dtype=dtype).t()

    def gemm(self, a: Tensor, b: Tensor, recipe: Recipe, dtype: torch.dtype) -> Tensor:
        """Return a @ b.T in dtype."""
        y = a @ b.t()
        return (y.bfloat16() if recipe.gemm == "bfloat16" else y).to(dtype)


def native_bfloat16() -> bool:
    """Whether this CPU multiplies bf16 itself; where not, fp32 is the faster emulation."""
    return _NATIVE_BFLOAT16


def _ask_the_cpu() -> bool:
    capabilities: dict[str, object] = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


_NATIVE_BFLOAT16: Final = _ask_the_cpu()  # once: a compiler cannot look into the question


def _operand_dtype(recipe: Recipe, device: torch.device) -> torch.dtype:
    # The values are the same in either; what differs is speed, and the sum's own rounding to
    # bf16, which `gemm` repeats for fp32.
    native = _NATIVE_BFLOAT16 or device.type != "cpu"
    exact = recipe.gemm == "bfloat16" and recipe.exact_in_bfloat16
    return torch.bfloat16 if native and exact else torch.float32


def _padded(tokens: int) -> int:
    return -(-tokens // _HADAMARD_SIZE) * _HADAMARD_SIZE


def _hadamard(x_TK: Tensor) -> Tensor:
    """Mix every 16 tokens by an orthogonal matrix: it cancels in g.T @ x, and spreads outliers."""
    tokens = x_TK.shape[0]
    signs = torch.tensor(_SIGNS, dtype=torch.float32, device=x_TK.device)
    mix = _walsh(x_TK.device) * signs / _HADAMARD_SIZE**0.5
    groups = pad(x_TK.detach().float(), (0, 0, 0, _padded(tokens) - tokens))
    mixed: Tensor = mix @ torch.unflatten(groups, 0, (-1, _HADAMARD_SIZE))
    return mixed.flatten(0, 1)


def _walsh(device: torch.device) -> Tensor:
    h = torch.ones(1, 1, device=device)
    while h.shape[0] < _HADAMARD_SIZE:
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)])
    return h
