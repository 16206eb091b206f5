import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fp8.backends.base import UnsupportedBackendError
from fp8.epoch import invalidate_weight_caches
from fp8.linear import Float8Linear, autocast, float8_state, load_float8_state
from fp8.quantize import dequantize, fake_quantize, quantize
from fp8.recipe import (
    MXFP8,
    NVFP4,
    RECIPES,
    BlockScaling,
    CurrentScaling,
    DelayedScaling,
    Recipe,
    RowwiseScaling,
)

EXACT = BlockScaling(gemm="float32")
KINDS = {
    "block": BlockScaling(),
    "block-float32": EXACT,
    "block-fp32-scales": BlockScaling(scale_format="fp32"),
    "rowwise": RowwiseScaling(),
    "current": CurrentScaling(),
    "delayed": DelayedScaling(history=4),
    "mxfp8": MXFP8(),
    "nvfp4": NVFP4(),
}
every_recipe = pytest.mark.parametrize("recipe", KINDS.values(), ids=KINDS.keys())


def pair(
    recipe: Recipe | None = None, inputs: int = 192, outputs: int = 320, *, bias: bool = True
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
def test_output_and_gradients_are_near_fp32(recipe: Recipe, outliers: bool) -> None:
    linear, float8 = pair(recipe)
    x, g = torch.randn(3, 100, 192), torch.randn(3, 100, 320)
    if outliers:
        x[..., ::50] *= 200
        g *= torch.randn(3, 100, 1).exp()
    # E4M3 rounds by up to 1/16, E5M2 by 1/8, E2M1 by 1/4; random signs make it about a third.
    limit = {"current": 0.08, "delayed": 0.08, "nvfp4": 0.25}.get(recipe.name, 0.06)
    for found, wanted in zip(one_pass(float8, x, g), one_pass(linear, x, g), strict=True):
        assert found.shape == wanted.shape
        assert relative_error(found, wanted) <= limit
    assert relative_error(float8(x), linear(x)) >= 0.005  # it did quantise


def test_each_gemm_reads_operands_scaled_along_the_axis_it_sums() -> None:
    _, layer = pair(EXACT, inputs=300, outputs=200)
    x, g = torch.randn(150, 300) * torch.rand(150, 1) ** 8, torch.randn(150, 200)
    y, dx, dw, db = one_pass(layer, x, g)
    w = fake_quantize(layer.weight, EXACT.weight)
    x_rows = fake_quantize(x, EXACT.input)
    assert torch.equal(y, x_rows @ w.t() + layer.bias.detach())
    assert torch.equal(dx, fake_quantize(g, EXACT.input) @ w)
    # The kept copy is the row-wise one: the other is made of it, not of x.
    x_columns = fake_quantize(x_rows, EXACT.input, dim=0)
    assert torch.equal(dw, fake_quantize(g, EXACT.input, dim=0).t() @ x_columns)
    assert torch.equal(db, g.sum(0))


def test_with_fp32_scales_the_columns_are_quantised_from_the_source() -> None:
    recipe = BlockScaling(scale_format="fp32", gemm="float32")
    _, layer = pair(recipe)
    x, g = torch.randn(150, 192), torch.randn(150, 320)
    dw = one_pass(layer, x, g)[2]
    x_columns = fake_quantize(x, recipe.input, dim=0)
    assert torch.equal(dw, fake_quantize(g, recipe.input, dim=0).t() @ x_columns)


@pytest.mark.parametrize("scale_format", ["fp32", "power_of_two"])
def test_rowwise_equals_the_fp8_matmul_of_torch(scale_format: str) -> None:
    recipe = RowwiseScaling(scale_format=scale_format, gemm="float32")
    _, layer = pair(recipe, bias=False)
    x = torch.randn(48, 192)
    a, b = quantize(x, recipe.input), quantize(layer.weight, recipe.weight)
    wanted = torch._scaled_mm(
        a.codes,
        b.codes.t(),
        scale_a=a.scale,
        scale_b=b.scale.t().contiguous(),
        out_dtype=torch.float32,
    )
    assert torch.equal(layer(x), wanted)


def test_a_bfloat16_result_is_the_float32_one_rounded() -> None:
    x, g = torch.randn(40, 192), torch.randn(40, 320)
    _, rounded = pair(BlockScaling())
    _, exact = pair(EXACT)
    for found, wanted in zip(one_pass(rounded, x, g)[1:3], one_pass(exact, x, g)[1:3], strict=True):
        # The sums' order may differ by an ulp of fp32, and so a tie in bf16: hence a bf16 ulp.
        assert torch.equal(found, found.bfloat16().float())
        assert bool(((found - wanted).abs() <= wanted.abs() * 2.0**-8 + 1e-6).all())


def test_zero_input_and_zero_gradient_give_zeros() -> None:
    for recipe in KINDS.values():
        _, layer = pair(recipe)
        for found in one_pass(layer, torch.zeros(7, 192), torch.zeros(7, 320))[1:]:
            assert bool((found == 0).all())


def test_no_token_at_all_is_no_error() -> None:
    for recipe in KINDS.values():
        _, layer = pair(recipe)
        y, dx, dw, _ = one_pass(layer, torch.zeros(0, 192), torch.zeros(0, 320))
        assert y.shape == (0, 320)
        assert dx.shape == (0, 192)
        assert bool((dw == 0).all())


@every_recipe
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_infinity_reach_the_output(recipe: Recipe, bad: float) -> None:
    _, layer = pair(recipe)
    x = torch.randn(4, 192)
    layer(x)  # delayed scaling has a past now
    x[2, 5] = bad
    y = layer(x)
    assert bool(y[2].isnan().all())
    if recipe.row_independent:
        assert bool(y[[0, 1, 3]].isfinite().all())


@every_recipe
def test_nan_in_the_gradient_reaches_the_weight(recipe: Recipe) -> None:
    _, layer = pair(recipe)
    g = torch.randn(4, 320)
    g[1, 7] = float("nan")
    layer(torch.randn(4, 192)).backward(g)
    assert layer.weight.grad is not None
    assert bool(layer.weight.grad[7].isnan().all())


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
    _, layer = pair(EXACT)
    optimizer = make(list(layer.parameters()))
    for _ in range(2):
        layer(torch.randn(5, 192)).square().sum().backward()
        optimizer.step()
        wanted = fake_quantize(layer.weight, EXACT.weight)
        assert torch.equal(layer.quantized_weight()[0], wanted)
        assert torch.equal(layer.quantized_weight()[1], wanted.t())


def test_the_weight_is_quantised_once_until_it_changes() -> None:
    linear, layer = pair(EXACT)

    def now() -> Tensor:
        return layer.quantized_weight()[0]

    first = now()
    assert now() is first
    layer.load_state_dict({name: t * 3 for name, t in linear.state_dict().items()})
    assert torch.equal(now(), fake_quantize(linear.weight * 3, EXACT.weight))
    layer.weight.data = torch.ones_like(layer.weight)  # the version stays
    assert bool((now() == 1).all())
    layer.weight.data.fill_(2)  # neither version nor place changes
    invalidate_weight_caches()
    assert bool((now() == 2).all())
    layer.weight = nn.Parameter(torch.ones_like(layer.weight) * 4)
    assert bool((now() == 4).all())


def test_layers_that_read_one_tensor_share_its_codes() -> None:
    _, first = pair()
    _, second = pair()
    other = Float8Linear.from_float(nn.Linear(192, 8), MXFP8())
    x = torch.randn(5, 192)
    shared = first.quantized_input(x, keep=True)
    assert second.quantized_input(x, keep=True) is shared
    assert other.quantized_input(x, keep=True) is not shared
    x[0, 0] = 50.0
    fresh = first.quantized_input(x, keep=True)
    assert fresh is not shared
    assert torch.equal(fresh[0].float(), fake_quantize(x))


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
    for recipe in KINDS.values():
        linear, layer = pair(recipe)
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


def test_what_is_kept_for_backward_is_8_bit_codes_and_their_scales() -> None:
    saved: list[Tensor] = []
    for recipe in KINDS.values():
        _, layer = pair(recipe)
        saved.clear()
        with torch.autograd.graph.saved_tensors_hooks(saved.append, lambda t: t):
            with torch.no_grad():
                layer(torch.randn(256, 192))
            assert saved == []
            layer(torch.randn(256, 192))
        assert sum(t.nbytes for t in saved) <= 1.04 * 256 * 192  # MXFP8: a byte for every 32
        layer.requires_grad_(False)
        saved.clear()
        with torch.autograd.graph.saved_tensors_hooks(saved.append, lambda t: t):
            layer(torch.randn(256, 192, requires_grad=True))
        assert saved == []


def test_frozen_weights_still_pass_gradients_on() -> None:
    for recipe in KINDS.values():
        _, layer = pair(recipe)
        layer.requires_grad_(False)
        x = torch.randn(5, 192, requires_grad=True)
        layer(x).sum().backward()
        assert x.grad is not None
        assert layer.weight.grad is None


@every_recipe
def test_gradient_checkpointing_changes_no_bit(recipe: Recipe) -> None:
    x, g = torch.randn(9, 192), torch.randn(9, 320)
    grads = []
    for use in (False, True):
        _, layer = pair(recipe)
        inputs = x.clone().requires_grad_()
        out = checkpoint(layer, inputs, use_reentrant=False) if use else layer(inputs)
        torch.manual_seed(3)  # stochastic rounding draws in backward alone
        out.backward(g)
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
def test_under_torchs_autocast_it_reads_and_gives_its_dtype(recipe: Recipe) -> None:
    _, layer = pair(recipe)
    x = torch.randn(9, 192, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    wanted = layer(x.detach().bfloat16())
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, wanted)
    y.float().sum().backward()
    assert x.grad is not None
    assert x.grad.dtype == torch.float32


def test_switched_off_it_is_the_linear_layer_it_was() -> None:
    linear, layer = pair()
    x, g = torch.randn(9, 192), torch.randn(9, 320)
    with autocast(enabled=False):
        for found, wanted in zip(one_pass(layer, x, g), one_pass(linear, x, g), strict=True):
            assert torch.equal(found, wanted)
        with autocast():
            assert not torch.equal(layer(x), linear(x))
    assert not torch.equal(layer(x), linear(x))
    back = layer.to_float()
    assert type(back) is nn.Linear
    assert back.weight is layer.weight


def test_strided_and_single_token_inputs() -> None:
    _, layer = pair()
    x = torch.randn(192, 30).t()
    assert torch.equal(layer(x), layer(x.contiguous()))
    assert torch.equal(layer(x[3]), layer(x)[3])


def test_delayed_scaling_resumes_bit_for_bit() -> None:
    def start() -> tuple[nn.Sequential, torch.optim.Optimizer]:
        torch.manual_seed(0)
        model = nn.Sequential(Float8Linear.from_float(nn.Linear(16, 16), DelayedScaling(history=3)))
        return model, torch.optim.SGD(model.parameters(), lr=0.1)

    def step(model: nn.Sequential, optimizer: torch.optim.Optimizer, at: int) -> Tensor:
        x = torch.randn(8, 16, generator=torch.Generator().manual_seed(at)) * 2.0**-at
        optimizer.zero_grad()
        y = model(x)
        y.square().sum().backward()
        optimizer.step()
        return y.detach()

    whole, optimizer = start()
    wanted = [step(whole, optimizer, at) for at in range(8)]
    first, optimizer = start()
    for at in range(4):
        step(first, optimizer, at)
    second, optimizer = start()
    second.load_state_dict(first.state_dict())
    load_float8_state(second, float8_state(first))
    for at in range(4, 8):
        assert torch.equal(step(second, optimizer, at), wanted[at])
    with pytest.raises(ValueError, match="names too many or too few"):
        load_float8_state(second, {})
    assert float8_state(nn.Sequential(pair()[1])) == {}


def test_a_backend_that_cannot_is_refused_by_name_and_reported_otherwise() -> None:
    for name, make in RECIPES.items():
        assert Float8Linear.from_float(nn.Linear(16, 16), make()).backend.name == "emulated"
        with pytest.raises(UnsupportedBackendError, match=r"cannot run the .* recipe"):
            Float8Linear.from_float(nn.Linear(16, 16), make(backend="scaled_mm"))
        assert f"recipe={name}" in repr(Float8Linear.from_float(nn.Linear(16, 16), make()))


def test_one_block_deep_it_equals_the_fp8_matmul_of_torch() -> None:
    _, layer = pair(EXACT, inputs=128, outputs=128, bias=False)
    x = torch.randn(48, 128)
    a, b = quantize(x, EXACT.input), quantize(layer.weight, EXACT.weight)
    wanted = torch._scaled_mm(
        a.codes,
        b.codes.t(),
        scale_a=a.scale,
        scale_b=b.scale.expand(1, 128).contiguous(),
        out_dtype=torch.float32,
    )
    assert torch.equal(layer(x), wanted)
    assert torch.equal(dequantize(a), fake_quantize(x))
