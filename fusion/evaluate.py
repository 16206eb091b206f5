"""How good a model is on held-out text and on facts, so that unlike tokenizers compare."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from fusion.models import encode_text, eos_id
from fusion.scoring import score_streams


@dataclass(frozen=True, slots=True)
class ChoiceQuestion:
    """A question with options, one of them right."""

    prompt: str
    options: tuple[str, ...]
    answer: int
    """Index of the right option."""


def bits_per_byte(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, docs: Sequence[str]
) -> float:
    """Return the bits the model needs per UTF-8 byte of docs, each with its eos.

    The eos counts as bits and not as a byte, for every tokenizer alike: to know where a document
    ends is part of knowing it.
    """
    eos = eos_id(tokenizer)
    total_bytes = _bytes_of(docs)
    streams = [[eos, *encode_text(tokenizer, doc), eos] for doc in docs]
    return _bits(model, streams, apart=False) / total_bytes


def rolling_bits_per_byte(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, docs: Sequence[str]
) -> float:
    """Return `bits_per_byte` as lm-eval's `loglikelihood_rolling` has it, to compare with others.

    Unlike bits_per_byte, the end of a document is not asked for, and what does not fit into the
    model's context is read in windows that do not overlap.
    Source: EleutherAI lm-evaluation-harness 0.4, get_rolling_token_windows with context_len=1.
    """
    eos = eos_id(tokenizer)
    total_bytes = _bytes_of(docs)
    streams = [[eos, *encode_text(tokenizer, doc)] for doc in docs]
    return _bits(model, [s for s in streams if len(s) > 1], apart=True) / total_bytes


def _bytes_of(docs: Sequence[str]) -> int:
    """UTF-8 bytes of all. Raises: ValueError when there are none."""
    total = sum(len(doc.encode()) for doc in docs)
    if total == 0:
        raise ValueError(
            "there is no text to measure on: give at least one document that is not ''"
        )
    return total


def _bits(model: PreTrainedModel, streams: Sequence[Sequence[int]], *, apart: bool) -> float:
    nats = [
        float(-logprobs.gather(-1, labels[:, None]).double().sum())
        for _, _, logprobs, labels in score_streams(model, streams, apart=apart)
    ]
    # fsum: the result does not hang on the order in which the windows were scored.
    return math.fsum(nats) / math.log(2)


def choice_accuracy(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    questions: Sequence[ChoiceQuestion],
    neutral: str = "",
) -> float:
    """Return the share of questions whose right option scores highest.

    Score: log p(option | prompt) - log p(option | neutral), summed over the option's tokens
    (pointwise mutual information): a plain sum would prefer short and common options, a mean per
    token would depend on the tokenizer. The first of equal scores is the model's choice.

    Args: neutral: what every option is likely after; "": the start of a document. Give a text
        ("Answer:") where a model trained on few forms has no idea of an option at a start: that
        noise, tens of nats, buries what it knows.
    """
    if not questions:
        raise ValueError("there are no questions: give at least one")
    eos = eos_id(tokenizer)
    beginning = [eos, *(encode_text(tokenizer, neutral) if neutral else [])]
    streams: list[list[int]] = []
    for question in questions:
        prompt = encode_text(tokenizer, question.prompt)
        for option in question.options:
            ids = encode_text(tokenizer, " " + option, prefixed=False)
            streams += [[eos, *prompt, *ids], [*beginning, *ids]]
    sums = np.zeros(len(streams))
    for stream, _, logprobs, labels in score_streams(model, streams):
        sums[stream] += float(logprobs.gather(-1, labels[:, None]).double().sum())
    # What stands before an option is in the sums of all options alike, so it decides nothing.
    gain, right, at = sums[0::2] - sums[1::2], 0, 0
    for question in questions:
        right += int(gain[at : at + len(question.options)].argmax() == question.answer)
        at += len(question.options)
    return right / len(questions)


def recovery(base: float, pivot: float, pooled: float) -> float:
    """Return the share of the way from base to pooled that pivot has gone, in bits per byte.

    1 is the pooled model, which saw everybody's private text; 0 is the base; less is worse.
    """
    if not pooled < base:
        raise ValueError(
            f"pooled ({pooled:.4f}) is not better than base ({base:.4f}): train longer"
        )
    return (base - pivot) / (base - pooled)
