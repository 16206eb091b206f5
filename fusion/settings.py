"""How to fuse, as data; the defaults are the recommended method."""

from dataclasses import dataclass
from typing import Literal

from fp8.train import TrainConfig


@dataclass(frozen=True, kw_only=True)
class FusionSettings:
    """How to fuse; the defaults are the recommended method."""

    train: TrainConfig
    batch_size: int
    """Windows per step."""
    seq_len: int
    """Tokens per window."""
    loss: Literal["span_kl", "infifusion", "none"] = "span_kl"
    """none: the control, plain training on the same text."""
    routing: Literal["posterior", "uniform"] = "posterior"
    distill_weight: float = 0.7
    """lambda, in [0, 1]: the experts' share; the text's own share is the rest (docs/log.md)."""
    decay: float = 0.9
    """Fading of the routing evidence per token, in (0, 1]."""
    temperature: float = 1.0
    """Flattening of the routing posterior."""
    alm_weight: float = 0.1
    """mu, at least 0."""
    kept: int = 24
    """Ids kept per position after mixing; the rest is OTHER."""

    def __post_init__(self) -> None:
        """Refuse numbers that cannot be meant."""
        if not (0 <= self.distill_weight <= 1 and self.alm_weight >= 0 and self.kept > 0):
            raise ValueError(
                f"distill_weight {self.distill_weight} must be in [0, 1], alm_weight "
                f"{self.alm_weight} at least 0 and kept {self.kept} at least 1"
            )
