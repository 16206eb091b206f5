"""The Triton kernels against the reference in torch: on a GPU if there is one, else interpreted."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fp8 import ops
from fp8.formats import E4M3

triton = pytest.importorskip("triton", reason="Triton is not installed")
from fp8.backends import triton_fused, triton_quantize  # noqa: E402 - only with Triton

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Functions of its own library are interpreted only if the environment said so before its import.
INTERPRETED = type(triton.language.max).__name__ == "InterpretedFunction"
pytestmark = [
    pytest.mark.skipif(
        DEVICE == "cpu" and not INTERPRETED,
        reason="Triton was imported before its interpreter was asked for",
    ),
    # numpy's words, where a GPU has none: sigmoid of -1000 is 0, and inf * 0 is NaN.
    pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:invalid value encountered in multiply:RuntimeWarning"),
]

SHAPES = [(1, 1), (3, 128), (5, 129), (130, 300), (257, 7), (128, 256)]
shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)
dtypes = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
scales = pytest.mark.parametrize("power_of_two", [True, False], ids=["p2", "fp32-scales"])
# torch.library's function of the reference, whatever device the kernels run on.
REFERENCES = {
    "quantize_1x128": ops.quantize_1x128,
    "quantize_1x128_dual": ops.quantize_1x128_dual,
    "quantize_128x128_dual": ops.quantize_128x128_dual,
}


def sample(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Values over many binades, with zeros, ties and a sign on everything."""
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=rng)
    x = x * torch.exp2(torch.randint(-22, 6, shape, generator=rng).float())
    mantissa, power = torch.frexp(x)
    ties = torch.ldexp((mantissa * 32).round() / 32, power)
    x = torch.where(torch.rand(shape, generator=rng) < 0.4, ties, x)
    return (x * (torch.rand(shape, generator=rng) > 0.05)).to(dtype)


def there(*tensors: Tensor) -> list[Tensor]:
    return [t.to(DEVICE) for t in tensors]


def assert_same(found: tuple[Tensor, ...], wanted: tuple[Tensor, ...]) -> None:
    """Bit for bit, layouts too; but NaN is one value, whatever its bits."""
    assert len(found) == len(wanted)
    for ours, theirs in zip(found, wanted, strict=True):
        ours = ours.cpu()
        assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)
        assert all(
            a == b
            for a, b, n in zip(ours.stride(), theirs.stride(), ours.shape, strict=True)
            if n > 1
        )
        if ours.dtype == E4M3.dtype:
            # A block whose scale is NaN has no values, so no codes worth a name.
            valid = ~theirs.float().isnan()
            assert torch.equal(ours.view(torch.uint8)[valid], theirs.view(torch.uint8)[valid])
            assert torch.equal(ours.float().isnan(), ~valid)
        else:
            assert torch.equal(ours.isnan(), theirs.isnan())
            assert torch.equal(ours.nan_to_num(), theirs.nan_to_num())


@scales
@dtypes
@shapes
@pytest.mark.parametrize("name", list(REFERENCES))
def test_quantisers_give_the_codes_and_scales_of_the_reference(
    name: str, shape: tuple[int, int], dtype: torch.dtype, power_of_two: bool
) -> None:
    x = sample(shape, dtype)
    found = getattr(triton_quantize, name)(*there(x), power_of_two)
    assert_same(found, REFERENCES[name](x, power_of_two))


@scales
@pytest.mark.parametrize("amax", [0.0, 1e-45, 1e-38, 2e-36, 1.3e36, 3.4e38])
@pytest.mark.parametrize("name", list(REFERENCES))
def test_tiny_huge_and_empty_blocks(name: str, amax: float, power_of_two: bool) -> None:
    x = torch.linspace(-1, 1, 2 * 200).reshape(2, 200) * amax
    found = getattr(triton_quantize, name)(*there(x), power_of_two)
    assert all(bool(t.cpu().float().isfinite().all()) for t in found)
    assert_same(found, REFERENCES[name](x, power_of_two))


@scales
@pytest.mark.parametrize("bad", [float("nan"), -float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", list(REFERENCES))
def test_nan_and_infinity_poison_their_block_and_no_other(
    name: str, bad: float, power_of_two: bool
) -> None:
    x = sample((130, 260), torch.float32)
    x[1, 130] = bad
    found = getattr(triton_quantize, name)(*there(x), power_of_two)
    assert_same(found, REFERENCES[name](x, power_of_two))
    assert any(int(t.isnan().sum()) == 1 for t in found if t.dtype == torch.float32)


@pytest.mark.parametrize("power", [-100, -7, 0, 90])
def test_every_code_and_every_tie_between_two(power: int) -> None:
    codes = torch.tensor([c for c in range(256) if c & 0x7F != 0x7F], dtype=torch.uint8)
    values = codes.view(E4M3.dtype).double()
    positive = values[:127]
    midpoints = torch.cat([(positive[1:] + positive[:-1]) / 2, -(positive[1:] + positive[:-1]) / 2])
    for part in (values[:127], values[127:], midpoints[:126], midpoints[126:]):
        # 448 fixes the scale of the one block at 2**power.
        x = torch.cat([part, torch.tensor([448.0])]).float()[None] * 2.0**power
        found = triton_quantize.quantize_1x128(*there(x), True)
        assert float(found[1]) == 2.0**power
        assert_same(found, ops.quantize_1x128(x, True))


@pytest.mark.parametrize("power", [-100, 0, 90])
def test_a_scale_doubles_one_place_above_the_largest_code(power: int) -> None:
    limit = torch.tensor(448.0 * 2.0**power)
    just_above = torch.nextafter(limit, torch.tensor(float("inf")))
    just_below = torch.nextafter(limit, torch.tensor(0.0))
    x = torch.stack([limit, just_above, just_below])[:, None]
    found = triton_quantize.quantize_1x128(*there(x), True)
    assert (found[1].cpu()[:, 0] / 2.0**power).tolist() == [1.0, 2.0, 1.0]
    assert_same(found, ops.quantize_1x128(x, True))


@dtypes
@shapes
def test_codes_of_the_transpose_from_codes_alone(
    shape: tuple[int, int], dtype: torch.dtype
) -> None:
    codes, scale = ops.quantize_1x128(sample(shape, dtype), True)
    wanted = ops.transpose_requantize(codes, scale)
    assert_same(triton_quantize.transpose_requantize(*there(codes, scale)), wanted)
    in_rows = scale.contiguous()  # any strides will do
    assert_same(triton_quantize.transpose_requantize(*there(codes, in_rows)), wanted)


def test_a_poisoned_block_poisons_the_columns_it_covers() -> None:
    x = sample((130, 260), torch.float32)
    x[1, 130] = float("nan")
    codes, scale = ops.quantize_1x128(x, True)
    found = triton_quantize.transpose_requantize(*there(codes, scale))
    assert_same(found, ops.transpose_requantize(codes, scale))
    assert bool(found[1][128:256, 0].isnan().all())
    assert int(found[1].isnan().sum()) == 128


def test_views_and_empty_tensors() -> None:
    wide = sample((140, 600), torch.bfloat16)
    (there_wide,) = there(wide)
    for view in (lambda t: t[3:, 100:400], lambda t: t.t(), lambda t: t[:, ::2]):
        found = triton_quantize.quantize_1x128_dual(view(there_wide), True)
        assert_same(found, ops.quantize_1x128_dual(view(wide), True))
    for shape in ((0, 256), (256, 0)):
        empty = torch.empty(shape)
        found = triton_quantize.quantize_1x128_dual(*there(empty), True)
        assert_same(found, ops.quantize_1x128_dual(empty, True))


def test_offsets_beyond_31_bits() -> None:
    rows, stride = 17, 2**27  # the memory between the rows is never touched
    space = torch.empty((rows - 1) * stride + 128, dtype=torch.bfloat16, device=DEVICE)
    x = space.as_strided((rows, 128), (stride, 1))
    x.copy_(sample((rows, 128), torch.bfloat16))
    found = triton_quantize.quantize_1x128_dual(x, True)
    assert_same(found, ops.quantize_1x128_dual(x.cpu().contiguous(), True))


@scales
@dtypes
@pytest.mark.parametrize("shape", [(1, 1), (5, 129), (3, 576), (64, 256)], ids=str)
def test_rmsnorm_quantises_what_it_returns(
    shape: tuple[int, int], dtype: torch.dtype, power_of_two: bool
) -> None:
    x = sample(shape, torch.float32).clamp(-8, 8).to(dtype)
    weight = (1 + 0.1 * sample(shape[1:], torch.float32, seed=1).clamp(-3, 3)).to(dtype)
    y, codes, scale, rstd = triton_fused.rmsnorm_quantize(*there(x, weight), 1e-6, power_of_two)
    wanted_y, _, _, wanted_rstd = ops.rmsnorm_quantize(x, weight, 1e-6, power_of_two)
    assert y.dtype == dtype
    # Two roundings of y and the order of the sum; one place of bf16 is 2**-7.
    close = {"rtol": 2**-7 if dtype == torch.bfloat16 else 1e-6, "atol": 0.0}
    torch.testing.assert_close(rstd.cpu(), wanted_rstd, rtol=1e-6, atol=0.0)
    torch.testing.assert_close(y.cpu(), wanted_y, **close)
    if dtype == torch.bfloat16:  # one rounding less would show in a quarter of y
        assert float((y.cpu() != wanted_y).float().mean()) <= 0.01
    assert_same((codes, scale), ops.quantize_1x128(y.cpu(), power_of_two))


def test_rmsnorm_of_bad_rows_is_bad_in_those_rows() -> None:
    x, weight = sample((4, 200), torch.bfloat16), torch.ones(200, dtype=torch.bfloat16)
    x[1, 5], x[2, 7] = float("nan"), float("inf")
    _, _, scale, rstd = triton_fused.rmsnorm_quantize(*there(x, weight), 1e-6, True)
    assert scale.cpu().isnan().any(1).tolist() == [False, True, True, False]
    assert float(rstd[2]) == 0.0


@scales
@dtypes
@pytest.mark.parametrize("shape", [(1, 1), (5, 129), (130, 300)], ids=str)
def test_swiglu_quantises_its_inputs_exactly_and_its_product(
    shape: tuple[int, int], dtype: torch.dtype, power_of_two: bool
) -> None:
    gate, up = (sample(shape, dtype, seed=s) for s in (1, 2))
    found = triton_fused.swiglu_quantize(*there(gate, up), power_of_two)
    wanted = ops.swiglu_quantize(gate, up, power_of_two)
    assert_same(found[2:], wanted[2:])
    assert_nearly_same(found[:2], wanted[:2])


@scales
@dtypes
@pytest.mark.parametrize("shape", [(1, 1), (5, 129), (130, 300)], ids=str)
def test_swiglu_backward_quantises_both_gradients_both_ways(
    shape: tuple[int, int], dtype: torch.dtype, power_of_two: bool
) -> None:
    gate, up, dp = (sample(shape, dtype, seed=s) for s in (1, 2, 3))
    kept = ops.swiglu_quantize(gate, up, power_of_two)[2:]
    found = triton_fused.swiglu_backward_quantize(*there(dp, *kept), power_of_two)
    wanted = ops.swiglu_backward_quantize(dp, *kept, power_of_two)
    for at in range(0, 8, 2):
        assert_nearly_same(found[at : at + 2], wanted[at : at + 2])


def assert_nearly_same(found: tuple[Tensor, ...], wanted: tuple[Tensor, ...]) -> None:
    """As assert_same, but exp may differ in fp32's last place and tip what is on a border."""
    (codes, scale), (wanted_codes, wanted_scale) = found, wanted
    assert codes.shape == wanted_codes.shape
    assert scale.stride() == wanted_scale.stride()
    torch.testing.assert_close(scale.cpu(), wanted_scale, rtol=1e-5, atol=0.0)
    ours, theirs = codes.cpu().float(), wanted_codes.float()
    assert float((ours != theirs).float().mean()) <= 2e-3
    torch.testing.assert_close(ours, theirs, rtol=2**-3, atol=E4M3.smallest_subnormal)


# One configuration each of those that autotuning may choose, as Triton sees it on Hopper.
COMPILED = {
    "triton_quantize._quantize_1x128": ({"P2": True, "ROWS": 32}, 4),
    "triton_quantize._quantize_1x128_dual": ({"P2": True}, 8),
    "triton_quantize._quantize_128x128_dual": ({"P2": False}, 16),
    "triton_quantize._transpose_requantize": ({}, 8),
    "triton_fused._rmsnorm_quantize": ({"P2": True, "BLOCKS": 16}, 4),
    "triton_fused._swiglu_quantize": ({"P2": True, "ROWS": 16}, 4),
    "triton_fused._swiglu_backward_quantize": ({"P2": True}, 8),
}
COMPILE = """
import json, sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from fp8.backends import triton_fused, triton_quantize

TYPES = {"eps": "fp32"} | dict.fromkeys(("x", "w", "y", "weight", "gate", "up", "dp"), "*bf16")
MODULES = {"triton_quantize": triton_quantize, "triton_fused": triton_fused}

def type_of(name, constants):
    if name in constants:
        return "constexpr"
    if "codes" in name:
        return "*u8"
    pointer = "scale" in name and name not in ("scale_r", "scale_c") or name == "rstd"
    return TYPES.get(name, "*fp32" if pointer else "i32")

def compiled(name, constants, warps):
    module, kernel = name.split(".")
    kernel = getattr(MODULES[module], kernel)
    kernel = kernel.fn if hasattr(kernel, "configs") else kernel
    names = kernel.arg_names
    signature = {n: type_of(n, constants) for n in names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names)
               if signature[n] not in ("constexpr", "fp32")}
    fixed = {(names.index(n),): value for n, value in constants.items()}
    source = ASTSource(kernel, signature, fixed, aligned)
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps})
    return {"cubin": len(made.asm["cubin"]), "ptx": made.asm["ptx"], "shared": made.metadata.shared}

wanted = json.loads(sys.argv[1])
print(json.dumps({name: compiled(name, *how) for name, how in wanted.items()}))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="Triton brings its assembler on Linux alone")
def test_kernels_compile_for_hopper(tmp_path: Path) -> None:
    """The interpreter forgives what the compiler does not; this needs no GPU."""
    done = subprocess.run(
        [sys.executable, "-c", COMPILE, json.dumps(COMPILED)],
        env=os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    compiled = json.loads(done.stdout)
    assert compiled.keys() == COMPILED.keys()
    for name, made in compiled.items():
        assert made["cubin"] > 0, name
        assert made["shared"] <= 48 * 1024, name  # several programs share a multiprocessor
        # The hardware's own conversion, to nearest even and saturating, and 16-byte accesses.
        for instruction in ("cvt.rn.satfinite.e4m3x2.f32", "ld.global.v4.b32", "st.global.v4.b32"):
            assert instruction in made["ptx"], name
