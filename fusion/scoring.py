"""Forward passes over documents: batches of like length, windows of the model's context.

Shapes: B = windows in a batch, T = tokens read, N = B * T, V = vocabulary, n = scored tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from fusion.models import context_length

TOKENS_PER_BATCH = 4096
LOGITS_PER_BATCH = 1 << 26
"""A batch has fewer tokens where the vocabulary is large: 256 MiB of logits in fp32."""


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
class Scored:
    """A batch after its forward pass. Rows of logits that no window scores are there too."""

    logits: Tensor
    """[N, V]"""
    labels: Tensor
    """[N] the token that each row predicts; 0 behind a window's end."""
    windows: Sequence[Window]
    width: int
    """T; window b has the rows b * T .. b * T + T - 1."""

    def rows(self, index: int) -> slice:
        """Return which rows are the scored ones of a window."""
        end = index * self.width + len(self.windows[index].ids) - 1
        return slice(end - self.windows[index].scored, end)


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


def batches(windows: Sequence[Window], vocab_size: int) -> Iterator[Sequence[Window]]:
    """Sort by length, so that little is padded, and cut into batches of bounded size."""
    tokens = min(TOKENS_PER_BATCH, LOGITS_PER_BATCH // vocab_size)
    batch: list[Window] = []
    for window in sorted(windows, key=lambda w: (len(w.ids), w.stream, w.start)):
        if batch and (len(batch) + 1) * len(window.ids) > tokens:
            yield batch
            batch = []
        batch.append(window)
    if batch:
        yield batch


def score(
    model: PreTrainedModel, streams: Sequence[Sequence[int]], *, apart: bool = False
) -> Iterator[Scored]:
    """Predict the tokens of streams that start with eos; `apart` as in windows_of."""
    context = context_length(model)
    windows = [
        w for index, ids in enumerate(streams) for w in windows_of(index, ids, context, apart=apart)
    ]
    device, was_training = next(model.parameters()).device, model.training
    model.eval()
    try:
        for batch in batches(windows, int(model.config.vocab_size)):
            width = len(batch[-1].ids) - 1
            # Causal attention: padding on the right is seen by no token before it.
            padded = torch.zeros(len(batch), width + 1, dtype=torch.long)
            for row, window in enumerate(batch):
                padded[row, : len(window.ids)] = torch.as_tensor(window.ids)
            padded = padded.to(device)
            with torch.inference_mode():
                logits_BTV = model(padded[:, :-1], use_cache=False).logits
                yield Scored(logits_BTV.flatten(0, 1), padded[:, 1:].flatten(), batch, width)
    finally:
        model.train(was_training)


def score_streams(
    model: PreTrainedModel,
    streams: Sequence[Sequence[int]],
    on_progress: Callable[[int, int], None] | None = None,
    *,
    apart: bool = False,
) -> Iterator[tuple[int, int, Tensor, Tensor]]:
    """Predict the tokens of streams that start with eos, window by window.

    Args: apart: the windows do not overlap (windows_of).
    Yields: (stream, row of the first scored token, logprobs [n, V] float32, labels [n]).
    """
    done, total = 0, sum(len(stream) - 1 for stream in streams)
    for scored in score(model, streams, apart=apart):
        for index, window in enumerate(scored.windows):
            rows = scored.rows(index)
            with torch.inference_mode():
                logprobs = scored.logits[rows].float().log_softmax(-1).cpu()
            yield window.stream, window.start, logprobs, scored.labels[rows].cpu()
            done += window.scored
        if on_progress is not None:
            on_progress(done, total)
