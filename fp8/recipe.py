"""What is quantised, and how finely: recipes are data, and every backend reads the same.

A GEMM reads its operands as [rows, contracted]; a block is (rows, columns) of that.
"""

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final, Literal

from fp8.formats import E2M1, E4M3, E5M2, E8M0, FloatFormat

Block = tuple[int | None, int | None]
"""Rows and columns that share one scale; None is the whole axis."""
ScaleFormat = Literal["power_of_two", "fp32"]
GemmResult = Literal["bfloat16", "float32"]
BackendName = Literal["auto", "emulated", "scaled_mm", "transformer_engine"]

TENSOR: Final[Block] = (None, None)
ROW: Final[Block] = (1, None)


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantSpec:
    """How one operand of a GEMM is quantised."""

    format: FloatFormat = E4M3
    block: Block = (1, 128)
    scale_format: Literal["power_of_two", "fp32", "e4m3"] = "power_of_two"
    """Held in fp32. Powers of two make quantisation exact to undo, and equal on every device.
    e4m3 scales (NVFP4) stand on a power of two of their own, one per `outer` block."""
    outer: Block = ROW
    stochastic: bool = False
    """Round up or down at random, so that the mean is the value. Draws from torch's generator."""

    def __post_init__(self) -> None:
        """Refuse settings that no code path has."""
        if any(size is not None and size < 1 for size in self.block):
            raise ValueError(f"block is {self.block}; wanted sizes of at least 1, usually 128")
        if self.scale_format not in ("power_of_two", "fp32", "e4m3"):
            raise ValueError(
                f"scale_format is {self.scale_format!r}; wanted power_of_two, fp32 or e4m3"
            )
        if self.format is E8M0:
            raise ValueError("format is E8M0, which has no sign: wanted E4M3, E5M2 or E2M1")
        if self.outer not in (ROW, TENSOR):
            raise ValueError(f"outer is {self.outer}; wanted a row (1, None) or all (None, None)")
        if self.scale_format == "e4m3" and self.block[0] != 1 and self.outer != TENSOR:
            raise ValueError("tiles with e4m3 scales need outer=(None, None): a tile has many rows")

    def __str__(self) -> str:
        """Say it in one line, as `E4M3 1x128 power_of_two`."""
        scales: str = self.scale_format
        if scales == "e4m3":
            scales += f" over {_size(self.outer)}"
        rounding = " stochastic" if self.stochastic else ""
        return f"{self.format.name} {_size(self.block)} {scales}{rounding}"

    @property
    def row_independent(self) -> bool:
        """Whether a row's codes depend on that row alone."""
        one_row = self.block[0] == 1
        return one_row and (self.scale_format != "e4m3" or self.outer[0] == 1)

    @property
    def exact_in_bfloat16(self) -> bool:
        """Whether code * scale always fits bf16's eight bits of mantissa."""
        return self.scale_format != "fp32"


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """How the three GEMMs of a linear layer read their operands. Made by the functions below."""

    name: str
    input: QuantSpec
    weight: QuantSpec
    grad_output: QuantSpec
    history: int = 0
    """Steps whose largest value sets the scale of inputs and gradients; 0: the tensor's own."""
    hadamard: bool = False
    """Spread outliers over 16 tokens by a random Hadamard transform in the weight's gradient."""
    keep_last: float = 0.0
    """Share of a model's blocks, the last ones, that conversion leaves in high precision."""
    gemm: GemmResult = "bfloat16"
    """What each GEMM's fp32 sum is rounded to; bfloat16 is what hardware gives."""
    backend: BackendName = "auto"
    """auto: the fastest that can; a name: that one, or an error that says why not."""

    def __post_init__(self) -> None:
        """Refuse settings that no code path has."""
        choices = {"gemm": GemmResult, "backend": BackendName}
        for field, choice in choices.items():
            if getattr(self, field) not in choice.__args__:  # type: ignore[attr-defined]
                found, wanted = getattr(self, field), ", ".join(choice.__args__)  # type: ignore[attr-defined]
                raise ValueError(f"{field} is {found!r}; wanted one of {wanted}")
        if self.history < 0 or not 0 <= self.keep_last < 1:
            raise ValueError(
                f"history is {self.history}, keep_last {self.keep_last}; wanted at least 0, and "
                "a share below 1"
            )
        if self.history and "e4m3" in (self.input.scale_format, self.grad_output.scale_format):
            raise ValueError("history needs one scale a block; e4m3 scales have two: wanted 0")

    def __str__(self) -> str:
        """Say in one line what a resumed run must share; who computes it does not count."""
        return (
            f"{self.name}: input {self.input}, weight {self.weight}, gradient "
            f"{self.grad_output}, history {self.history}, hadamard {self.hadamard}, "
            f"gemm {self.gemm}"
        )

    @property
    def row_independent(self) -> bool:
        """Whether a converted model stays causal and indifferent to what else is in the batch."""
        return self.input.row_independent and not self.history

    @property
    def exact_in_bfloat16(self) -> bool:
        """Whether a bf16 GEMM multiplies exactly what FP8 hardware multiplies."""
        return all(s.exact_in_bfloat16 for s in (self.input, self.weight, self.grad_output))

    @property
    def saves_rows(self) -> bool:
        """Whether the one copy of the input kept for backward is the row-wise one.

        One scale per tensor serves both directions; codes of 8 bits with power-of-two scales can
        be quantised again along the other axis at almost no loss (docs/fp8.md).
        """
        own = self.input
        if self.hadamard or own.format is E2M1 or own.scale_format == "e4m3":
            return False
        return own.block == TENSOR or (
            own.scale_format == "power_of_two" and own.block[1] is not None
        )


def _size(block: Block) -> str:
    return "x".join("all" if size is None else str(size) for size in block)


def BlockScaling(
    *,
    block: int = 128,
    scale_format: ScaleFormat = "power_of_two",
    gemm: GemmResult = "bfloat16",
    backend: BackendName = "auto",
) -> Recipe:
    """E4M3 in all three GEMMs: inputs and gradients 1 x block, weights block x block.

    A row's codes depend on that row alone, so a converted model stays causal and indifferent to
    what else is in the batch. Source: InfiR2 (arXiv 2509.22536), DeepSeek-V3 (arXiv 2412.19437).
    """
    rows = QuantSpec(block=(1, block), scale_format=scale_format)
    tiles = QuantSpec(block=(block, block), scale_format=scale_format)
    return Recipe(
        name="block", input=rows, weight=tiles, grad_output=rows, gemm=gemm, backend=backend
    )


def RowwiseScaling(
    *,
    scale_format: ScaleFormat = "fp32",
    gemm: GemmResult = "bfloat16",
    backend: BackendName = "auto",
) -> Recipe:
    """E4M3 in all three GEMMs, one scale per row of each operand. Source: torchao's row-wise."""
    rows = QuantSpec(block=ROW, scale_format=scale_format)
    return Recipe(
        name="rowwise", input=rows, weight=rows, grad_output=rows, gemm=gemm, backend=backend
    )


def CurrentScaling(
    *,
    scale_format: ScaleFormat = "fp32",
    gemm: GemmResult = "bfloat16",
    backend: BackendName = "auto",
) -> Recipe:
    """One scale per tensor, from its own largest value; E4M3 forward, E5M2 for gradients.

    Neither causal nor indifferent to the batch: never for logits that are shipped. Source:
    FP8 Formats for Deep Learning (arXiv 2209.05433).
    """
    forward = QuantSpec(block=TENSOR, scale_format=scale_format)
    backward = QuantSpec(format=E5M2, block=TENSOR, scale_format=scale_format)
    return Recipe(
        name="current",
        input=forward,
        weight=forward,
        grad_output=backward,
        gemm=gemm,
        backend=backend,
    )


def DelayedScaling(
    *,
    history: int = 1024,
    scale_format: ScaleFormat = "fp32",
    gemm: GemmResult = "bfloat16",
    backend: BackendName = "auto",
) -> Recipe:
    """As CurrentScaling, but inputs and gradients by the largest value of the last steps.

    Saves a pass over the tensor and pays by clipping values that the past did not see. Weights
    take their own largest value: they are quantised once a step. Source: Transformer Engine.
    """
    if history < 1:
        raise ValueError(f"history is {history}; wanted at least 1 step, usually 1024")
    forward = QuantSpec(block=TENSOR, scale_format=scale_format)
    backward = QuantSpec(format=E5M2, block=TENSOR, scale_format=scale_format)
    return Recipe(
        name="delayed",
        input=forward,
        weight=forward,
        grad_output=backward,
        history=history,
        gemm=gemm,
        backend=backend,
    )


def MXFP8(*, gemm: GemmResult = "bfloat16", backend: BackendName = "auto") -> Recipe:
    """E4M3 with one power of two (E8M0) per 32 elements, of weights too.

    The scale is rounded up, so that nothing saturates. Source: OCP Microscaling Formats 1.0;
    Recipes for Pre-training LLMs with MXFP8 (arXiv 2506.08027).
    """
    rows = QuantSpec(block=(1, 32))
    return Recipe(
        name="mxfp8", input=rows, weight=rows, grad_output=rows, gemm=gemm, backend=backend
    )


def NVFP4(
    *,
    hadamard: bool = True,
    stochastic_rounding: bool = True,
    keep_last: float = 0.15,
    outer: Literal["row", "tensor"] = "row",
    gemm: GemmResult = "bfloat16",
    backend: BackendName = "auto",
) -> Recipe:
    """E2M1, one E4M3 scale per 16 elements (weights: 16 x 16). Exploration: it costs quality.

    The second-level scale is a power of two, per row so that the forward stays causal; NVIDIA's
    is per tensor (`outer="tensor"`). Source: Pretraining LLMs with NVFP4 (arXiv 2509.25149).
    """
    second: Block = ROW if outer == "row" else TENSOR
    rows = QuantSpec(format=E2M1, block=(1, 16), scale_format="e4m3", outer=second)
    tiles = QuantSpec(format=E2M1, block=(16, 16), scale_format="e4m3", outer=TENSOR)
    gradient = QuantSpec(
        format=E2M1,
        block=(1, 16),
        scale_format="e4m3",
        outer=second,
        stochastic=stochastic_rounding,
    )
    return Recipe(
        name="nvfp4",
        input=rows,
        weight=tiles,
        grad_output=gradient,
        hadamard=hadamard,
        keep_last=keep_last,
        gemm=gemm,
        backend=backend,
    )


RECIPES: Final[Mapping[str, Callable[..., Recipe]]] = MappingProxyType(
    {
        "block": BlockScaling,
        "rowwise": RowwiseScaling,
        "current": CurrentScaling,
        "delayed": DelayedScaling,
        "mxfp8": MXFP8,
        "nvfp4": NVFP4,
    }
)


def recipe_named(name: str) -> Recipe:
    """Return the recipe of that name with its defaults.

    Raises: ValueError with the nearest name for one that is not in RECIPES.
    """
    if name not in RECIPES:
        close = difflib.get_close_matches(name, RECIPES, n=1)
        hint = f"; did you mean {close[0]}?" if close else "."
        raise ValueError(f"recipe {name!r} is not known{hint} There are {', '.join(RECIPES)}")
    return RECIPES[name]()
