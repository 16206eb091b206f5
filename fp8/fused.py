"""Blocks that keep less for backward: SwiGLU with 8-bit activations, RMSNorm with its input alone.

Per token autograd keeps gate, up and their product in 16 bits; "float8" keeps the first two in 8
bits beside the codes of the product that its GEMM read anyway, "recompute" drops those too.
Sources: COAT (arXiv 2410.19313) for 8-bit SwiGLU inputs; RMSNorm (arXiv 1910.07467).
Shapes: T = tokens (all leading axes), K = model width, N = MLP width.
"""

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import silu

from fp8 import ops
from fp8.backends.base import Backend, Operand, Saved
from fp8.backends.gated import Gated, product_again, quantized_gradients, quantized_product
from fp8.backends.scaled_mm import ScaledMM, ScaledOperand
from fp8.backends.transformer_engine import TransformerEngine
from fp8.linear import Float8Linear, kept, low_precision_enabled, restored

Keep = Literal["float8", "recompute"]


class Float8SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)) with the very layers of the block it replaces.

    Its forward is that of the plain block but for one rounding of silu(gate); its backward sees
    gate and up rounded to 8 bits.
    """

    gate_proj: Float8Linear
    up_proj: Float8Linear
    down_proj: Float8Linear

    def __init__(self, block: Any, keep: Keep) -> None:
        super().__init__()
        self.gate_proj = block.gate_proj
        self.up_proj = block.up_proj
        self.down_proj = block.down_proj
        self.keep: Keep = keep
        self._original: tuple[nn.Module] = (
            block,
        )  # in a tuple it is no submodule, and adds no parameter names
        self.train(block.training)

    @property
    def original(self) -> nn.Module:
        """The block that this one replaced."""
        return self._original[0]

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output [..., K]."""
        layers = (self.gate_proj, self.up_proj, self.down_proj)
        # Adapters may have wrapped a layer since, and autocast may have switched them off.
        if not low_precision_enabled() or any(type(layer) is not Float8Linear for layer in layers):
            return self.by_layers(x)
        kind = x.device.type
        if torch.is_autocast_enabled(kind):
            x = x.to(torch.get_autocast_dtype(kind))
        with torch.autocast(kind, enabled=False):
            keep = torch.is_grad_enabled()
            read = self.gate_proj.quantized_input(x, keep=keep)
            weights = [layer.quantized_weight() for layer in layers]
            y_TK: Tensor = _SwiGLU.apply(  # type: ignore[no-untyped-call]
                x.reshape(-1, x.shape[-1]),
                *(layer.weight for layer in layers),
                read,
                weights,
                self,
            )
        return y_TK.reshape(x.shape)

    def by_layers(self, x: Tensor) -> Tensor:
        """Do the same by calling each layer, as the block that was replaced did."""
        product: Tensor = self.down_proj(silu(self.gate_proj(x)) * self.up_proj(x))
        return product

    def extra_repr(self) -> str:
        """Show what is kept."""
        return f"keep={self.keep}"


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_TK: Tensor,
        w_gate: Tensor,
        w_up: Tensor,
        w_down: Tensor,
        read: tuple[Operand, Saved | None],
        weights: list[tuple[Operand, Operand]],
        block: Float8SwiGLU,
    ) -> Tensor:
        operand, saved = read
        backend, recipe, dtype = _backend(block), block.gate_proj.recipe, x_TK.dtype
        gate_TN = backend.gemm(operand, weights[0][0], recipe, dtype)
        up_TN = backend.gemm(operand, weights[1][0], recipe, dtype)
        product, kept_product, gated = quantized_product(
            backend, gate_TN, up_TN, recipe, keep=saved is not None
        )
        if block.keep == "recompute":
            kept_product = None
        gate_and_up = () if gated is None else gated.packed()
        ctx.save_for_backward(*kept(saved, recipe), *gate_and_up, *kept(kept_product, recipe))
        ctx.block, ctx.columns = block, [columns for _, columns in weights]
        ctx.tokens, ctx.dtypes = x_TK.shape[0], (dtype, w_gate.dtype)
        return backend.gemm(product, weights[2][0], recipe, dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g_TK: Tensor) -> tuple[Tensor | None, ...]:
        layer: Float8Linear = ctx.block.gate_proj
        backend, recipe, tokens = _backend(ctx.block), layer.recipe, ctx.tokens
        dtype, w_dtype = ctx.dtypes
        needs_x, needs_gate, needs_up, needs_down = ctx.needs_input_grad[:4]
        saved = ctx.saved_tensors
        gated, product = Gated(*saved[3:7]).unpacked(), saved[7:]
        dx_TK = w_gate = w_up = w_down = None
        with torch.autocast(g_TK.device.type, enabled=False):
            rows, columns = backend.gradient(g_TK, recipe, dual=needs_down, amax=None)
            g_product = backend.gemm(rows, ctx.columns[2], recipe, dtype)
            if needs_down:
                again = restored(product, recipe) if product else None
                again = again or product_again(backend, gated, recipe, dtype)
                operand = backend.saved_input(again, recipe, tokens, g_product.shape[1])
                w_down = backend.gemm(columns, operand, recipe, w_dtype)
            g_gate, g_up = quantized_gradients(
                backend, g_product, gated, recipe, (needs_gate, needs_up)
            )
            if needs_x:
                dx_TK = backend.gemm(g_gate[0], ctx.columns[0], recipe, dtype)
                dx_TK = dx_TK + backend.gemm(g_up[0], ctx.columns[1], recipe, dtype)
            if needs_gate or needs_up:
                x_kept = restored(saved[:3], recipe)
                operand = backend.saved_input(x_kept, recipe, tokens, layer.in_features)
                w_gate = backend.gemm(g_gate[1], operand, recipe, w_dtype) if needs_gate else None
                w_up = backend.gemm(g_up[1], operand, recipe, w_dtype) if needs_up else None
        return dx_TK, w_gate, w_up, w_down, None, None, None


def _backend(block: Float8SwiGLU) -> Backend:
    backend = block.gate_proj.backend
    assert not isinstance(backend, TransformerEngine)  # such blocks are not fused
    return backend


def why_not_fused(block: nn.Module) -> str | None:
    """Say why a converted block cannot become Float8SwiGLU: '' if it is no such block at all."""
    layers = [getattr(block, f"{name}_proj", None) for name in ("gate", "up", "down")]
    if isinstance(block, Float8SwiGLU) or None in layers or not hasattr(block, "act_fn"):
        return ""
    if not isinstance(block.act_fn, nn.SiLU) and type(block.act_fn).__name__ != "SiLUActivation":
        return f"its activation is {type(block.act_fn).__name__}, not SiLU"
    if any(not isinstance(layer, Float8Linear) for layer in layers):
        return "not all three layers are converted"
    first = layers[0]
    assert isinstance(first, Float8Linear)
    for layer in layers:
        assert isinstance(layer, Float8Linear)
        if layer.bias is not None:
            return "a layer has a bias"
        if layer.amax is not None:
            return "delayed scaling keeps a history per layer"
        if isinstance(layer.backend, TransformerEngine):
            return "Transformer Engine brings layers of its own"
        if layer.backend is not first.backend:
            return "its layers run on different backends"
    return None


class FusedRMSNorm(nn.Module):
    """x / rms(x) * weight, as in Llama, Mistral and Qwen; keeps x and one number per token.

    Autograd through the plain module keeps three copies of x in fp32. On a GPU the norm's kernel
    quantises its output too, for the layers that have the recipe and backend of `reader`.
    """

    def __init__(self, norm: Any, reader: Float8Linear | None = None) -> None:
        super().__init__()
        self.weight, self.variance_epsilon = norm.weight, float(norm.variance_epsilon)
        # In tuples they are no submodules, and add no parameter names.
        self._original: tuple[nn.Module] = (norm,)
        self._reader = (reader,)
        self.train(norm.training)

    @property
    def original(self) -> nn.Module:
        """The module that this one replaced."""
        return self._original[0]

    def forward(self, x: Tensor) -> Tensor:
        """Return the normalised x, in its dtype (or the weight's, if that is wider)."""
        (reader,) = self._reader
        if reader is None or torch.compiler.is_compiling() or x.is_inference():
            return self._normalise(x)
        if x.dtype != self.weight.dtype or not low_precision_enabled() or not _has_kernel(reader):
            return self._normalise(x)
        y, codes, scale = _RMSNormQuantize.apply(  # type: ignore[no-untyped-call]
            x, self.weight, self.variance_epsilon, reader
        )
        saved = Saved(codes, scale, None) if torch.is_grad_enabled() else None
        reader.share_input(y, (ScaledOperand(codes, scale, "BlockWise1x128"), saved))
        result: Tensor = y
        return result

    def _normalise(self, x: Tensor) -> Tensor:
        y: Tensor = _RMSNorm.apply(x, self.weight, self.variance_epsilon)  # type: ignore[no-untyped-call]
        return y


def _has_kernel(reader: Float8Linear) -> bool:
    one_copy = reader.recipe.input.block == (1, 128) and reader.recipe.saves_rows
    return isinstance(reader.backend, ScaledMM) and one_copy


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = x.float()
        rstd = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
        ctx.save_for_backward(x, weight, rstd)
        return weight * (wide * rstd).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor, None]:
        return *_norm_gradients(g, *ctx.saved_tensors), None


class _RMSNormQuantize(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, eps: float, reader: Float8Linear
    ) -> tuple[Tensor, Tensor, Tensor]:
        power_of_two = reader.recipe.input.scale_format == "power_of_two"
        flat = x.reshape(-1, x.shape[-1])
        y, codes, scale, rstd = ops.rmsnorm_quantize(flat, weight, eps, power_of_two)
        ctx.save_for_backward(x, weight, rstd.view(*x.shape[:-1], 1))
        ctx.mark_non_differentiable(codes, scale)
        return y.view(x.shape), codes, scale

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor, *_: Tensor) -> tuple[Tensor, Tensor, None, None]:
        return *_norm_gradients(g, *ctx.saved_tensors), None, None


def _norm_gradients(g: Tensor, x: Tensor, weight: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    normed = x.float() * rstd
    g_normed = g.float() * weight.float()
    mean = (g_normed * normed).mean(-1, keepdim=True)
    dx = ((g_normed - normed * mean) * rstd).to(x.dtype)
    # In x.dtype as in forward, where the weight met the rounded value.
    dw = (g.float() * normed.to(x.dtype).float()).flatten(0, -2).sum(0).to(weight.dtype)
    return dx, dw


def is_rms_norm(module: nn.Module) -> bool:
    """Whether this is the RMSNorm of transformers' Llama, Mistral or Qwen."""
    return type(module).__name__.endswith("RMSNorm") and hasattr(module, "variance_epsilon")
