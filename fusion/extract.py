"""What an expert thinks of a text: next-token log-probabilities over documents.

Shapes: B = documents in a batch, T = tokens read, V = vocabulary, K = kept ids, P = positions.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from fusion.codec import CODEC_VERSION, LOGPROB_FLOOR, LogitContribution, LogitHeader
from fusion.models import TokenizerError, context_length, encode_text, eos_id, token_bytes

TOKENS_PER_BATCH = 4096


@dataclass(frozen=True, slots=True)
class _Window:
    """Tokens of one document that are scored in one forward pass."""

    document: int
    ids: list[int]
    """What the model reads and, from the second on, predicts: eos or left context first."""
    scored: int
    """How many of the last tokens are scored here; the others are context."""
    start: int
    """Row in the document of the first scored token."""


def _windows(document: int, ids: Sequence[int], context: int) -> Iterator[_Window]:
    """Cut eos + ids into windows of at most `context` inputs; each token is scored once.

    Later windows start half a window back, so no token is scored with less context than that.
    """
    stream, rows = list(ids), len(ids) - 1
    first = min(rows, context)
    yield _Window(document, stream[: first + 1], first, 0)
    done, stride = first, max(1, context // 2)
    while done < rows:
        end = min(rows, done + stride)
        yield _Window(document, stream[max(0, end - context) : end + 1], end - done, done)
        done = end


def score_streams(
    model: PreTrainedModel,
    streams: Sequence[Sequence[int]],
    on_progress: Callable[[int, int], None] | None = None,
) -> Iterator[tuple[int, int, Tensor, Tensor]]:
    """Predict the tokens of streams that start with eos, in windows of the model's context.

    Yields: (stream, row of the first scored token, logprobs [n, V] float32, labels [n]).
    """
    windows = [w for i, s in enumerate(streams) for w in _windows(i, s, context_length(model))]
    windows.sort(key=lambda w: (len(w.ids), w.document, w.start))
    device = next(model.parameters()).device
    was_training, done, total = model.training, 0, sum(w.scored for w in windows)
    model.eval()
    try:
        for batch in _batches(windows):
            width = len(batch[-1].ids)
            # Causal attention: padding on the right is seen by no token before it.
            padded = torch.tensor([w.ids + [0] * (width - len(w.ids)) for w in batch])
            with torch.inference_mode():
                logits_BTV = model(padded[:, :-1].to(device)).logits
                for row, window in enumerate(batch):
                    end = len(window.ids) - 1
                    span = slice(end - window.scored, end)
                    logprobs = logits_BTV[row, span].float().log_softmax(-1).cpu()
                    labels = padded[row, 1 : end + 1][span]
                    yield window.document, window.start, logprobs, labels
                    done += window.scored
            if on_progress is not None:
                on_progress(done, total)
    finally:
        model.train(was_training)


def _batches(windows: Sequence[_Window]) -> Iterator[list[_Window]]:
    batch: list[_Window] = []
    for window in windows:
        if batch and (len(batch) + 1) * len(window.ids) > TOKENS_PER_BATCH:
            yield batch
            batch = []
        batch.append(window)
    if batch:
        yield batch


def extract_logits(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    prompts: Sequence[str],
    *,
    top_k: int,
    prompt_set_sha256: str,
    model_sha256: str,
    on_progress: Callable[[int, int], None] | None = None,
) -> LogitContribution:
    """Compute a participant's contribution on a prompt set, at temperature 1.

    Args: on_progress: told (positions done, positions in all).
    Raises: TokenizerError when the tokenizer does not spell a prompt byte by byte.
    """
    eos, vocab = eos_id(tokenizer), int(model.config.vocab_size)
    table = token_bytes(tokenizer, vocab)
    docs = [[*encode_text(tokenizer, prompt), eos] for prompt in prompts]
    for prompt, ids in zip(prompts, docs, strict=True):
        if b"".join(table[i] for i in ids) != prompt.encode():
            raise TokenizerError(f"the tokenizer does not give back the bytes of {prompt[:40]!r}")
    doc_offsets = np.concatenate([[0], np.cumsum([len(ids) for ids in docs])]).astype(np.int64)
    positions = int(doc_offsets[-1])
    own = np.empty(positions, np.float16)
    tail = np.empty(positions, np.float16)
    top_ids = np.empty((positions, top_k), np.int32)
    top_logprobs = np.empty((positions, top_k), np.float16)
    streams = [[eos, *ids] for ids in docs]
    for doc, start, logprobs, labels in score_streams(model, streams, on_progress):
        rows = slice(doc_offsets[doc] + start, doc_offsets[doc] + start + len(labels))
        kept, kept_ids = logprobs.topk(top_k, dim=-1)
        rest = logprobs.scatter(-1, kept_ids, -torch.inf).logsumexp(-1)
        top_ids[rows], top_logprobs[rows] = kept_ids.numpy(), _stored(kept)
        tail[rows], own[rows] = _stored(rest), _stored(logprobs.gather(-1, labels[:, None])[:, 0])
    lengths = np.asarray([len(piece) for piece in table])
    header = LogitHeader(
        codec_version=CODEC_VERSION,
        prompt_set_sha256=prompt_set_sha256,
        tokenizer_sha256=hash_tokenizer(tokenizer),
        model_sha256=model_sha256,
        vocab_size=vocab,
        top_k=top_k,
        documents=len(docs),
        positions=positions,
    )
    return LogitContribution(
        header=header,
        doc_offsets=doc_offsets,
        token_ids=np.concatenate([np.asarray(ids, np.int32) for ids in docs]),
        byte_ends=np.concatenate([np.cumsum(lengths[ids]) for ids in docs]).astype(np.int32),
        own_logprob=own,
        topk_ids=top_ids,
        topk_logprobs=top_logprobs,
        tail_logprob=tail,
        vocab_bytes=np.frombuffer(b"".join(table), np.uint8),
        vocab_offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
    )


def hash_tokenizer(tokenizer: PreTrainedTokenizerFast) -> str:
    """Return the sha256 of the tokenizer's own JSON: what turns text into ids, all of it."""
    return hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest()


def _stored(logprobs: Tensor) -> NDArray[np.float16]:
    return logprobs.clamp(LOGPROB_FLOOR, 0.0).numpy().astype(np.float16)
