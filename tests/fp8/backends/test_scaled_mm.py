"""The scaled_mm backend against the emulator.

Row and tensor scales run through torch's real GEMM, which a CPU has. For blocks of 128 a stand-in
takes its place, which refuses what Hopper's kernel refuses and multiplies dequantised values.
"""

from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.functional import ScalingType

from fp8.backends import scaled_mm
from fp8.backends.emulated import Emulated
from fp8.backends.scaled_mm import ScaledMM, ScaledOperand, lay_out_scale
from fp8.formats import E5M2
from fp8.linear import Float8Linear
from fp8.quantize import Quantized, dequantize, quantize
from fp8.recipe import (
    MXFP8,
    NVFP4,
    BlockScaling,
    CurrentScaling,
    DelayedScaling,
    QuantSpec,
    Recipe,
    RowwiseScaling,
)

GPU, CPU = torch.device("cuda", 0), torch.device("cpu")
RECIPES = [
    BlockScaling(),
    BlockScaling(scale_format="fp32"),
    RowwiseScaling(),
    RowwiseScaling(scale_format="power_of_two"),
    CurrentScaling(),
]
by_recipe = pytest.mark.parametrize(
    "recipe", RECIPES, ids=lambda r: f"{r.name}-{r.input.scale_format}"
)


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def dequantized(codes: Tensor, scale: Tensor, kind: ScalingType) -> Tensor:
    """Values [rows, contracted] from scales in the layout of the kernel."""
    if kind == ScalingType.BlockWise128x128:
        lines = ceil_div(codes.shape[1], 128)
        scale = scale[:lines].t().repeat_interleave(128, 0)[: codes.shape[0]]
    if kind in (ScalingType.BlockWise1x128, ScalingType.BlockWise128x128):
        scale = scale.repeat_interleave(128, 1)[:, : codes.shape[1]]
    return codes.float() * scale


def check_operand(codes: Tensor, scale: Tensor, kind: ScalingType) -> None:
    """Conditions of ATen's ScaledBlas.cpp on one operand [rows, K], stored row by row."""
    rows, K = codes.shape
    lines = ceil_div(K, 128)
    assert codes.is_contiguous()
    assert K % 16 == 0
    assert scale.dtype == torch.float32
    if kind == ScalingType.BlockWise1x128:
        assert scale.shape == (rows, lines)
        assert scale.stride(0) == 1
        assert scale.stride(1) == rows or lines == 1
        assert rows % 4 == 0  # each line of scales starts at 16 bytes
    elif kind == ScalingType.BlockWise128x128:
        padded = ceil_div(lines, 4) * 4
        assert scale.shape == (padded, ceil_div(rows, 128))
        assert scale.stride(0) == 1
        assert scale.stride(1) == padded or scale.shape[1] == 1
        assert bool(scale.isfinite().all())
    else:
        raise AssertionError(f"a CPU has its own kernel for {kind}")


def hopper(
    mat_a: Tensor,
    mat_b: Tensor,
    scale_a: Tensor,
    kind_a: ScalingType,
    scale_b: Tensor,
    kind_b: ScalingType,
    *,
    output_dtype: torch.dtype,
    use_fast_accum: bool,
) -> Tensor:
    """What F.scaled_mm does on Hopper with block scales, refusals included."""
    assert not use_fast_accum
    assert (kind_a, kind_b) in {
        (ScalingType.BlockWise1x128, ScalingType.BlockWise128x128),
        (ScalingType.BlockWise1x128, ScalingType.BlockWise1x128),
    }
    assert mat_b.shape[1] % 16 == 0
    assert not (mat_a.dtype == mat_b.dtype == E5M2.dtype)
    check_operand(mat_a, scale_a, kind_a)
    check_operand(mat_b.t(), scale_b, kind_b)
    a, b = dequantized(mat_a, scale_a, kind_a), dequantized(mat_b.t(), scale_b, kind_b)
    return (a @ b.t()).to(output_dtype)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch's GEMM where a CPU has one, the stand-in for blocks."""
    real = torch.nn.functional.scaled_mm

    def multiply(*args: Any, **kwargs: Any) -> Tensor:
        kinds = (args[3], args[5])
        is_block = any("Block" in kind.name for kind in kinds)
        return (hopper if is_block else real)(*args, **kwargs)

    monkeypatch.setattr(scaled_mm, "_scaled_mm", multiply)


def sample(shape: tuple[int, ...], seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=rng)
    return (x * torch.exp2(torch.randint(-6, 3, shape, generator=rng).float())).to(dtype)


def values(operand: ScaledOperand) -> Tensor:
    if operand.kind == "RowWise" or operand.kind == "TensorWise":
        return operand.codes.float() * operand.scale
    return dequantized(operand.codes, operand.scale, getattr(ScalingType, operand.kind))


class Sizes(NamedTuple):
    T: int
    K: int
    N: int


SIZES = [Sizes(1, 16, 16), Sizes(37, 144, 272), Sizes(128, 256, 128), Sizes(130, 576, 640)]


@by_recipe
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_operands_are_those_of_the_emulator(recipe: Recipe, sizes: Sizes) -> None:
    """All six of the three GEMMs, value for value."""
    T, K, N = sizes
    x, w, g = sample((T, K), 1), sample((N, K), 2), sample((T, N), 3)
    found, wanted = [], []
    for backend, operands in ((ScaledMM(), found), (Emulated(), wanted)):
        for keep in (False, True):
            operand, saved = backend.input(x, recipe, keep=keep, amax=None)
            operands.append(operand)
        operands.append(backend.saved_input(saved, recipe, T, K))
        operands.extend(backend.weight(w, recipe))
        operands.extend(backend.gradient(g, recipe, dual=True, amax=None))
        operands.append(backend.gradient(g, recipe, dual=False, amax=None)[0])
    for ours, theirs in zip(found, wanted, strict=True):
        assert ours.codes.is_contiguous()
        assert torch.equal(values(ours), theirs.float())


@pytest.mark.usefixtures("gpu")
@by_recipe
@pytest.mark.parametrize("gemm", ["bfloat16", "float32"])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_a_layer_gives_what_it_gives_emulated(recipe: Recipe, gemm: Any, sizes: Sizes) -> None:
    """Forward and both gradients, through every layout the kernels ask for."""
    T, K, N = sizes
    recipe, linear = replace(recipe, gemm=gemm), nn.Linear(K, N, bias=False)
    linear.weight = nn.Parameter(sample((N, K), 3, torch.float32))
    results = []
    for backend in (ScaledMM(), Emulated()):
        layer = Float8Linear.from_float(linear, recipe)
        layer.backend = backend
        x = sample((T, K), 1, torch.float32).requires_grad_()
        y = layer(x)
        layer.weight.grad = None
        y.backward(sample((T, N), 2, torch.float32))
        assert x.grad is not None
        assert layer.weight.grad is not None
        results.append((y.detach(), x.grad, layer.weight.grad))
    for ours, theirs in zip(*results, strict=True):
        # The order of the sum, and one place of bf16 if that is the result.
        size = float(theirs.abs().max())
        torch.testing.assert_close(
            ours, theirs, rtol=2**-7 if gemm == "bfloat16" else 1e-5, atol=1e-6 * size
        )


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("history", [1, 4])
def test_delayed_scaling_takes_the_amax_it_is_given(history: int) -> None:
    recipe, x = DelayedScaling(history=history), sample((32, 64))
    for amax in (torch.tensor(2.0), torch.tensor(float("nan"))):
        ours, saved = ScaledMM().input(x, recipe, keep=True, amax=amax)
        theirs, _ = Emulated().input(x, recipe, keep=True, amax=amax)
        assert saved is not None
        assert torch.equal(values(ours).nan_to_num(7.0), theirs.float().nan_to_num(7.0))
        columns = ScaledMM().saved_input(saved, recipe, 32, 64)
        assert torch.equal(values(columns).nan_to_num(7.0), theirs.float().t().nan_to_num(7.0))


@pytest.mark.parametrize("scale_format", ["fp32", "power_of_two"])
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**31), sizes=st.tuples(*[st.integers(1, 12)] * 3))
def test_torchs_own_row_wise_gemm_is_the_emulators_exactly(
    scale_format: Any, seed: int, sizes: tuple[int, int, int]
) -> None:
    M, N, K = (16 * size for size in sizes)
    recipe = RowwiseScaling(scale_format=scale_format, gemm="float32")
    a, b = (quantize(sample(s, seed), recipe.input) for s in ((M, K), (N, K)))
    operands = [ScaledOperand(q.codes, q.scale, "RowWise") for q in (a, b)]
    found = ScaledMM().gemm(*operands, recipe, torch.float32)
    assert torch.equal(found, dequantize(a) @ dequantize(b).t())


@pytest.mark.parametrize("e5m2", [False, True])
def test_torchs_own_tensor_wise_gemm_is_the_emulators(e5m2: bool) -> None:
    recipe = CurrentScaling(gemm="float32")
    a = quantize(sample((48, 96), 1), recipe.grad_output if e5m2 else recipe.input)
    b = quantize(sample((32, 96), 2), recipe.weight)
    operands = [ScaledOperand(q.codes, q.scale, "TensorWise") for q in (a, b)]
    found = ScaledMM().gemm(*operands, recipe, torch.float32)
    wanted = dequantize(a) @ dequantize(b).t()
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5 * float(wanted.abs().max()))


@settings(max_examples=40, deadline=None)
@given(rows=st.integers(1, 700), K=st.integers(1, 1300))
def test_scales_of_tiles_are_transposed_and_filled_to_16_bytes(rows: int, K: int) -> None:
    m, k = ceil_div(rows, 128), ceil_div(K, 128)
    scale = torch.arange(1.0, m * k + 1).view(m, k)
    laid_out = lay_out_scale(scale, "BlockWise128x128")
    padded = ceil_div(k, 4) * 4
    assert laid_out.shape == (padded, m)
    assert laid_out.stride(0) == 1
    assert m == 1 or laid_out.stride(1) == padded
    assert torch.equal(laid_out[:k], scale.t())
    assert bool((laid_out[k:] == 1).all())
    rowwise = torch.arange(1.0, rows * k + 1).view(rows, k)
    outer = lay_out_scale(rowwise, "BlockWise1x128")
    assert torch.equal(outer, rowwise)
    assert outer.stride(0) == 1 or rows == 1
    assert lay_out_scale(outer, "BlockWise1x128").data_ptr() == outer.data_ptr()


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("sizes", [(0, 16, 32), (16, 0, 32), (16, 32, 0)], ids=str)
def test_no_tokens_give_zeros_or_nothing(sizes: tuple[int, int, int]) -> None:
    M, N, K = sizes
    recipe = BlockScaling()
    a, b = (quantize(torch.ones(s), recipe.input) for s in ((M, K), (N, K)))
    operands = [ScaledOperand(q.codes, q.scale, "BlockWise1x128") for q in (a, b)]
    y = ScaledMM().gemm(*operands, recipe, torch.float32)
    assert torch.equal(y, torch.zeros(M, N))


@pytest.mark.usefixtures("gpu")
def test_nan_in_the_input_reaches_the_output() -> None:
    layer = Float8Linear.from_float(nn.Linear(256, 32), BlockScaling())
    layer.backend = ScaledMM()
    x = sample((5, 256), 1, torch.float32)
    x[2, 200] = float("inf")
    assert layer(x).isnan().all(1).tolist() == [False, False, True, False, False]


def test_the_gemm_is_an_operator_that_compiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scaled_mm, "_scaled_mm", hopper)
    q = quantize(sample((37, 144)), QuantSpec())
    scale = lay_out_scale(q.scale, "BlockWise1x128")
    b = quantize(sample((32, 144)), QuantSpec())
    scale_b = lay_out_scale(b.scale, "BlockWise1x128")
    kinds = ("BlockWise1x128", "BlockWise1x128")
    arguments = (q.codes, scale, b.codes, scale_b, *kinds, torch.bfloat16)
    tests = ["test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]
    operator = torch.ops.cofuse_fp8.scaled_gemm.default
    torch.library.opcheck(operator, arguments, test_utils=tests)
    compiled = torch.compile(lambda *a: scaled_mm.scaled_gemm(*a), fullgraph=True, backend="eager")
    assert torch.equal(compiled(*arguments), operator(*arguments))


def on_gpu(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device=None: capability)


@pytest.mark.parametrize("recipe", [*RECIPES, DelayedScaling()], ids=lambda r: r.name)
def test_hopper_runs_all_recipes_that_have_a_kernel(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_gpu(monkeypatch, (9, 0))
    assert ScaledMM().refusal(recipe, 1536, 256, GPU) is None


@pytest.mark.parametrize(
    ("recipe", "capability", "features", "word"),
    [
        (BlockScaling(), (10, 0), (128, 128), "Hopper"),
        (BlockScaling(), (8, 9), (128, 128), "Hopper"),
        (RowwiseScaling(), (8, 0), (128, 128), "8.9"),
        (MXFP8(), (9, 0), (128, 128), "1 x 32"),
        (NVFP4(), (10, 0), (128, 128), "E2M1"),
        (BlockScaling(block=64), (9, 0), (128, 128), "1 x 64"),
        (BlockScaling(), (9, 0), (100, 128), "multiples of 16"),
        (RowwiseScaling(), (9, 0), (128, 40), "multiples of 16"),
        (replace(BlockScaling(), weight=QuantSpec()), (9, 0), (128, 128), "no kernel multiplies"),
    ],
    ids=str,
)
def test_what_has_no_kernel_is_refused_with_its_reason(
    recipe: Recipe,
    capability: tuple[int, int],
    features: tuple[int, int],
    word: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    on_gpu(monkeypatch, capability)
    assert word in (ScaledMM().refusal(recipe, *features, GPU) or "")


def test_no_gpu_and_an_old_torch_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "CUDA" in (ScaledMM().refusal(BlockScaling(), 128, 128, CPU) or "")
    on_gpu(monkeypatch, (9, 0))
    monkeypatch.setattr(scaled_mm, "_scaled_mm", None)
    assert torch.__version__ in (ScaledMM().refusal(BlockScaling(), 128, 128, GPU) or "")


def test_blocks_saved_for_backward_are_codes_and_scales_alone() -> None:
    x = sample((64, 256))
    _, saved = ScaledMM().input(x, BlockScaling(), keep=True, amax=None)
    assert saved is not None
    assert saved.codes.element_size() == 1
    assert saved.outer is None
    assert sum(t.nbytes for t in saved[:2]) == 64 * 256 + 4 * 64 * 2
    kept = Quantized(saved.codes, saved.scale, QuantSpec())
    assert torch.equal(dequantize(kept), dequantize(quantize(x)))
