"""How long, how fast and with which optimizer to train: settings, and what follows from them."""

import math
from dataclasses import dataclass
from typing import Final, Literal

OptimizerName = Literal["adamw", "float8_adamw"]
OPTIMIZERS: Final = ("adamw", "float8_adamw")


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
    """How to train: schedule, AdamW, and how often to write a checkpoint."""

    steps: int
    """Optimizer steps in all, counted from step 0 and across resumes."""
    lr: float
    """Peak learning rate."""
    warmup_steps: int
    """Steps of linear warm-up, from lr / warmup_steps up to lr."""
    decay_steps: int
    """The last steps, in which a cosine leads from lr down to lr * min_lr_ratio."""
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.1
    """Decoupled, on matrices only: norms and biases are left alone."""
    grad_clip: float = 1.0
    """Bound on the L2 norm of the whole gradient; math.inf switches it off."""
    seed: int = 0
    """Seeds dropout, together with the step. Batches have their own seed."""
    checkpoint_every: int = 50
    """Steps between two checkpoints; the end of a run always writes one."""
    min_lr_ratio: float = 0.1
    optimizer: OptimizerName = "adamw"
    """"adamw": moments as wide as the weights. "float8_adamw": both in eight bits."""
    accumulate: int = 1
    """Pieces a step's batch is cut into, one after the other: less memory, the same gradient."""
    keep_stable: bool = True
    """Keep a checkpoint `stable-N` of the moment the decay begins, to decay from it once more."""

    def __post_init__(self) -> None:
        """Refuse numbers that cannot be meant."""
        rules = {
            "steps": self.steps >= 0,
            "lr": math.isfinite(self.lr) and self.lr > 0,
            "warmup_steps": self.warmup_steps >= 0,
            "decay_steps": self.decay_steps >= 0,
            "betas": all(0 <= beta < 1 for beta in self.betas),
            "weight_decay": self.weight_decay >= 0,
            "grad_clip": self.grad_clip > 0,
            "seed": 0 <= self.seed < 2**31,
            "checkpoint_every": self.checkpoint_every >= 1,
            "min_lr_ratio": 0 <= self.min_lr_ratio <= 1,
            "optimizer": self.optimizer in OPTIMIZERS,
            "accumulate": self.accumulate >= 1,
        }
        for name, holds in rules.items():
            if not holds:
                raise ValueError(f"TrainConfig.{name} is {getattr(self, name)!r}: out of range")


def learning_rate(step: int, config: TrainConfig) -> float:
    """Warm-up, stable, decay (WSD): the learning rate of a step, a pure function of both.

    Linear from lr / warmup_steps to lr; lr; a cosine over the last decay_steps, which ends at
    lr * min_lr_ratio on the last step. Source: InfiR2 (arXiv 2509.22536), its CPT schedule.
    """
    warm = min(1.0, (step + 1) / max(1, config.warmup_steps))
    decayed = (step + 1 - decay_begins(config)) / max(1, config.decay_steps)
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, max(0.0, decayed))))
    return config.lr * warm * (config.min_lr_ratio + (1 - config.min_lr_ratio) * cosine)


def decay_begins(config: TrainConfig) -> int:
    """Return the first step whose learning rate the decay lowers; `steps` when nothing decays."""
    return config.steps - config.decay_steps
