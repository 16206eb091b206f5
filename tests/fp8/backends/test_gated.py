"""On a GPU SwiGLU and norm are one kernel each; here their references, over a stand-in GEMM."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from fp8 import ops
from fp8.backends import scaled_mm
from fp8.backends.emulated import Emulated
from fp8.backends.scaled_mm import ScaledMM, ScaledOperand
from fp8.fused import Float8SwiGLU, FusedRMSNorm
from fp8.linear import Float8Linear
from fp8.quantize import Quantized, dequantize
from fp8.recipe import BlockScaling, QuantSpec

RECIPES = [BlockScaling(gemm="float32"), BlockScaling(gemm="float32", scale_format="fp32")]
by_recipe = pytest.mark.parametrize("recipe", RECIPES, ids=["p2", "fp32"])


@pytest.fixture(autouse=True)
def gemm(monkeypatch: pytest.MonkeyPatch) -> None:
    """Multiply dequantised values; what the kernel demands is in test_scaled_mm.py."""

    def multiply(self: Any, a: ScaledOperand, b: ScaledOperand, recipe: Any, dtype: Any) -> Tensor:
        return (values(a) @ values(b).t()).to(dtype)

    monkeypatch.setattr(scaled_mm.ScaledMM, "gemm", multiply)


def values(operand: ScaledOperand) -> Tensor:
    if operand.kind == "BlockWise1x128":
        return dequantize(Quantized(operand.codes, operand.scale, QuantSpec()))
    blocks = -(-operand.codes.shape[1] // 128)
    scale = operand.scale[:blocks].t()
    return dequantize(Quantized(operand.codes, scale, QuantSpec(block=(128, 128))))


class Block(nn.Module):
    def __init__(self, recipe: Any, backend: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        for name, sizes in {"gate": (144, 272), "up": (144, 272), "down": (272, 144)}.items():
            layer = Float8Linear.from_float(nn.Linear(*sizes, bias=False), recipe)
            layer.backend = backend
            setattr(self, f"{name}_proj", layer)
        self.act_fn = nn.SiLU()


def one_pass(block: nn.Module, x: Tensor, g: Tensor) -> list[Tensor]:
    x = x.clone().requires_grad_()
    y = block(x)
    y.backward(g)
    assert x.grad is not None
    return [y.detach(), x.grad, *(p.grad for p in block.parameters() if p.grad is not None)]


@by_recipe
@pytest.mark.parametrize("keep", ["float8", "recompute"])
def test_the_kernels_give_what_the_steps_give(
    recipe: Any, keep: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, g = torch.randn(37, 144), torch.randn(37, 144)
    calls: list[str] = []
    for name in ("swiglu_quantize", "swiglu_backward_quantize"):
        op = getattr(ops, name)
        monkeypatch.setattr(
            ops, name, lambda *args, op=op, name=name: calls.append(name) or op(*args)
        )
    found = one_pass(Float8SwiGLU(Block(recipe, ScaledMM()), keep), x, g)
    is_fused = recipe.saves_rows  # else the column-wise copy is kept, which no kernel makes
    assert calls == (["swiglu_quantize", "swiglu_backward_quantize"] if is_fused else [])
    wanted = one_pass(Float8SwiGLU(Block(recipe, Emulated()), keep), x, g)
    assert len(found) == len(wanted) == 5
    for one, other in zip(found, wanted, strict=True):
        assert float((one - other).norm()) <= 2e-3 * float(other.norm())


@by_recipe
@pytest.mark.parametrize("train", [True, False])
def test_the_norms_codes_are_read_by_the_layers_that_follow(recipe: Any, train: bool) -> None:
    block = Block(recipe, ScaledMM())
    layer = block.gate_proj
    norm = LlamaRMSNorm(144)
    with torch.no_grad():
        norm.weight.uniform_(0.5, 2)
    x, g = torch.randn(2, 30, 144), torch.randn(2, 30, 272)
    results = []
    for reader in (None, layer):
        layer.zero_grad()
        fused = FusedRMSNorm(copy.deepcopy(norm), reader)
        with torch.set_grad_enabled(train):
            y = fused(x)
            shared = hasattr(y, "_float8_copy")
            assert shared == (reader is not None and recipe.saves_rows)
            before = y._float8_copy if shared else None
            z = layer(y)
            assert not shared or y._float8_copy is before
        if train:
            z.backward(g)
            results.append([z.detach(), layer.weight.grad.clone(), fused.weight.grad])
        else:
            results.append([z])
    for one, other in zip(*results, strict=True):
        assert torch.allclose(one, other, rtol=1e-5, atol=1e-5)
