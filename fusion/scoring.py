"""Forward passes over documents: batches of like length, windows of the model's context.

The head is asked only about tokens that are scored, and for few rows at a time: their logits lie in
memory that the process has already, where those of a whole batch would be fetched page by page.
Shapes: B = windows in a batch, T = tokens read, H = width, V = vocabulary, n = scored tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor
from transformers import PreTrainedModel

from fusion.models import context_length

TOKENS_PER_BATCH: Final = 4096
PADDING: Final = 1 / 8
"""Of a batch, at most: where lengths differ much, batches are small."""
LOGITS_AT_ONCE: Final = 3 << 21
"""24 MiB in fp32 on CPU: from 32 MiB on malloc asks the system for fresh pages every time."""
BATCH_LOGITS: Final = 1 << 26
"""256 MiB on other devices, and of a whole batch where the head cannot be asked alone."""
Half = Callable[[Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class Window:
    """Tokens of one stream that are scored in one forward pass."""

    stream: int
    ids: Sequence[int]
    """What the model reads and, from the second on, predicts: eos or left context first."""
    scored: int
    """How many of the last tokens are scored here; the others are context."""
    start: int
    """Row in the stream of the first scored token."""


@dataclass(frozen=True, slots=True)
class Part:
    """Rows of logits that are one stream's."""

    stream: int
    start: int
    """Row in the stream of the first one."""
    rows: slice
    """Where they stand among the logits."""


@dataclass(frozen=True, slots=True)
class Scored:
    """What the model says at some tokens of a batch; every row is scored."""

    logits: Tensor
    """[n, V]"""
    labels: Tensor
    """[n] the token that each row predicts."""
    parts: Sequence[Part]


def windows_of(
    stream: int, ids: Sequence[int], context: int, *, apart: bool = False
) -> Iterator[Window]:
    """Cut eos + ids into windows of at most `context` inputs; each token is scored once.

    Later windows start half a window back, so no token is scored with less context than that.
    Args: apart: they do not overlap, but for the last one.
    """
    rows = len(ids) - 1
    done = min(rows, context)
    yield Window(stream, ids[: done + 1], done, 0)
    stride = context if apart else max(1, context // 2)
    while done < rows:
        end = min(rows, done + stride)
        yield Window(stream, ids[max(0, end - context) : end + 1], end - done, done)
        done = end


def batches(windows: Sequence[Window], tokens: int) -> Iterator[Sequence[Window]]:
    """Sort by length, so that little is padded, and cut into batches of at most so many tokens."""
    batch: list[Window] = []
    held = 0
    for window in sorted(windows, key=lambda w: (len(w.ids), w.stream, w.start)):
        padded, held = (len(batch) + 1) * len(window.ids), held + len(window.ids)
        if batch and (padded > tokens or padded - held > PADDING * padded):
            yield batch
            batch, held = [], len(window.ids)
        batch.append(window)
    if batch:
        yield batch


def halves(model: PreTrainedModel) -> tuple[Half, Half] | None:
    """Return the model's body and head where its logits are the head of the body's last states.

    None for a model that caps or scales what its head says: it is asked about one token, and must
    answer the same to the bit.
    """
    body, head = model.base_model, model.get_output_embeddings()
    if body is model or head is None:
        return None

    def states_of(ids_BT: Tensor) -> Tensor:
        found: Tensor = body(ids_BT, use_cache=False).last_hidden_state
        return found

    ids = torch.zeros(1, 1, dtype=torch.long, device=model.device)
    with torch.inference_mode():
        same = torch.equal(head(states_of(ids)), model(ids, use_cache=False).logits)
    return (states_of, head) if same else None


def score(
    model: PreTrainedModel, streams: Sequence[Sequence[int]], *, apart: bool = False
) -> Iterator[Scored]:
    """Predict the tokens of streams that start with eos; `apart` as in windows_of.

    A window's rows may come in several turns, one after the other.
    """
    context, device, was_training = context_length(model), model.device, model.training
    windows = [
        w for index, ids in enumerate(streams) for w in windows_of(index, ids, context, apart=apart)
    ]
    vocab = int(model.config.vocab_size)
    most = LOGITS_AT_ONCE if device.type == "cpu" else BATCH_LOGITS
    step = max(1, most // vocab)
    model.eval()
    try:
        parted = halves(model)
        body, head = parted or (_whole(model), _same)
        tokens = TOKENS_PER_BATCH if parted else min(TOKENS_PER_BATCH, BATCH_LOGITS // vocab)
        for batch in batches(windows, tokens):
            with torch.inference_mode():
                ids_BT, rows_n = _padded(batch, device)
                states_nH = body(ids_BT[:, :-1]).flatten(0, 1)[rows_n]
                labels_n = ids_BT[:, 1:].flatten()[rows_n]
            for begin in range(0, len(rows_n), step):
                now = slice(begin, begin + step)
                with torch.inference_mode():
                    logits_nV = head(states_nH[now])
                yield Scored(logits_nV, labels_n[now], list(_parts(batch, begin, begin + step)))
    finally:
        model.train(was_training)


def _whole(model: PreTrainedModel) -> Half:
    def logits_of(ids_BT: Tensor) -> Tensor:
        found: Tensor = model(ids_BT, use_cache=False).logits
        return found

    return logits_of


def _same(logits: Tensor) -> Tensor:
    return logits


def _padded(batch: Sequence[Window], device: torch.device) -> tuple[Tensor, Tensor]:
    """Lay windows side by side: ids [B, T + 1], and which of the B * T rows are scored."""
    width = len(batch[-1].ids) - 1
    # Causal attention: padding on the right is seen by no token before it.
    ids = torch.zeros(len(batch), width + 1, dtype=torch.long)
    scored = torch.zeros(len(batch), width, dtype=torch.bool)
    for row, window in enumerate(batch):
        read = len(window.ids) - 1
        ids[row, : read + 1] = torch.as_tensor(window.ids)
        scored[row, read - window.scored : read] = True
    return ids.to(device), scored.flatten().nonzero()[:, 0].to(device)


def _parts(batch: Sequence[Window], begin: int, stop: int) -> Iterator[Part]:
    """Say whose rows begin..stop of a batch's scored ones are."""
    at = 0
    for window in batch:
        first, last = max(begin, at), min(stop, at + window.scored)
        if first < last:
            rows = slice(first - begin, last - begin)
            yield Part(window.stream, window.start + first - at, rows)
        at += window.scored


def score_streams(
    model: PreTrainedModel,
    streams: Sequence[Sequence[int]],
    on_progress: Callable[[int, int], None] | None = None,
    *,
    apart: bool = False,
) -> Iterator[tuple[int, int, Tensor, Tensor]]:
    """Predict the tokens of streams that start with eos, a part of a window at a time, in order.

    Args: apart: the windows do not overlap (windows_of).
    Yields: (stream, row of the first scored token, logprobs [n, V] float32, labels [n]).
    """
    done, total = 0, sum(len(stream) - 1 for stream in streams)
    for scored in score(model, streams, apart=apart):
        for part in scored.parts:
            with torch.inference_mode():
                logprobs = scored.logits[part.rows].float().log_softmax(-1).cpu()
            labels = scored.labels[part.rows].cpu()
            yield part.stream, part.start, logprobs, labels
            done += len(labels)
        if on_progress is not None:
            on_progress(done, total)
