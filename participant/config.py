"""participant.toml: who we are, where the text lies, how the expert is trained."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, StringConstraints

from participant.schedule import ScheduleConfig
from protos.config import Address, StrictConfig, TlsConfig, read_toml

Name = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9-]{0,39}$")]


class ModelConfig(StrictConfig):
    """[model]: the expert's own architecture. No one else needs to share it."""

    architecture: Literal["llama", "qwen2", "gpt_neox"]
    hidden_size: int = Field(ge=32, le=16_384)
    layers: int = Field(ge=1, le=200)
    heads: int = Field(ge=1, le=256)
    vocab_size: int = Field(ge=300, le=500_000)
    context: int = Field(default=256, ge=16, le=131_072)


class TrainingConfig(StrictConfig):
    """[training]: continual pre-training in FP8. Raise `steps` and the expert goes on."""

    steps: int = Field(ge=1)
    batch_size: int = Field(default=8, ge=1)
    """Sequences per step."""
    seq_len: int = Field(default=128, ge=16)
    """Tokens per sequence."""
    lr: float = Field(default=3e-3, gt=0)
    warmup_steps: int = Field(default=20, ge=0)
    decay_steps: int = Field(default=0, ge=0)
    """Last steps, in which the learning rate decays."""
    seed: int = Field(default=0, ge=0)
    checkpoint_every: int = Field(default=100, ge=1)


class ParticipantConfig(StrictConfig):
    """Everything in participant.toml. Relative paths start at its folder."""

    name: Name
    coordinator: Address
    """host:port of the coordinator; we dial out, nothing dials in."""
    corpus: Path
    """JSON lines of {"text": ...}. It is read, and never sent."""
    data_dir: Path
    """Expert, checkpoints, outbox and egress log."""
    policy: Path
    threads: int = Field(default=1, ge=1)
    """CPU threads of the trainer."""
    older_pivots: bool = False
    """Whether a round may start from an older pivot of a lineage than one that was taken before."""
    walls: Literal["offered", "required"] = "offered"
    """required: do not start where the kernel refuses to wall off a process (cofuse doctor)."""
    min_free_mb: int = Field(default=256, ge=0)
    """Free disk space, in MB, below which no new work is begun: logs and spool need the rest."""
    model: ModelConfig
    training: TrainingConfig
    schedule: ScheduleConfig = ScheduleConfig()
    tls: TlsConfig


def load_config(path: Path) -> ParticipantConfig:
    """Read participant.toml.

    Raises: protos.config.ConfigError with file, key and cure.
    """
    config = read_toml(path, ParticipantConfig)
    here = path.resolve().parent
    moved: dict[str, Any] = {k: here / getattr(config, k) for k in ("corpus", "data_dir", "policy")}
    return config.model_copy(update={**moved, "tls": config.tls.below(here)})
