"""What a backend does for a linear layer. Operands of a GEMM are stored [rows, contracted].

Shapes: T = tokens, K = in_features, N = out_features.
"""

from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from fp8.recipe import Recipe

Operand = Any
"""What the backend's own `gemm` reads: dequantised values, or codes with their scales."""


class Saved(NamedTuple):
    """The input as it is kept for backward: 8-bit codes (4-bit: two to a byte) and scales."""

    codes: Tensor
    scale: Tensor
    outer: Tensor | None


def pack_scale(scale: Tensor) -> Tensor:
    """Return powers of two as their biased exponents, as E8M0 holds them: a byte instead of four.

    By integers, because not every compiler knows the type.
    """
    return (scale.view(torch.int32) >> 23).to(torch.uint8)


def unpack_scale(exponent: Tensor) -> Tensor:
    """Return what `pack_scale` was given; 255 is NaN."""
    bits = exponent.to(torch.int32) << 23
    return (bits | ((exponent == 255).to(torch.int32) << 22)).view(torch.float32)


class UnsupportedBackendError(ValueError):
    """A backend was asked for by name and cannot run this layer here."""


class Backend(Protocol):
    """The arithmetic of y = x @ w.T, dx = g @ w, dw = g.T @ x.

    `amax`, where it is given, is the largest value to scale by (delayed scaling); NaN in it must
    reach the result.
    """

    name: str

    def refusal(
        self, recipe: Recipe, in_features: int, out_features: int, device: torch.device
    ) -> str | None:
        """Say why the backend cannot run such a layer; None when it can."""
        ...

    def input(
        self, x_TK: Tensor, recipe: Recipe, *, keep: bool, amax: Tensor | None
    ) -> tuple[Operand, Saved | None]:
        """Quantise the input; `keep` tells whether backward will need it."""
        ...

    def saved_input(self, saved: Saved, recipe: Recipe, tokens: int, features: int) -> Operand:
        """Return the kept input as [K, T], blocks along T."""
        ...

    def weight(self, w_NK: Tensor, recipe: Recipe) -> tuple[Operand, Operand]:
        """Quantise the weight as [N, K] and as [K, N], each in blocks along its last axis."""
        ...

    def gradient(
        self, g_TN: Tensor, recipe: Recipe, *, dual: bool, amax: Tensor | None
    ) -> tuple[Operand, Operand | None]:
        """Quantise the output's gradient as [T, N] and, if `dual`, as [N, T]."""
        ...

    def gemm(self, a: Operand, b: Operand, recipe: Recipe, dtype: torch.dtype) -> Tensor:
        """Return a @ b.T, summed in fp32, rounded as recipe.gemm says, in dtype."""
        ...
