"""Every number of benchmarks/fusion_real.py that was chosen, and on what."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Final


@dataclass(frozen=True)
class ExpertSettings:
    """How to train one kind's expert."""

    lr: float
    scale: float
    """Of its adapters."""


EXPERTS: Final[Mapping[str, ExpertSettings]] = {
    "pharmacy": ExpertSettings(lr=1e-3, scale=2.0),
    "genetics": ExpertSettings(lr=2e-3, scale=1.0),
}


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Everything that has a size, fixed before any seed but 0 was run.

    A job done at other sizes, of those that it reads, is done again.
    """

    facts: int = 25
    """Per kind, and as many questions."""
    heldout_bytes: int = 8_000
    public_bytes: int = 24_000
    """Wikipedia paragraphs among the prompts: there the routing listens to the base."""
    heal_bytes: int = 100_000
    """Wikipedia paragraphs that the other tokenizer's embeddings are healed on."""
    expert_epochs: int = 10
    expert_documents: int = 8
    """Per step, each in a row of its own."""
    heal_steps: int = 40
    heal_tokens: int = 256
    fusion_steps: int = 240
    """Less, and the fused pivot names the options but not yet whose they are."""
    fusion_tokens: int = 160
    window: int = 160
    heal_lr: float = 1e-3
    lr: float = 1.5e-3
    rank: int = 16
    scale: float = 2.0
    top_k: int = 16
    distill_weight: float = 1.0
    """The prompts name every option: their own text is worth nothing where experts speak."""
    alm_weight: float = 0.1
    decay: float = 1.0
    """The documents are short: all of one speaks for its expert."""
    apart: bool = True
    """Whole documents side by side, each read on its own, as the experts and the questions are."""


_OF_FUSION: Final = (
    *("fusion_steps", "fusion_tokens", "window", "lr", "scale"),
    *("distill_weight", "alm_weight", "decay", "apart"),
)


def sizes_of(what: str, sizes: Sizes) -> dict[str, float]:
    """Return the sizes that a job reads, by name: what fuses is nothing to experts and bases."""
    fuses = what.startswith(("pivot", "sft"))
    return {name: x for name, x in asdict(sizes).items() if fuses or name not in _OF_FUSION}
