"""What is quantised, and how finely."""

from dataclasses import dataclass
from typing import Literal

import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockScaling:
    """E4M3 in all three GEMMs: inputs and gradients 1 x block, weights block x block.

    A row's codes depend on that row alone, so a converted model stays causal and indifferent to
    what else is in the batch; one scale per tensor would not. Source: InfiR2 (arXiv 2509.22536).
    """

    block: int = 128
    """Elements along the summed axis that share one scale; both sides of a weight's tile."""
    scale_format: Literal["power_of_two", "fp32"] = "power_of_two"
    """Powers of two make quantisation exact to undo, and equal on every device."""
    gemm: Literal["float32", "bfloat16"] = "float32"
    """What the emulated GEMM computes in; either sums in fp32. bfloat16 rounds the result to
    bf16, as the hardware does, and pays only where the CPU multiplies bf16 natively."""

    def __post_init__(self) -> None:
        """Refuse settings that no code path has."""
        if self.block < 1:
            raise ValueError(f"block is {self.block}; wanted at least 1, usually 128")
        if self.scale_format not in ("power_of_two", "fp32"):
            raise ValueError(f"scale_format is {self.scale_format!r}; wanted power_of_two or fp32")
        if self.gemm not in ("float32", "bfloat16"):
            raise ValueError(f"gemm is {self.gemm!r}; wanted float32 or bfloat16")
        if self.gemm == "bfloat16" and self.scale_format == "fp32":
            raise ValueError(
                "gemm='bfloat16' needs scale_format='power_of_two': with fp32 scales the "
                "dequantised values are not exact in bf16"
            )


def fastest_gemm() -> Literal["float32", "bfloat16"]:
    """What the emulated GEMM runs fastest in on this CPU; the codes are the same either way."""
    capabilities: dict[str, object] = getattr(torch.cpu, "get_capabilities", dict)()
    native = capabilities.get("avx512_bf16") or capabilities.get("amx_bf16")
    return "bfloat16" if native else "float32"
