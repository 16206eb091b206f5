"""FP8 GEMMs of torch on a GPU: cuBLASLt through torch.nn.functional.scaled_mm.

Operands are codes [rows, contracted] with decode scales in the layout that their kernel reads.
Codes are those of the emulator; the fp32 sum is the hardware's, rounded as recipe.gemm says.
Conditions are those of ATen's ScaledBlas.cpp: block scales need compute capability 9.0, row and
tensor scales 8.9; features in multiples of 16. Tokens may be any number.
Shapes: M, N, K = rows of a, rows of b, contracted; m, n, k = blocks of 128 along them.
"""

from collections.abc import Callable
from typing import Any, Final, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from fp8 import ops
from fp8.backends.base import Saved
from fp8.formats import E4M3, E5M2
from fp8.quantize import Quantized, quantize
from fp8.recipe import ROW, TENSOR, Block, QuantSpec, Recipe

# Absent from a torch older than 2.10: `refusal` says so.
_scaled_mm: Callable[..., Tensor] | None = getattr(torch.nn.functional, "scaled_mm", None)

ScaleKind = Literal["TensorWise", "RowWise", "BlockWise1x128", "BlockWise128x128"]
"""Names of torch.nn.functional.ScalingType."""
KINDS: Final[dict[Block, ScaleKind]] = {
    TENSOR: "TensorWise",
    ROW: "RowWise",
    (1, 128): "BlockWise1x128",
    (128, 128): "BlockWise128x128",
}
_MULTIPLE: Final = 16  # bytes that cuBLASLt reads at once
_ROWS: Final = (1, 128)
_TILES: Final = (128, 128)


class ScaledOperand(NamedTuple):
    """One side of a GEMM, ready for the kernel."""

    codes: Tensor
    """[rows, contracted], contiguous."""
    scale: Tensor
    """float32, as `lay_out_scale` gives it."""
    kind: ScaleKind


class ScaledMM:
    """The GPU's own FP8 GEMM, with Triton quantisers where blocks are 128 wide."""

    name = "scaled_mm"

    def refusal(
        self, recipe: Recipe, in_features: int, out_features: int, device: torch.device
    ) -> str | None:
        """Say why the backend cannot run such a layer; None when it can."""
        return (
            device_refusal(device, blocks=recipe.input.block == _ROWS)
            or _recipe_refusal(recipe)
            or _features_refusal(in_features, out_features)
        )

    def input(
        self, x_TK: Tensor, recipe: Recipe, *, keep: bool, amax: Tensor | None
    ) -> tuple[ScaledOperand, Saved | None]:
        """Quantise the input; keep its rows where they serve backward, else its columns."""
        spec = recipe.input
        if not keep or recipe.saves_rows:
            x = _quantized(x_TK, spec, amax)
            return x, Saved(x.codes, x.scale, None) if keep else None
        x, columns = _quantized_twice(x_TK, spec, amax)
        return x, Saved(columns.codes, columns.scale, None)

    def saved_input(
        self, saved: Saved, recipe: Recipe, tokens: int, features: int
    ) -> ScaledOperand:
        """Return the kept input as [K, T], blocks along T."""
        kind = KINDS[recipe.input.block]
        codes, scale = saved.codes, saved.scale
        if not recipe.saves_rows:
            return ScaledOperand(codes, scale, kind)
        if kind == "TensorWise":
            return ScaledOperand(codes.t().contiguous(), scale, kind)
        codes_t, scale_t = ops.transpose_requantize(codes, scale)
        return ScaledOperand(codes_t, scale_t, kind)

    def weight(self, w_NK: Tensor, recipe: Recipe) -> tuple[ScaledOperand, ScaledOperand]:
        """Quantise the weight as [N, K] and as [K, N]."""
        spec = recipe.weight
        if spec.block != _TILES:
            return _quantized_twice(w_NK, spec, None)
        codes, codes_t, scale = ops.quantize_128x128_dual(w_NK, _is_power_of_two(spec))
        kind = KINDS[_TILES]
        return (
            ScaledOperand(codes, lay_out_scale(scale, kind), kind),
            ScaledOperand(codes_t, lay_out_scale(scale.t(), kind), kind),
        )

    def gradient(
        self, g_TN: Tensor, recipe: Recipe, *, dual: bool, amax: Tensor | None
    ) -> tuple[ScaledOperand, ScaledOperand | None]:
        """Quantise the output's gradient as [T, N] and, if `dual`, as [N, T]."""
        if dual:
            return _quantized_twice(g_TN, recipe.grad_output, amax)
        return _quantized(g_TN, recipe.grad_output, amax), None

    def gemm(
        self, a: ScaledOperand, b: ScaledOperand, recipe: Recipe, dtype: torch.dtype
    ) -> Tensor:
        """Return a @ b.T, summed in fp32, rounded as recipe.gemm says, in dtype."""
        result = torch.bfloat16 if recipe.gemm == "bfloat16" else torch.float32
        y: Tensor = scaled_gemm(a.codes, a.scale, b.codes, b.scale, a.kind, b.kind, result)
        return y.to(dtype)


def device_refusal(device: torch.device, *, blocks: bool) -> str | None:
    """Say why scaled GEMMs do not run on a device; `blocks`: those with 128-wide blocks."""
    if device.type != "cuda":
        return f"it needs a CUDA device; the layer is on {device.type}"
    if torch.version.hip is not None:
        return "the layouts are those of NVIDIA GPUs; this torch is built for ROCm"
    if _scaled_mm is None:
        return f"torch {torch.__version__} has no scaled_mm; wanted 2.11 or later"
    major, minor = torch.cuda.get_device_capability(device)
    if blocks and major != 9:
        return (
            f"compute capability is {major}.{minor}; cuBLASLt has block-scaled GEMMs for 9.0 "
            "(Hopper) alone"
        )
    if (major, minor) < (8, 9):
        return f"compute capability is {major}.{minor}; FP8 GEMMs need 8.9"
    return None


def lay_out_scale(scale: Tensor, kind: ScaleKind) -> Tensor:
    """Return decode scales as the kernel for `kind` reads them; a view if they are so already.

    TensorWise [1, 1]. RowWise [M, 1], contiguous. BlockWise1x128 [M, k], strides (1, M).
    BlockWise128x128 [m, k] becomes [round_up(k, 4), m], strides (1, round_up(k, 4)): transposed,
    and padded so that every line starts at 16 bytes.
    """
    if kind == "BlockWise128x128":
        return pad(scale, (0, -scale.shape[1] % 4), value=1.0).contiguous().t()
    if kind == "BlockWise1x128":
        return scale.t().contiguous().t()
    return scale.contiguous()


@torch.library.custom_op("cofuse_fp8::scaled_gemm", mutates_args=())
def scaled_gemm(
    a: Tensor,
    scale_a: Tensor,
    b: Tensor,
    scale_b: Tensor,
    kind_a: str,
    kind_b: str,
    dtype: torch.dtype,
) -> Tensor:
    """Return a [M, K] @ b [N, K].T with scales by `lay_out_scale`.

    An operator of our own, because the shape check that torch.compile runs for scaled_mm (torch
    2.13) rounds blocks down and so refuses sizes that the kernel takes.
    """
    M, N = a.shape[0], b.shape[0]
    if 0 in (M, N, a.shape[1]):
        return a.new_zeros(M, N, dtype=dtype)
    a, scale_a = _padded(a, scale_a, kind_a, rows=kind_a.startswith("Block"))
    b, scale_b = _padded(b, scale_b, kind_b, rows=False)
    assert _scaled_mm is not None
    kinds = torch.nn.functional.ScalingType
    y = _scaled_mm(
        a,
        b.t(),
        scale_a,
        getattr(kinds, kind_a),
        scale_b.t() if kind_b == "RowWise" else scale_b,
        getattr(kinds, kind_b),
        output_dtype=dtype,
        use_fast_accum=False,  # Hopper's fast sum keeps 14 bits
    )
    return y if y.shape[0] == M else y[:M].contiguous()


@scaled_gemm.register_fake
def _(
    a: Tensor,
    scale_a: Tensor,
    b: Tensor,
    scale_b: Tensor,
    kind_a: str,
    kind_b: str,
    dtype: torch.dtype,
) -> Tensor:
    return a.new_empty(a.shape[0], b.shape[0], dtype=dtype)


def _padded(codes: Tensor, scale: Tensor, kind: str, *, rows: bool) -> tuple[Tensor, Tensor]:
    """Fill K up to a multiple of 16 with zeros, and, if `rows`, M too.

    The weight's gradient sums over tokens, of which there may be any number. A block of 128 takes
    16 whole times, so K's filling adds no block. Lines of M scales must start at 16 bytes.
    """
    M, K = codes.shape
    more_rows, more_columns = -M % _MULTIPLE if rows else 0, -K % _MULTIPLE
    if not (more_rows or more_columns):
        return codes, scale
    filled = pad(codes.view(torch.uint8), (0, more_columns, 0, more_rows)).view(codes.dtype)
    if more_rows and kind == "BlockWise1x128":
        scale = lay_out_scale(pad(scale, (0, 0, 0, more_rows), value=1.0), "BlockWise1x128")
    return filled, scale


def _quantized(x: Tensor, spec: QuantSpec, amax: Tensor | None) -> ScaledOperand:
    kind = KINDS[spec.block]
    if kind == "BlockWise1x128":
        assert amax is None
        codes, scale = ops.quantize_1x128(x, _is_power_of_two(spec))
        return ScaledOperand(codes, scale, kind)
    return _operand(quantize(x, spec, amax=amax))


def _quantized_twice(
    x: Tensor, spec: QuantSpec, amax: Tensor | None
) -> tuple[ScaledOperand, ScaledOperand]:
    """Quantise along both axes from the source; one scale per tensor serves both."""
    kind = KINDS[spec.block]
    if kind == "BlockWise1x128":
        codes, scale, codes_t, scale_t = ops.quantize_1x128_dual(x, _is_power_of_two(spec))
        return ScaledOperand(codes, scale, kind), ScaledOperand(codes_t, scale_t, kind)
    rows = _operand(quantize(x, spec, amax=amax))
    if kind == "TensorWise":
        return rows, ScaledOperand(rows.codes.t().contiguous(), rows.scale, kind)
    return rows, _operand(quantize(x.t(), spec, amax=amax))


def _operand(q: Quantized) -> ScaledOperand:
    kind = KINDS[q.spec.block]
    return ScaledOperand(q.codes, lay_out_scale(q.scale, kind), kind)


def _is_power_of_two(spec: QuantSpec) -> bool:
    return spec.scale_format == "power_of_two"


def _recipe_refusal(recipe: Recipe) -> str | None:
    specs = {"input": recipe.input, "weight": recipe.weight, "gradient": recipe.grad_output}
    for role, spec in specs.items():
        if spec.block not in KINDS or spec.format not in (E4M3, E5M2) or spec.stochastic:
            rows, columns = spec.block
            return (
                f"the {recipe.name} recipe's {role} is {spec.format.name} in blocks of {rows} x "
                f"{columns}; there are kernels for E4M3 and E5M2 with a scale per tensor, row, "
                "1 x 128 or 128 x 128"
            )
    if recipe.hadamard:
        return f"the {recipe.name} recipe's Hadamard transform has no kernel"
    blocks = [spec.block for spec in specs.values()]
    wanted: tuple[list[Any], ...] = ([TENSOR] * 3, [ROW] * 3, [_ROWS, _TILES, _ROWS])
    if blocks not in wanted:
        return f"no kernel multiplies blocks {blocks[0]} by {blocks[1]} and {blocks[2]}"
    return None


def _features_refusal(in_features: int, out_features: int) -> str | None:
    if in_features % _MULTIPLE or out_features % _MULTIPLE:
        return (
            f"features are {in_features} and {out_features}; the GEMMs need multiples of "
            f"{_MULTIPLE}"
        )
    return None
