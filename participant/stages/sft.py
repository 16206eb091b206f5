"""Supervised fine-tuning: the expert learns to answer, from conversations, in FP8."""

import hashlib
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel

from fp8.batches import count_tokens
from fp8.train import Progress, TrainConfig, TrainResult, causal_lm_loss, train
from fusion.models import context_length
from participant.config import SftStage, StageConfig
from participant.stages import adapters
from participant.stages.conversations import (
    Chat,
    ChatError,
    Example,
    Skipped,
    UnusableError,
    read_conversations,
)
from participant.stages.packing import fill, packed_examples

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Examples:
    """What a file of conversations holds for one model."""

    trained: list[Example]
    held_out: list[Example]
    """Never trained on; what the stage is measured by."""
    skipped: Skipped
    """Conversations that could not be used, and answers that were too long."""


def read_examples(chat: Chat, stage: SftStage) -> Examples:
    """Read and encode the stage's conversations; what is skipped is counted by reason.

    Raises: ChatError when nothing is left to train on.
    """
    skipped, trained, held_out = Skipped(), list[Example](), list[Example]()
    for number, messages in read_conversations(stage.data, skipped):
        try:
            found, cut = chat.examples(messages, stage.seq_len + 1)
        except UnusableError as error:
            skipped.add(error.reason, number)
            continue
        for _ in range(cut):
            skipped.add("too long", number)
        kept_back = is_held_out(json.dumps(messages, sort_keys=True), stage.held_out)
        (held_out if kept_back else trained).extend(found)
    if not trained:
        raise ChatError(
            f"{stage.data}: found no conversation to train on, wanted at least one (skipped: "
            f"{str(skipped) or 'none'}); add conversations, raise seq_len or lower held_out"
        )
    return Examples(trained=trained, held_out=held_out, skipped=skipped)


def is_held_out(text: str, share: float) -> bool:
    """Whether a text is kept for measuring: by its own digest, so that its place means nothing."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8]) < share * 2**64


def finetune(
    model: PreTrainedModel,
    chat: Chat,
    stage: SftStage,
    *,
    checkpoint_dir: Path | None = None,
    on_progress: Callable[[Progress], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> TrainResult:
    """Train the model in place on the stage's conversations, from the checkpoint if there is one.

    The model runs in the precision it comes in. Its generation settings learn where answers end.
    Raises: ChatError; CheckpointError and TrainingDivergedError as `fp8.train.train`.
    """
    if stage.seq_len > context_length(model):
        raise ChatError(
            f"found seq_len {stage.seq_len}, wanted at most {context_length(model)}, which is all "
            "that the model can see; lower seq_len of the stage"
        )
    examples = read_examples(chat, stage)
    if examples.skipped.counts:
        _LOG.warning("%s: skipped %s", stage.data.name, examples.skipped)
    rows = packed_examples(
        examples.trained,
        batch_size=stage.batch_size,
        seq_len=stage.seq_len,
        seed=stage.seed,
        pad_id=chat.end_id,
    )
    tell_ends(model, chat)
    if stage.adapter_rank:
        adapters.attach(model, stage.adapter_rank, scale=stage.adapter_scale, seed=stage.seed)
    result = train(
        model,
        rows,
        causal_lm_loss,
        schedule_of(stage),
        checkpoint_dir=checkpoint_dir,
        on_progress=on_progress,
        should_stop=should_stop,
    )
    adapters.fold(model)
    return result


def answer_loss(model: PreTrainedModel, examples: Sequence[Example], pad_id: int) -> float:
    """Mean loss of the answers' tokens in nats; NaN when there is no example."""
    if not examples:
        return float("nan")
    room = max(len(example.ids) for example in examples)
    rows = packed_examples(examples, batch_size=1, seq_len=room - 1, seed=0, pad_id=pad_id)
    total, tokens, was_training = 0.0, 0, model.training
    model.eval()
    with torch.no_grad():
        for step in range(len(fill([len(example.ids) for example in examples], room))):
            batch = rows(step)
            here = count_tokens(batch)
            total, tokens = total + here * float(causal_lm_loss(model, batch)), tokens + here
    model.train(was_training)
    return total / tokens


def tell_ends(model: PreTrainedModel, chat: Chat) -> None:
    """Write into the model's generation settings at which tokens an answer ends."""
    assert model.generation_config is not None
    ends = chat.end_ids
    model.generation_config.eos_token_id = ends if len(ends) > 1 else ends[0]


def schedule_of(stage: StageConfig, *, accumulate: int = 1) -> TrainConfig:
    """How the stage trains."""
    return TrainConfig(
        steps=stage.steps,
        lr=stage.lr,
        warmup_steps=stage.warmup_steps,
        decay_steps=stage.decay_steps,
        weight_decay=stage.weight_decay,
        seed=stage.seed,
        checkpoint_every=stage.checkpoint_every,
        keep_stable=False,
        accumulate=accumulate,
    )


def measure(model: PreTrainedModel, chat: Chat, stage: SftStage) -> dict[str, float]:
    """The stage's figures: answer_loss of its held-out conversations, lines and answers skipped."""
    found = read_examples(chat, stage)
    figures = {"skipped": float(found.skipped.counts.total())}
    if found.held_out:
        figures["answer_loss"] = answer_loss(model, found.held_out, chat.end_id)
    return figures
