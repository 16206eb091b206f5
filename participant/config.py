"""participant.toml: who we are, where the text lies, how the expert is trained."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Discriminator, Field, StringConstraints, Tag, model_validator

from participant import canaries
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


class StartConfig(StrictConfig):
    """[model] folder = "...": the expert begins as a model that is there already."""

    folder: Path
    """An ordinary model folder: config.json, safetensors, tokenizer.json. It is only read."""


Precision = Literal["fp32", "fp8", "nvfp4"]
"""Of the linear layers' three GEMMs. nvfp4 is for exploration: it is emulated everywhere."""


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
    precision: Precision = "fp8"


class StageConfig(StrictConfig):
    """What every [[stage]] after pre-training has. Another setting begins the stage anew."""

    data: Path
    """JSON lines. They are read, and never sent."""
    steps: int = Field(ge=1)
    lr: float = Field(gt=0)
    warmup_steps: int = Field(default=0, ge=0)
    decay_steps: int = Field(default=0, ge=0)
    """Last steps, in which the learning rate decays."""
    weight_decay: float = Field(default=0.0, ge=0)
    seed: int = Field(default=0, ge=0)
    checkpoint_every: int = Field(default=50, ge=1)
    held_out: float = Field(default=0.05, ge=0, lt=1)
    """Share of the lines that measures every stage and trains none."""
    template: Path | None = None
    """Chat template (Jinja) to use instead of the tokenizer's own."""
    precision: Precision = "fp8"

    def below(self, folder: Path) -> Self:
        """The same stage, relative paths taken from `folder`."""
        template = self.template and folder / self.template
        return self.model_copy(update={"data": folder / self.data, "template": template})


class SftStage(StageConfig):
    """kind = "sft": fine-tuning on lines of {"messages": [{"role": ..., "content": ...}, ...]}."""

    kind: Literal["sft"]
    batch_size: int = Field(default=8, ge=1)
    """Rows per step; conversations are packed into them."""
    seq_len: int = Field(default=256, ge=16)
    """Tokens per row. An answer that ends later is left out, and counted."""
    adapter_rank: int = Field(default=0, ge=0, le=1024)
    """LoRA: train two matrices of this rank beside each linear layer; 0: all parameters."""
    adapter_scale: float = Field(default=2.0, gt=0)
    """Weight of what the adapters say (LoRA's alpha over its rank)."""


class RlStage(StageConfig):
    """kind = "rl": GRPO on lines of {"messages": [...], "answer": "..."} that can be checked."""

    kind: Literal["rl"]
    rewards: dict[str, float] = Field(min_length=1)
    """Weight of each reward; the names are those of `participant.stages.rewards.REWARDS`."""
    prompts: int = Field(default=8, ge=1)
    """Tasks of one rollout."""
    samples: int = Field(default=8, ge=2)
    """Answers drawn to each: a group."""
    max_new_tokens: int = Field(default=64, ge=1)
    """Of an answer; one that is not at its end by then is cut, and counted."""
    cut: Literal["skip", "wrong"] = "skip"
    """What a cut answer is worth: nobody can tell, or nothing. "wrong" teaches to be short."""
    temperature: float = Field(default=1.0, gt=0)
    updates: int = Field(default=1, ge=1)
    """Steps that learn from one rollout, each from its part."""
    redraws: int = Field(default=2, ge=0)
    """How often other tasks are drawn for groups that are all alike."""
    clip_low: float = Field(default=0.2, gt=0, lt=1)
    clip_high: float = Field(default=0.28, gt=0)
    """DAPO's range of the ratio of probabilities: 1 - clip_low to 1 + clip_high."""
    max_weight: float = Field(default=2.0, ge=1)
    """Bound on the weight of a token, its probability in the trainer over that at the rollout."""
    kl: float = Field(default=0.0, ge=0)
    """Weight of the distance to the model the stage began with."""
    accumulate: int = Field(default=1, ge=1)
    """Pieces a step is cut into: less memory, the same gradient."""


def _model_kind(given: Any) -> str:
    told = given if isinstance(given, Mapping) else getattr(given, "__dict__", {})
    return "start" if "folder" in told else "new"


Model = Annotated[
    Annotated[ModelConfig, Tag("new")] | Annotated[StartConfig, Tag("start")],
    Discriminator(_model_kind),
]
Stage = Annotated[SftStage | RlStage, Field(discriminator="kind")]


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
    canaries: bool = False
    """Whether invented records are planted in the training text, for the gate of policy.toml."""
    model: Model
    training: TrainingConfig
    """Or a first [[stage]] of kind = "cpt" with the same keys."""
    stage: tuple[Stage, ...] = ()
    """[[stage]]: what the expert goes through once it is pre-trained, in this order."""
    schedule: ScheduleConfig = ScheduleConfig()
    tls: TlsConfig

    @model_validator(mode="before")
    @classmethod
    def _first_stage_trains(cls, given: Any) -> Any:
        stages = given.get("stage") if isinstance(given, Mapping) else None
        if not isinstance(stages, list | tuple) or not stages:
            return given
        first = stages[0]
        if not isinstance(first, Mapping) or first.get("kind") != "cpt":
            return given
        if "training" in given:
            raise ValueError('found [training] and a stage of kind = "cpt", wanted one: drop one')
        training = {key: value for key, value in first.items() if key != "kind"}
        return {**given, "training": training, "stage": stages[1:]}

    @property
    def canary_file(self) -> Path | None:
        """Where the planted records are kept; None: none are planted."""
        return self.data_dir / canaries.FILE if self.canaries else None


def load_config(path: Path) -> ParticipantConfig:
    """Read participant.toml.

    Raises: protos.config.ConfigError with file, key and cure.
    """
    config = read_toml(path, ParticipantConfig)
    here = path.resolve().parent
    moved: dict[str, Any] = {k: here / getattr(config, k) for k in ("corpus", "data_dir", "policy")}
    stages = tuple(stage.below(here) for stage in config.stage)
    if isinstance(config.model, StartConfig):
        moved["model"] = StartConfig(folder=here / config.model.folder)
    return config.model_copy(update={**moved, "tls": config.tls.below(here), "stage": stages})
