"""What is kept: by autograd for one decoder layer, and by the optimizer for one parameter."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from types import MappingProxyType
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import silu
from transformers import Qwen2ForCausalLM

from benchmarks.fp8_models import SHAPES, Shape
from fp8.convert import convert_to_float8_training, fuse_rms_norms
from fp8.optim import Float8AdamW, state_bytes
from fp8.recipe import BlockScaling


class PlainSwiGLU(nn.Module):
    """The 16-bit MLP as a compiler would fuse it: it keeps gate, up and their product."""

    def __init__(self, block: Any) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = block.gate_proj, block.up_proj
        self.down_proj = block.down_proj

    def forward(self, x: Tensor) -> Tensor:
        """Return down(silu(gate(x)) * up(x))."""
        product = _Product.apply(self.gate_proj(x), self.up_proj(x))  # type: ignore[no-untyped-call]
        y: Tensor = self.down_proj(product)
        return y


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return silu(gate) * up

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = (t.float() for t in ctx.saved_tensors)
        sigmoid, wide = gate.sigmoid(), g.float()
        d_gate = wide * up * sigmoid * (1 + gate * (1 - sigmoid))
        return d_gate.to(g.dtype), (wide * gate * sigmoid).to(g.dtype)


def _fuse_as_a_compiler_would(model: Any) -> None:
    fuse_rms_norms(model)
    for layer in model.model.layers:
        layer.mlp = PlainSwiGLU(layer.mlp)


def _inputs_only(model: Any) -> None:
    convert_to_float8_training(model, BlockScaling())
    _fuse_as_a_compiler_would(model)


def _swiglu(keep: Any, model: Any) -> None:
    convert_to_float8_training(model, BlockScaling(), swiglu=keep, fuse_norms=True)


SAVING: Final[Mapping[str, Callable[[Any], object]]] = MappingProxyType(
    {
        "bf16": _fuse_as_a_compiler_would,
        "fp8_inputs": _inputs_only,
        "swiglu": partial(_swiglu, "float8"),
        "recompute": partial(_swiglu, "recompute"),
        "bf16_eager": lambda _model: None,
    }
)


def saved_bytes(shape: Shape, tokens: int) -> tuple[dict[str, float], nn.Module]:
    """Bytes per token that autograd keeps for one decoder layer, for each way of keeping them.

    Returns: them; and the last arm's layer, with gradients.
    """
    found, layer = {}, None
    for name, prepare in SAVING.items():
        torch.manual_seed(0)
        model = Qwen2ForCausalLM(replace(shape, vocab=64).config(layers=1)).bfloat16()
        prepare(model)
        layer = model.model.layers[0]
        # Not a leaf: as in a model, where the residual stream comes from the layer before.
        x = torch.randn(1, tokens, shape.hidden, dtype=torch.bfloat16, requires_grad=True) * 1.0
        angles = model.model.rotary_emb(x, torch.arange(tokens)[None])
        kept: dict[int, tuple[int, Tensor]] = {}

        def keep(t: Tensor, kept: dict[int, tuple[int, Tensor]] = kept) -> Tensor:
            storage = t.untyped_storage()
            # The tensor is held so that no other one gets its address.
            kept[storage.data_ptr()] = (storage.nbytes(), t)
            return t

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            y = layer(x, position_embeddings=angles)
        shared = [*model.parameters(), *angles]  # of all layers, the angles
        for t in shared:
            kept.pop(t.untyped_storage().data_ptr(), None)
        found[name] = sum(size for size, _ in kept.values()) / tokens
        if name == "bf16_eager":
            y.backward(torch.randn_like(y))
    assert layer is not None
    return found, layer


def measure_memory(*, quick: bool) -> dict[str, Any]:
    """Count what autograd and the optimizer keep."""
    found, layer = saved_bytes(SHAPES["toy" if quick else "1.5B"], 128 if quick else 256)
    moments = {}
    for name in ("float8", "float32"):
        optimizer = Float8AdamW(layer.parameters(), lr=1e-4, moments=name)
        optimizer.step()
        moments[name] = state_bytes(optimizer).moments_per_parameter
    return {
        "saved_bytes": {k: found[k] for k in ("bf16", "fp8_inputs", "swiglu", "recompute")},
        "saved_change_pct": {
            k: 100 * (found[k] / found["bf16"] - 1) for k in ("fp8_inputs", "swiglu", "recompute")
        },
        "saved_bytes_bf16_eager": found["bf16_eager"],
        "moment_bytes_per_param": moments["float8"],
        "moment_bytes_per_param_adamw": moments["float32"],
    }
