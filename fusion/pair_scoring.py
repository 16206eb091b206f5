"""Scoring pairs of responses: a forward pass of a model, and its logs made comparable.

Shapes: N = pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from fusion.pair_file import PreferencePair
from fusion.pair_scores import LEAST, PairScores
from fusion.pair_tokens import encoded
from fusion.scoring import score_streams

Length = Literal["pivot", "own", "none"]
"""What logs are divided by: the response's tokens as the pivot cuts it; as each model cuts it
itself (InfiFPO, where longer tokens pass for a worse model); nothing."""


def score_pairs(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    pairs: Sequence[PreferencePair],
    on_progress: Callable[[int, int], None] | None = None,
) -> PairScores:
    """Score both responses of each pair, its end (eos) included: what an expert ships.

    Args: on_progress: told (tokens scored, tokens in all).
    Raises: PreferenceError when there is no pair.
    """
    rows, prompts = encoded(tokenizer, pairs)
    streams = [ids for pair in rows for ids in pair]
    starts = np.repeat(prompts, 2)
    sums = np.zeros(len(streams))
    for stream, start, logprobs, labels in score_streams(model, streams, on_progress):
        # Row p predicts the token p + 1 of the stream, so the response's first row is one earlier.
        skip = max(0, int(starts[stream]) - 1 - start)
        own = logprobs.gather(-1, labels[:, None])[skip:, 0]
        sums[stream] += float(own.double().sum())
    tokens = np.asarray([len(ids) for ids in streams], np.int64) - starts
    # A log-probability is at most 0, also where float32 rounds it up.
    sums = np.clip(sums, LEAST * tokens, 0.0)
    return PairScores(sums[0::2], tokens[0::2], sums[1::2], tokens[1::2])


def lengths(pivot: PairScores, length: Length) -> Tensor:
    """What the pivot's logs are divided by: [2, N] float64; chosen, then rejected."""
    tokens_2N = torch.from_numpy(np.stack([pivot.chosen_tokens, pivot.rejected_tokens])).double()
    return torch.ones_like(tokens_2N) if length == "none" else tokens_2N


def divided(scores: PairScores, pivot: PairScores, length: Length) -> Tensor:
    """A model's logs of chosen and rejected, each divided by its length: [2, N] float64."""
    logs_2N = torch.from_numpy(np.stack([scores.chosen_logp, scores.rejected_logp]))
    return logs_2N / lengths(scores if length == "own" else pivot, length)


def prefers_chosen(scores: PairScores, pivot: PairScores, length: Length) -> list[bool]:
    """Whether a model finds the chosen response likelier than the other, each by its length."""
    chosen_N, rejected_N = divided(scores, pivot, length)
    return [bool(right) for right in chosen_N > rejected_N]
