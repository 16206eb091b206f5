"""Laws of the operators, by their reference in torch; the kernels have their own tests."""

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm

from fp8 import ops
from fp8.quantize import Quantized, dequantize, quantize
from fp8.recipe import QuantSpec

P2 = QuantSpec()
FP32 = QuantSpec(scale_format="fp32")
scales = pytest.mark.parametrize("power_of_two", [True, False], ids=["p2", "fp32-scales"])
ragged = st.tuples(st.integers(1, 300), st.integers(1, 300))


def sample(shape: tuple[int, ...], seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=rng)
    return (x * torch.exp2(torch.randint(-8, 3, shape, generator=rng).float())).to(dtype)


def same(a: Tensor, b: Tensor) -> bool:
    if a.dtype == torch.float8_e4m3fn:
        a, b = a.view(torch.uint8), b.view(torch.uint8)
    return torch.equal(a, b)


def all_same(found: tuple[Tensor, ...], wanted: tuple[Tensor, ...]) -> bool:
    return len(found) == len(wanted) and all(map(same, found, wanted))


def arguments(name: str, shape: tuple[int, int] = (130, 260)) -> tuple[Any, ...]:
    x, up, dp = (sample(shape, seed) for seed in range(3))
    weight = sample(shape[1:], 3)
    return {
        "quantize_1x128": (x, True),
        "quantize_1x128_dual": (x, False),
        "quantize_128x128_dual": (x, True),
        "transpose_requantize": ops.quantize_1x128(x, True),
        "rmsnorm_quantize": (x, weight, 1e-6, True),
        "swiglu_quantize": (x, up, True),
        "swiglu_backward_quantize": (dp, *ops.swiglu_quantize(x, up, True)[2:], True),
    }[name]


NAMES = [
    "quantize_1x128",
    "quantize_1x128_dual",
    "quantize_128x128_dual",
    "transpose_requantize",
    "rmsnorm_quantize",
    "swiglu_quantize",
    "swiglu_backward_quantize",
]
by_name = pytest.mark.parametrize("name", NAMES)


@by_name
@pytest.mark.parametrize("shape", [(130, 260), (1, 1), (16, 128)], ids=str)
def test_operators_keep_the_rules_of_torch(name: str, shape: tuple[int, int]) -> None:
    """Schema, shapes, dtypes and strides of the fake, no aliases, dynamic shapes."""
    operator, given_arguments = getattr(torch.ops.cofuse_fp8, name).default, arguments(name, shape)
    tests = [
        "test_schema",
        "test_autograd_registration",
        "test_faketensor",
        "test_aot_dispatch_dynamic",
    ]
    tensors = [a for a in given_arguments if isinstance(a, Tensor)]
    if any(t.dtype == torch.float8_e4m3fn for t in tensors):
        tests.remove("test_schema")  # torch's own check multiplies, which FP8 has not
    before = [t.clone() for t in tensors]
    torch.library.opcheck(operator, given_arguments, test_utils=tests)
    results = operator(*given_arguments)
    assert all_same(tuple(tensors), tuple(before))
    places = [t.untyped_storage().data_ptr() for t in (*tensors, *results)]
    assert len(set(places)) == len(places)


@by_name
def test_operators_compile_into_one_graph(name: str) -> None:
    operator: Callable[..., tuple[Tensor, ...]] = getattr(ops, name)
    compiled = torch.compile(lambda *a: operator(*a), fullgraph=True, backend="aot_eager")
    given_arguments = arguments(name)
    assert all_same(compiled(*given_arguments), operator(*given_arguments))


@scales
@settings(max_examples=20, deadline=None)
@given(shape=ragged, seed=st.integers(0, 2**31))
def test_one_read_gives_what_two_quantisers_give(
    power_of_two: bool, shape: tuple[int, int], seed: int
) -> None:
    x = sample(shape, seed)
    spec = P2 if power_of_two else FP32
    rows, columns = quantize(x, spec), quantize(x.t(), spec)
    dual = ops.quantize_1x128_dual(x, power_of_two)
    assert all_same(dual, (*rows[:2], *columns[:2]))
    assert all_same(dual[:2], ops.quantize_1x128(x, power_of_two))


@scales
@settings(max_examples=20, deadline=None)
@given(shape=ragged, seed=st.integers(0, 2**31))
def test_tiles_and_their_transpose_are_the_same_codes(
    power_of_two: bool, shape: tuple[int, int], seed: int
) -> None:
    w = sample(shape, seed, torch.float32)
    codes, codes_t, scale = ops.quantize_128x128_dual(w, power_of_two)
    spec = QuantSpec(block=(128, 128), scale_format=P2.scale_format if power_of_two else "fp32")
    assert all_same((codes, scale), quantize(w, spec)[:2])
    assert same(codes_t, codes.t())
    assert same(ops.quantize_128x128_dual(w.t(), power_of_two)[0], codes_t)


@settings(max_examples=20, deadline=None)
@given(shape=ragged, seed=st.integers(0, 2**31))
def test_the_transpose_from_codes_is_that_of_quantize(shape: tuple[int, int], seed: int) -> None:
    q = quantize(sample(shape, seed), P2)
    found = ops.transpose_requantize(q.codes, q.scale)
    assert all_same(found, quantize(dequantize(q).t(), P2)[:2])


@pytest.mark.parametrize("rows", [2, 130])
def test_scales_lie_as_the_gemm_reads_them(rows: int) -> None:
    x = sample((rows, 300))
    assert ops.quantize_1x128(x, True)[1].stride() == (1, rows)
    _, scale, _, scale_t = ops.quantize_1x128_dual(x, True)
    assert scale.stride() == (1, rows)
    assert scale_t.shape == (300, -(-rows // 128))
    assert scale_t.t().is_contiguous()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_rmsnorm_is_the_models_own_norm_then_the_quantiser(dtype: torch.dtype) -> None:
    x, norm = sample((33, 192), dtype=dtype), Qwen2RMSNorm(192, eps=1e-6).to(dtype)
    with torch.no_grad():
        norm.weight.copy_(1 + 0.1 * sample((192,), 1, dtype))
        wanted = norm(x)
    y, codes, scale, rstd = ops.rmsnorm_quantize(x, norm.weight.detach(), 1e-6, True)
    assert same(y, wanted)
    assert all_same((codes, scale), ops.quantize_1x128(wanted, True))
    torch.testing.assert_close(rstd, x.float().square().mean(-1).add(1e-6).rsqrt())


@scales
def test_swiglu_is_the_product_then_the_quantiser(power_of_two: bool) -> None:
    gate, up = sample((40, 300), 1), sample((40, 300), 2)
    product = (torch.nn.functional.silu(gate.float()) * up.float()).bfloat16()
    wanted = [t for source in (product, gate, up) for t in ops.quantize_1x128(source, power_of_two)]
    assert all_same(ops.swiglu_quantize(gate, up, power_of_two), tuple(wanted))


@scales
def test_swiglu_backward_is_autograd_at_the_kept_values(power_of_two: bool) -> None:
    gate, up, dp = (sample((40, 300), seed, torch.float32) for seed in (1, 2, 3))
    spec = P2 if power_of_two else FP32
    kept = ops.swiglu_quantize(gate, up, power_of_two)[2:]
    seen = [dequantize(Quantized(*kept[i : i + 2], spec)).requires_grad_() for i in (0, 2)]
    (torch.nn.functional.silu(seen[0]) * seen[1]).backward(dp)
    found = ops.swiglu_backward_quantize(dp, *kept, power_of_two)
    for grad, at in ((seen[0].grad, 0), (seen[1].grad, 4)):
        assert grad is not None
        codes, scale, codes_t, scale_t = found[at : at + 4]
        for q, wanted in (
            (Quantized(codes, scale, spec), grad),
            (Quantized(codes_t, scale_t, spec), grad.t()),
        ):
            # Half a step of E4M3, or of its subnormals.
            step = 2.0**-10 * q.scale.repeat_interleave(128, 1)[:, : wanted.shape[1]]
            bound = torch.maximum(2.0**-4 * wanted.abs(), step) * (1 + 1e-4)
            assert bool(((dequantize(q) - wanted).abs() <= bound).all())


def test_gradients_are_rounded_to_their_dtype_before_they_are_quantised() -> None:
    gate, up, dp = (sample((8, 200), seed) for seed in (1, 2, 3))
    kept = ops.swiglu_quantize(gate, up, True)[2:]
    wide = ops.swiglu_backward_quantize(dp.float(), *kept, True)
    narrow = ops.swiglu_backward_quantize(dp, *kept, True)
    assert not all_same(narrow, wide)  # bf16 first, then E4M3: two roundings
    gate_32, up_32 = (dequantize(Quantized(*kept[i : i + 2], P2)) for i in (0, 2))
    d_up = (dp.float() * torch.nn.functional.silu(gate_32)).bfloat16()
    assert float((narrow[4].float() != ops.quantize_1x128(d_up, True)[0].float()).sum()) <= 2
    assert up_32.shape == d_up.shape


def test_the_kernels_say_why_they_do_not_run() -> None:
    why_not = ops.kernels_refusal(torch.device("cpu"))
    assert why_not is not None
    assert "CUDA" in why_not


def test_no_kernel_is_imported_without_cuda() -> None:
    code = (
        "import sys, torch; from fp8 import ops; assert 'triton' not in sys.modules;"
        "ops.quantize_1x128(torch.ones(2, 3), True);"  # torch itself imports Triton here
        "assert not any(name.startswith('fp8.backends.triton') for name in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
