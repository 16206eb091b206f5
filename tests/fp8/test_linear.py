import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fp8.convert import convert_to_float8_training
from fp8.linear import Float8Linear
from fp8.quantize import fake_quantize, fake_quantize_128x128, quantize_1x128, quantize_128x128
from fp8.recipe import BlockScaling

RECIPES = {
    "p2": BlockScaling(),
    "fp32": BlockScaling(scale_format="fp32"),
    "p2-bf16": BlockScaling(gemm="bfloat16"),
}
every_recipe = pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES.keys())


def pair(
    recipe: BlockScaling | None = None, inputs: int = 192, outputs: int = 320, *, bias: bool = True
) -> tuple[nn.Linear, Float8Linear]:
    torch.manual_seed(0)
    linear = nn.Linear(inputs, outputs, bias=bias)
    return linear, Float8Linear.from_float(copy.deepcopy(linear), recipe)


def relative_error(found: Tensor, wanted: Tensor) -> float:
    return ((found - wanted).norm() / wanted.norm()).item()


def one_pass(layer: nn.Linear, x: Tensor, g: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x = x.clone().requires_grad_()
    y = layer(x)
    y.backward(g)
    assert x.grad is not None
    assert layer.weight.grad is not None
    assert layer.bias.grad is not None
    return y.detach(), x.grad, layer.weight.grad, layer.bias.grad


@every_recipe
@pytest.mark.parametrize("outliers", [False, True], ids=["gauss", "outliers"])
def test_output_and_gradients_are_near_fp32(recipe: BlockScaling, outliers: bool) -> None:
    linear, float8 = pair(recipe)
    x, g = torch.randn(3, 100, 192), torch.randn(3, 100, 320)
    if outliers:
        x[..., ::50] *= 200
        g *= torch.randn(3, 100, 1).exp()
    for found, wanted in zip(one_pass(float8, x, g), one_pass(linear, x, g), strict=True):
        assert found.shape == wanted.shape
        assert relative_error(found, wanted) <= 0.06
    assert relative_error(float8(x), linear(x)) >= 0.005  # it did quantise


def test_each_gemm_reads_operands_scaled_along_the_axis_it_sums() -> None:
    _, layer = pair(inputs=300, outputs=200)
    x, g = torch.randn(150, 300) * torch.rand(150, 1) ** 8, torch.randn(150, 200)
    y, dx, dw, db = one_pass(layer, x, g)
    w = fake_quantize_128x128(layer.weight.detach())
    assert torch.equal(y, fake_quantize(x) @ w.t() + layer.bias.detach())
    assert torch.equal(dx, fake_quantize(g) @ w)
    assert torch.equal(dw, fake_quantize(g, dim=0).t() @ fake_quantize(x, dim=0))
    assert torch.equal(db, g.sum(0))


def test_one_block_deep_it_equals_the_fp8_matmul_of_torch() -> None:
    _, layer = pair(inputs=128, outputs=128, bias=False)
    x = torch.randn(48, 128)
    x_q, w_q = quantize_1x128(x), quantize_128x128(layer.weight.detach())
    wanted = torch._scaled_mm(
        x_q.codes,
        w_q.codes.t(),
        scale_a=x_q.scale,
        scale_b=w_q.scale.expand(1, 128).contiguous(),
        out_dtype=torch.float32,
    )
    assert torch.equal(layer(x), wanted)


def test_zero_input_and_zero_gradient_give_zeros() -> None:
    _, layer = pair()
    for found in one_pass(layer, torch.zeros(7, 192), torch.zeros(7, 320))[1:]:
        assert bool((found == 0).all())


@every_recipe
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_and_infinity_reach_the_output(recipe: BlockScaling, bad: float) -> None:
    _, layer = pair(recipe)
    x = torch.randn(4, 192)
    x[2, 5] = bad
    y = layer(x)
    assert bool(y[2].isnan().all())
    assert bool(y[[0, 1, 3]].isfinite().all())


STEPS: dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "adamw fused": lambda p: torch.optim.AdamW(p, lr=0.1, fused=True),
    "adamw foreach": lambda p: torch.optim.AdamW(p, lr=0.1, foreach=True),
    "adamw plain": lambda p: torch.optim.AdamW(p, lr=0.1, foreach=False),
}


@pytest.mark.parametrize("make", STEPS.values(), ids=STEPS.keys())
def test_no_optimizer_step_leaves_a_stale_weight(
    make: Callable[[list[nn.Parameter]], torch.optim.Optimizer],
) -> None:
    _, layer = pair()
    optimizer = make(list(layer.parameters()))
    for _ in range(2):
        layer(torch.randn(5, 192)).square().sum().backward()
        optimizer.step()
        wanted = fake_quantize_128x128(layer.weight.detach())
        assert torch.equal(layer.quantized_weight(), wanted)


def test_the_weight_is_quantised_once_until_it_changes() -> None:
    linear, layer = pair()
    first = layer.quantized_weight()
    assert layer.quantized_weight() is first
    layer.load_state_dict({name: t * 3 for name, t in linear.state_dict().items()})
    assert torch.equal(layer.quantized_weight(), fake_quantize_128x128(linear.weight * 3))
    layer.weight.data = torch.ones_like(layer.weight)  # the version stays
    assert bool((layer.quantized_weight() == 1).all())
    layer.weight = nn.Parameter(torch.ones_like(layer.weight) * 2)
    assert bool((layer.quantized_weight() == 2).all())


def test_inference_mode_does_not_spoil_later_training() -> None:
    _, layer = pair()
    x = torch.randn(5, 192)
    with torch.inference_mode():
        y = layer(x)
        made_inside = Float8Linear.from_float(nn.Linear(192, 320))
        assert bool(made_inside(x).isfinite().all())
    assert torch.equal(layer(x), y)
    layer(x).sum().backward()


def test_copies_and_state_dicts_are_those_of_a_linear_layer() -> None:
    linear, layer = pair()
    x = torch.randn(5, 192)
    y = layer(x)
    assert layer.state_dict().keys() == linear.state_dict().keys()
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert twin._cached is None  # copies are as large as those of a linear layer
        assert torch.equal(twin(x), y)
        with torch.no_grad():
            twin.weight.zero_()
        assert torch.equal(twin(x), layer.bias.expand(5, 320))
        assert torch.equal(layer(x), y)
    linear.load_state_dict(layer.state_dict())
    assert torch.equal(linear.weight, layer.weight)


def test_without_gradients_nothing_is_saved() -> None:
    saved: list[Tensor] = []
    _, layer = pair()
    with torch.autograd.graph.saved_tensors_hooks(saved.append, lambda t: t):
        with torch.no_grad():
            layer(torch.randn(5, 192))
        assert saved == []
        layer(torch.randn(5, 192))
        assert len(saved) == 2


def test_frozen_weights_still_pass_gradients_on() -> None:
    _, layer = pair()
    layer.requires_grad_(False)
    x = torch.randn(5, 192, requires_grad=True)
    layer(x).sum().backward()
    assert x.grad is not None
    assert layer.weight.grad is None


def test_gradient_checkpointing_changes_no_bit() -> None:
    x, g = torch.randn(9, 192), torch.randn(9, 320)
    grads = []
    for use in (False, True):
        _, layer = pair()
        inputs = x.clone().requires_grad_()
        (checkpoint(layer, inputs, use_reentrant=False) if use else layer(inputs)).backward(g)
        grads.append((inputs.grad, layer.weight.grad))
    for plain, recomputed in zip(*grads, strict=True):
        assert torch.equal(plain, recomputed)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_models_keep_their_dtype(dtype: torch.dtype) -> None:
    _, layer = pair()
    layer.to(dtype)
    x = torch.randn(9, 192, dtype=dtype, requires_grad=True)
    y = layer(x)
    y.sum().backward()
    assert y.dtype == dtype
    assert x.grad is not None
    assert x.grad.dtype == dtype
    assert layer.weight.grad is not None
    assert layer.weight.grad.dtype == dtype


@every_recipe
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gpt_neox"])
def test_a_converted_model_is_causal_and_indifferent_to_its_batch(
    tiny_model: Callable[..., nn.Module], architecture: str, recipe: BlockScaling
) -> None:
    model = tiny_model(architecture).eval()
    convert_to_float8_training(model, recipe)
    ids = torch.randint(256, (3, 40), generator=torch.Generator().manual_seed(0))
    later, other = ids.clone(), ids.clone()
    later[:, 25:] = 7
    other[1:] = 9
    with torch.no_grad():
        logits = model(ids).logits
        assert torch.equal(model(later).logits[:, :25], logits[:, :25])
        assert torch.equal(model(other).logits[0], logits[0])
        assert not torch.equal(model(later).logits[:, 25:], logits[:, 25:])
