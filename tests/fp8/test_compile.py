"""A converted model is one graph for torch.compile, and the graph computes what eager computes."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fp8.backends import scaled_mm
from fp8.backends.scaled_mm import ScaledMM
from fp8.convert import convert_to_float8_training
from fp8.linear import Float8Linear
from fp8.recipe import RECIPES, BlockScaling

LEAN = {"swiglu": "recompute", "fuse_norms": True}
IDS = torch.randint(256, (2, 40), generator=torch.Generator().manual_seed(0))


def run(model: nn.Module, forward: Callable[..., Any]) -> tuple[float, list[torch.Tensor]]:
    model.zero_grad()
    torch.manual_seed(0)
    loss = forward(IDS, labels=IDS, use_cache=False).loss
    loss.backward()
    return loss.item(), [p.grad.clone() for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize(
    ("name", "options"),
    [
        # Tracing takes seconds each.
        pytest.param("block", LEAN, marks=pytest.mark.slow),
        *(pytest.param(n, {}, marks=pytest.mark.slow) for n in ("block", "rowwise", "current")),
        pytest.param("mxfp8", LEAN, marks=pytest.mark.slow),
    ],
)
def test_the_graph_computes_what_eager_computes(
    tiny_model: Callable[..., nn.Module], name: str, options: dict[str, Any]
) -> None:
    model = tiny_model("qwen2", layers=1)
    convert_to_float8_training(model, RECIPES[name](gemm="float32"), **options)
    wanted_loss, wanted = run(model, model)
    twin = copy.deepcopy(model)
    torch._dynamo.reset()
    # aot_eager traces and partitions as inductor does, and compiles nothing.
    loss, grads = run(twin, torch.compile(twin, backend="aot_eager", fullgraph=True))
    assert loss == pytest.approx(wanted_loss, rel=1e-6)
    for found, grad in zip(grads, wanted, strict=True):
        assert float((found - grad).norm()) <= 0.02 * float(grad.norm())  # a code may tip


def test_the_graph_takes_the_operators_of_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def multiply(
        a: Tensor, b: Tensor, scale_a: Tensor, _a: Any, scale_b: Tensor, _b: Any, **kwargs: Any
    ) -> Tensor:
        """What scaled_mm computes for one block of 128 and tiles of 128 x 128."""
        return (a.float() * scale_a @ (b.float() * scale_b[:1])).to(kwargs["output_dtype"])

    monkeypatch.setattr(scaled_mm, "_scaled_mm", multiply)
    model = nn.Sequential(nn.Linear(128, 128), nn.SiLU(), nn.Linear(128, 128))
    convert_to_float8_training(model, BlockScaling(gemm="float32"))
    for layer in (model[0], model[2]):
        assert isinstance(layer, Float8Linear)
        layer.backend = ScaledMM()
    x = torch.randn(128, 128)
    results = []
    for forward in (model, torch.compile(model, backend="aot_eager", fullgraph=True)):
        model.zero_grad()
        inputs = x.clone().requires_grad_()
        y = forward(inputs)
        y.square().sum().backward()
        results.append([y.detach(), inputs.grad, *(p.grad.clone() for p in model.parameters())])
    for found, wanted in zip(*results, strict=True):
        assert float((found - wanted).norm()) <= 0.02 * float(wanted.norm())


@pytest.mark.slow
def test_weights_that_changed_are_quantised_anew_in_the_graph(
    tiny_model: Callable[..., nn.Module],
) -> None:
    model = tiny_model(layers=1)
    convert_to_float8_training(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for _ in range(3):
        loss, _ = run(model, compiled)
        assert loss == pytest.approx(run(model, model)[0], rel=1e-4)
        optimizer.step()
