"""What a release tells: a small model that learns from the very file, and what it finds likely.

Shapes: P = positions of the release, K = kept ids, B = windows of a batch, T = tokens of a window.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from fp8.train import TrainConfig, packed_batches, train
from fusion.codec import LogitFile
from fusion.contribution import LogitContribution, join
from fusion.delta_file import read_delta
from fusion.fused import selected_logprobs
from fusion.losses import span_kl
from fusion.models import (
    ModelSpec,
    build_model,
    encode_text,
    eos_id,
    load_model,
    load_parameter_arrays,
    parameter_arrays,
)
from fusion.scoring import score_streams
from participant.canaries import open_canaries
from participant.canary_gate import RECALL, RELEASE
from participant.canary_stats import Exposure, exposure
from participant.stages.cpt import open_expert

_SHARD: Final = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class StudentSettings:
    """How much is spent on the attack. More steps tell more, up to a point."""

    hidden_size: int = 64
    layers: int = 2
    steps: int = 200
    batch_size: int = 8
    seq_len: int = 128
    lr: float = 3e-3
    own_weight: float = 0.1
    """Of the text's own tokens in the loss, beside what the release says of them."""
    most_positions: int = 200_000
    """Read of the release, from its beginning."""


def distil(release: Path, texts: Sequence[str], settings: StudentSettings) -> PreTrainedModel:
    """Train a fresh student on a release of log-probabilities, as its reader could.

    Args: texts: the prompt set, which its reader has as well.
    Raises: fusion.contribution.ContributionError.
    """
    said = _read(LogitFile(release, texts), settings.most_positions)
    stream = np.concatenate([[said.header.eos_id], said.token_ids]).astype(np.int64)
    seq_len = min(settings.seq_len, len(stream) - 1)
    shape = ModelSpec(
        architecture="llama",
        hidden_size=settings.hidden_size,
        layers=settings.layers,
        heads=4,
        vocab_size=said.header.vocab_size,
        context=max(settings.seq_len, 256),
    )
    student = build_model(shape, 0)
    rows_at = packed_batches(
        np.arange(len(stream)), batch_size=settings.batch_size, seq_len=seq_len, seed=0
    )
    schedule = TrainConfig(
        steps=settings.steps,
        lr=settings.lr,
        warmup_steps=max(1, settings.steps // 20),
        decay_steps=settings.steps // 3,
        seed=0,
    )
    tokens_P = torch.from_numpy(stream)
    train(student, rows_at, _loss(tokens_P, said, settings.own_weight), schedule)
    return student.eval()


def _read(file: LogitFile, most: int) -> LogitContribution:
    parts, rows = [], 0
    for start in range(0, file.header.documents, _SHARD):
        parts.append(file.documents(start, min(start + _SHARD, file.header.documents)))
        rows += parts[-1].header.positions
        if rows >= most:
            break
    return join(parts)


def _loss(
    tokens_P: Tensor, said: LogitContribution, own_weight: float
) -> Callable[[nn.Module, Tensor], Tensor]:
    """Return the KL on the partition {ids} + the rest, and some of the text itself."""
    ids_PK = torch.from_numpy(said.topk_ids.astype(np.int64))
    probs_PK = torch.from_numpy(np.exp(said.topk_logprobs)) * (ids_PK >= 0)
    shipped_P = torch.from_numpy(said.shipped)

    def loss(model: nn.Module, rows_BT: Tensor) -> Tensor:
        at_N = rows_BT[:, :-1].flatten()  # row p reads token p and predicts token p + 1
        logits_NV = model(input_ids=tokens_P[rows_BT[:, :-1]], use_cache=False).logits.flatten(0, 1)
        own_N, log_s_NK, log_other_N = selected_logprobs(
            logits_NV, tokens_P[at_N + 1], ids_PK[at_N]
        )
        told_N = span_kl(log_s_NK, log_other_N, probs_PK[at_N]) * shipped_P[at_N]
        return (1 - own_weight) * told_N.mean() - own_weight * own_N.mean()

    return loss


def log_likelihoods(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, texts: Sequence[str]
) -> NDArray[np.float64]:
    """Return how likely the model finds each text as a document, in nats."""
    eos = eos_id(tokenizer)
    streams = [[eos, *encode_text(tokenizer, text), eos] for text in texts]
    nats: list[list[float]] = [[] for _ in streams]
    for index, _, logprobs, labels in score_streams(model, streams):
        nats[index] += logprobs.gather(-1, labels[:, None]).flatten().double().tolist()
    return np.asarray([math.fsum(one) for one in nats])


def with_delta(pivot: Path, delta: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """Return the model that a weights release makes of its pivot, tensor for tensor."""
    model, tokenizer = load_model(pivot)
    _, changes = read_delta(delta)
    before = parameter_arrays(model)
    load_parameter_arrays(model, {name: before[name] + change for name, change in changes.items()})
    return model.eval(), tokenizer


def measure(asked: Mapping[str, Any]) -> dict[str, Exposure]:
    """Score the records in every way that a release opens; see participant.canary_gate.Question."""
    records = open_canaries(Path(asked["canaries"]))
    if records is None:
        raise ValueError(f"{asked['canaries']}: there are no canaries")
    texts, cut = [*records.planted, *records.held_out], len(records.planted)

    def compare(scores: NDArray[np.float64]) -> Exposure:
        return exposure(scores[:cut], scores[cut:])

    release, model = Path(asked["release"]), Path(asked["model"])
    if asked["kind"] == "weights":
        trained, tokenizer = with_delta(model, release)
        before = log_likelihoods(load_model(model)[0].eval(), tokenizer, texts)
        # What the pivot finds likely by itself is no news of the training.
        return {RELEASE: compare(log_likelihoods(trained, tokenizer, texts) - before)}
    expert, tokenizer = open_expert(model)
    if asked["kind"] == "pairs":  # whole answers: what they tell, the expert's own answer tells
        return {RECALL: compare(log_likelihoods(expert, tokenizer, texts))}
    student = distil(release, asked["texts"], StudentSettings())
    return {
        RELEASE: compare(log_likelihoods(student, tokenizer, texts)),
        RECALL: compare(log_likelihoods(expert, tokenizer, texts)),
    }


def main() -> int:
    """Read a question from stdin, print what was measured as JSON."""
    torch.set_num_threads(1)
    found = measure(json.load(sys.stdin))
    json.dump({way: asdict(one) for way, one in found.items()}, sys.stdout)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
