"""Sizes of the demo: small enough for two CPU cores and six minutes, real in every part."""

from dataclasses import dataclass, replace
from typing import Any, Final

from cofuse.demo.corpora import Limits


@dataclass(frozen=True, slots=True, kw_only=True)
class Hospital:
    """One participant of the demo and the shape of its expert."""

    name: str
    department: str
    model: dict[str, Any]
    """[model] of its participant.toml."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoSettings:
    """Everything that has a size."""

    hospitals: tuple[Hospital, ...]
    limits: Limits
    general_bytes: int
    """Public text of other specialties that the base pivot is pre-trained on."""
    expert_training: dict[str, Any]
    """[training] of every participant.toml."""
    pivot_model: dict[str, Any]
    pivot_training: dict[str, Any]
    round_steps: int | None = None
    """Replaces the steps of examples/*.yaml; None keeps them."""


def _model(
    architecture: str, hidden: int, layers: int, heads: int, vocabulary: int
) -> dict[str, Any]:
    return {
        "architecture": architecture,
        "hidden_size": hidden,
        "layers": layers,
        "heads": heads,
        "vocab_size": vocabulary,
        "context": 256,
    }


HOSPITALS: Final = (
    Hospital(name="st-mary", department="cardiology", model=_model("llama", 128, 4, 4, 1024)),
    Hospital(name="north", department="neurology", model=_model("qwen2", 128, 3, 4, 1280)),
    Hospital(name="lakeside", department="oncology", model=_model("gpt_neox", 128, 4, 4, 896)),
    Hospital(name="harbour", department="ophthalmology", model=_model("llama", 112, 4, 4, 1152)),
    Hospital(name="hillcrest", department="orthopaedics", model=_model("qwen2", 144, 3, 4, 1408)),
    Hospital(name="riverside", department="infectious", model=_model("gpt_neox", 96, 4, 4, 960)),
)
_LIMITS: Final = Limits(private=300_000, public=40_000, heldout=20_000, questions=60)


def _training(steps: int) -> dict[str, Any]:
    return {
        "steps": steps,
        "batch_size": 8,
        "seq_len": 128,
        "lr": 3e-3,
        "warmup_steps": 20,
        "decay_steps": steps // 3,
    }


DEMO: Final = DemoSettings(
    hospitals=HOSPITALS,
    limits=_LIMITS,
    general_bytes=400_000,
    expert_training=_training(300),
    pivot_model=_model("llama", 128, 4, 4, 1024),
    pivot_training=_training(250),
)

QUICK: Final = replace(
    DEMO,
    limits=replace(_LIMITS, questions=30),
    expert_training=_training(180),
    pivot_training=_training(150),
    round_steps=160,
)
"""For `--quick`: the same text and models, less training, one round."""

TINY: Final = DemoSettings(
    hospitals=HOSPITALS,
    limits=Limits(private=12_000, public=4_000, heldout=2_000, questions=4),
    general_bytes=8_000,
    expert_training={
        "steps": 12,
        "batch_size": 4,
        "seq_len": 64,
        "lr": 4e-3,
        "warmup_steps": 2,
        "decay_steps": 4,
        "checkpoint_every": 5,
    },
    pivot_model=_model("llama", 64, 2, 2, 400),
    pivot_training={
        "steps": 8,
        "batch_size": 4,
        "seq_len": 64,
        "lr": 4e-3,
        "warmup_steps": 2,
        "decay_steps": 2,
    },
    round_steps=8,
)
"""For tests: the same processes and files, no knowledge to speak of."""
