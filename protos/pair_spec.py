"""The spec of a preference fusion: like a round's, but each source only judges pairs of answers.

`cofuse fuse` reads it. It is no RoundSpec: no coordinator asks for judgements, no participant gives
them.
"""

from typing import Any, Literal

from pydantic import Field

from protos.spec import Name, PivotName, Strict, TrainingSpec


class PairTraining(Strict):
    """The training run; pairs are read whole, so there is no seq_len."""

    steps: int = Field(ge=1, le=1_000_000)
    batch_size: int = Field(default=8, ge=1, le=4096)
    """Pairs per step."""
    lr: float = Field(gt=0, le=1.0)
    """Peak learning rate of AdamW. InfiFPO: 1e-7, for models of billions of weights."""
    warmup_steps: int = Field(default=20, ge=0)
    decay_share: float = Field(default=0.3, ge=0, le=1)
    """Last part of the steps, in which the rate decays (WSD schedule)."""

    def schedule(self, seed: int) -> dict[str, Any]:
        """Return the fields of fp8.train.TrainConfig that it asks for."""
        return TrainingSpec(**self.model_dump()).schedule(seed)


class PairSpec(Strict):
    """One preference fusion. Source of the settings: InfiFPO (arXiv 2505.13878)."""

    name: Name
    pivot: PivotName
    participants: tuple[Name, ...] = Field(min_length=1, max_length=1000, strict=False)
    """The sources, by name."""
    kind: Literal["pairs"] = "pairs"
    """What each source gives: four numbers a pair."""
    method: Literal["preference"]
    pairs: str
    """Pairs of answers, JSON lines of {"prompt": ..., "chosen": ..., "rejected": ...}."""
    evals: str | None = None
    """Held-out documents and questions by domain, JSON."""
    held_out: float = Field(default=0.1, ge=0, le=0.5)
    """Share of the prompts whose pairs nobody learns from; they are measured."""
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
    judge: Literal["given", "experts"] = "given"
    """Who says which answer is the better one: the file, or the mean of the sources' margins."""
    precision: Literal["fp32", "fp8"] = "fp32"
    """Of the linear layers of the pivot while it is fused."""
    training: PairTraining
    controls: tuple[Literal["dpo"], ...] = Field(default=(), strict=False)
    """Runs on the same pairs, steps and seed: dpo hears no source."""
    seed: int = Field(default=0, ge=0, lt=2**31)
