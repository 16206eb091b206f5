"""Parts of a round spec that are specs themselves: how to train, and how to fuse preferences."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field


class Strict(BaseModel):
    """Unknown keys are errors, values do not change, nothing is coerced from strings."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class TrainingSpec(Strict):
    """One training run on the coordinator (fusion) or at a participant (a weights round)."""

    steps: int = Field(ge=1, le=1_000_000)
    batch_size: int = Field(default=8, ge=1, le=4096)
    """Sequences per step; of a pairs round, pairs."""
    seq_len: int = Field(default=128, ge=16, le=131_072)
    """Tokens per sequence; pairs are read whole."""
    lr: float = Field(gt=0, le=1.0)
    """Peak learning rate of AdamW. InfiFPO (pairs): 1e-7, for models of billions of weights."""
    warmup_steps: int = Field(default=20, ge=0)
    decay_share: float = Field(default=0.3, ge=0, le=1)
    """Last part of the steps, in which the rate decays (WSD schedule)."""
    proximal_mu: float = Field(default=0.0, ge=0)
    """FedProx: how hard a participant's copy is held to the pivot (merge rounds)."""

    def schedule(self, seed: int) -> dict[str, Any]:
        """Return the fields of fp8.train.TrainConfig that it asks for."""
        return {
            "steps": self.steps,
            "lr": self.lr,
            "warmup_steps": self.warmup_steps,
            "decay_steps": int(self.steps * self.decay_share),
            "seed": seed,
        }


class PreferenceSpec(Strict):
    """How a pivot learns which answers to prefer. Source: InfiFPO (arXiv 2505.13878)."""

    held_out: float = Field(default=0.1, ge=0, le=0.5)
    """Share of the prompts whose pairs nobody learns from; they are measured."""
    judge: Literal["given", "experts"] = "given"
    """Who says which answer is the better one: the file, or the mean of the sources' margins."""
    beta: float = Field(default=2.5, gt=0, le=1000)
    """How sharply a margin counts. InfiFPO: 2.5 with a length, 0.1 without."""
    offset: float = Field(default=0.0, ge=0, le=1000)
    """By how much the chosen must win. InfiFPO's scripts: 5 with a length."""
    fusion: Literal["mean", "max_margin"] = "max_margin"
    """The reference: the mean of the sources, or the one farthest from the pivot."""
    clip: bool = True
    """Set a source to the pivot where it is the weaker of the two."""
    length: Literal["pivot", "own", "none"] = "pivot"
    """What logs are divided by: the answer's tokens as the pivot cuts it, as each model cuts it
    itself, or nothing."""
