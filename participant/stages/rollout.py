"""Answers drawn from the model in training, and their log-probabilities as the trainer sees them.

Both run the same layers in the same precision. 1 x 128 scaling quantises each token alone, so what
stands beside a token, how a batch is padded and whether keys were kept changes nothing but the
order of sums. Shapes: B = answers, T = tokens of the longest with its prompt, N = tokens of all
answers, V = vocabulary, H = hidden size.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from fp8.distributed import call_inside
from fp8.losses import LARGE_VOCABULARY, head_vocabulary
from fusion.models import context_length
from fusion.sampling import Row, Sampling, write


@dataclass(frozen=True, slots=True)
class Answer:
    """What the model said to a prompt."""

    prompt: list[int]
    ids: list[int]
    """Its end included, unless it was cut."""
    logprobs: list[float]
    """Of each id, in nats, as it was drawn."""
    cut: bool
    """It was not at its end when the limit came."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Draw:
    """How answers are drawn."""

    max_new_tokens: int
    temperature: float
    ends: frozenset[int]
    batch_size: int = 256
    """Answers written at once; their keys and values are in memory."""


def answer_all(
    model: PreTrainedModel, prompts: Sequence[list[int]], draw: Draw, seed: Sequence[int]
) -> list[Answer]:
    """Draw one answer to each prompt. An answer hangs on the model, the seed and its place alone.

    Raises: GenerateError when the model's logits are not finite.
    """
    sampling = Sampling(temperature=draw.temperature, ends=draw.ends)
    room = context_length(model) + 1
    rows = [
        Row(
            index=i,
            ids=prompt,
            limit=min(draw.max_new_tokens, room - len(prompt)),
            noise=np.random.default_rng([*seed, i]),
        )
        for i, prompt in enumerate(prompts)
    ]
    order = sorted(rows, key=lambda row: (len(row.ids), row.index))
    was_training = model.training
    model.eval()
    try:
        for first in range(0, len(order), draw.batch_size):
            for _ in write(model, order[first : first + draw.batch_size], sampling):
                pass
    finally:
        model.train(was_training)
    return [
        Answer(
            prompt=row.ids,
            ids=row.written + ([] if row.end is None else [row.end]),
            logprobs=row.logprobs,
            cut=row.end is None,
        )
        for row in rows
    ]


def laid_out(answers: Sequence[Answer]) -> tuple[Tensor, Tensor]:
    """Ids [B, T], prompts before answers, and which of them the answers are, [B, T] bool."""
    rows = [answer.prompt + answer.ids for answer in answers]
    width = max(len(row) for row in rows)
    # Padding comes last, where a causal model does not look: any id will do.
    ids_BT = torch.tensor([row + [row[-1]] * (width - len(row)) for row in rows])
    said_BT = torch.zeros_like(ids_BT, dtype=torch.bool)
    for at, (row, answer) in enumerate(zip(rows, answers, strict=True)):
        said_BT[at, len(answer.prompt) : len(row)] = True
    return ids_BT, said_BT


def logprobs_of(
    model: nn.Module,
    ids_BT: Tensor,
    said_BT: Tensor,
    temperature: float,
    *,
    chunk_tokens: int = 1024,
) -> Tensor:
    """Log-probabilities of the answers' tokens, [N], row by row; differentiable.

    Args: temperature: that of the draw, 0 for 1. chunk_tokens: of a large vocabulary, how many
        tokens' logits exist at one time; they are computed again for their gradients.
    """
    device = next(model.parameters()).device
    ids_BT, said_BT = ids_BT.to(device), said_BT.to(device)
    reads_BT, targets_N = said_BT[:, 1:], ids_BT[said_BT]
    if head_vocabulary(model) < LARGE_VOCABULARY:
        logits_BTV = model(input_ids=ids_BT[:, :-1], use_cache=False).logits
        return _chosen(logits_BTV[reads_BT], targets_N, temperature)
    found: Tensor = call_inside(
        model, _chunked, ids_BT[:, :-1], reads_BT, targets_N, (temperature, chunk_tokens)
    )
    return found


def _chunked(
    model: nn.Module, ids_BT: Tensor, reads_BT: Tensor, targets_N: Tensor, how: tuple[float, int]
) -> Tensor:
    temperature, size = how
    hidden_BTH = model.base_model(input_ids=ids_BT, use_cache=False).last_hidden_state  # type: ignore[operator]
    hidden_NH, head = hidden_BTH[reads_BT], model.get_output_embeddings()  # type: ignore[operator]

    def of_chunk(hidden_tH: Tensor, targets_t: Tensor) -> Tensor:
        return _chosen(head(hidden_tH), targets_t, temperature)

    cuts = [slice(at, at + size) for at in range(0, len(targets_N), size)]
    return torch.cat(
        [checkpoint(of_chunk, hidden_NH[c], targets_N[c], use_reentrant=False) for c in cuts]
    )


def _chosen(logits_NV: Tensor, targets_N: Tensor, temperature: float) -> Tensor:
    logprobs_NV = (logits_NV.float() / (temperature or 1.0)).log_softmax(-1)
    return logprobs_NV.gather(-1, targets_N[:, None])[:, 0]
