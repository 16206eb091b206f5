"""How to fuse, as data; the defaults are the recommended method."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from fp8.train import TrainConfig

LossName = Literal["span_kl", "infifusion", "infigfusion", "uld", "minced", "gold", "p_kl", "none"]
RoutingName = Literal["posterior", "document", "static", "uniform"]


@dataclass(frozen=True, kw_only=True)
class FusionSettings:
    """How to fuse; the defaults are the recommended method."""

    train: TrainConfig
    batch_size: int
    """Windows per step."""
    seq_len: int
    """Tokens per window."""
    apart: bool = False
    """Lay whole documents side by side in a window, each read on its own, as the experts read
    them: for prompt sets of short documents (docs/log.md). False: the stream is cut anywhere."""
    loss: LossName = "span_kl"
    """none: the control, plain training on the same text."""
    routing: RoutingName = "posterior"
    distill_weight: float = 0.7
    """lambda, in [0, 1]: the experts' share; the text's own share is the rest (docs/log.md)."""
    decay: float = 0.9
    """Fading of the routing evidence per token, in (0, 1]."""
    temperature: float = 1.0
    """Flattening of the routing posterior."""
    prior: tuple[float, ...] | None = None
    """Trust before any text is read: base pivot first, then sources by name. None: all alike."""
    gate_nats: float | None = None
    """Silence an expert that has read the text this much worse than the base; None: never."""
    max_weight: float = 1.0
    """The most that one source may have at a position, in (0, 1]."""
    max_share: float | None = None
    """The most that one source may have of the whole prompt set, in (0, 1]. None: where sources
    speak for themselves, one and a half even shares (fusion.routing.most_of_all)."""
    suspects: Literal["exclude", "report"] = "exclude"
    """What becomes of a source whose words the text contradicts (fusion.suspicion)."""
    standing: Mapping[str, float] = field(default_factory=dict)
    """By source: what its weights are multiplied with, in (0, 1], for what it did in earlier
    rounds; those that are not named have 1."""
    alm_weight: float = 0.1
    """mu, at least 0."""
    kept: int = 24
    """Ids kept per position after mixing; the rest is OTHER."""
    other: bool = True
    """Teach what the kept ids leave as one bucket; False renormalises them, which is biased."""
    fp8: bool = False
    """Train the pivot's linear layers in FP8 (BlockScaling)."""
    alm_temperature: float = 1.0
    """ALM compares likelihoods to the power 1 / this; the paper's is 100, its limit infinity."""

    def __post_init__(self) -> None:
        """Refuse numbers that cannot be meant."""
        rules = (
            (0 <= self.distill_weight <= 1, "distill_weight", "in [0, 1]"),
            (self.alm_weight >= 0, "alm_weight", "at least 0"),
            (self.kept > 0, "kept", "at least 1"),
            (0 < self.decay <= 1, "decay", "in (0, 1]"),
            (self.temperature > 0, "temperature", "above 0"),
            (self.alm_temperature > 0, "alm_temperature", "above 0"),
            (0 < self.max_weight <= 1, "max_weight", "in (0, 1]"),
            (self.max_share is None or 0 < self.max_share <= 1, "max_share", "in (0, 1]"),
            (all(0 < one <= 1 for one in self.standing.values()), "standing", "in (0, 1]"),
            (self.prior is None or min(self.prior) > 0, "prior", "above 0 for every candidate"),
        )
        for holds, name, wanted in rules:
            if not holds:
                raise ValueError(f"{name} is {getattr(self, name)}, wanted {wanted}")
