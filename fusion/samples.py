"""Draws from an expert's whole distribution, instead of its head: unbiased targets.

N ids are drawn with replacement from p and kept with their counts; counts / N has the mean p, so
a cross-entropy against it has the full one's gradient in the mean, where a top-K has a bias.
Source: Sparse Logit Sampling, RS-KD (arXiv 2503.16870).
Shapes: R = rows, N = draws, K = kept ids, V = vocabulary.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fusion.contribution import LOGPROB_FLOOR, ContributionError
from fusion.top_rows import TopRows

_CHUNK = 1 << 23
_OUTPUTS = 4
"""Numbers of 64 bits that Philox makes per step of its counter."""


def uniforms(seed: int, document: int, start: int, rows: int, draws: int) -> NDArray[np.float64]:
    """Return [rows, N] numbers in [0, 1) for the rows of a document from `start` on.

    Each is a function of seed, document, row and draw alone: batches and windows change nothing.
    """
    steps = -(-draws // _OUTPUTS)
    bits = np.random.Philox(key=np.asarray([seed, document], np.uint64))
    bits.advance(start * steps)
    return np.random.Generator(bits).random((rows, steps * _OUTPUTS))[:, :draws]


def sampled_rows(
    logits_RV: Tensor, labels_R: Tensor, uniforms_RN: NDArray[np.float64], k: int
) -> TopRows:
    """Draw from every row and keep k ids; what a draw leaves out is in no tail.

    Raises: ContributionError when a row holds NaN or +infinity.
    """
    ids_RN, own = draw(logits_RV, labels_R, torch.from_numpy(uniforms_RN).to(logits_RV.device))
    ids, logprobs = tally(ids_RN.cpu().numpy(), k)
    floor = np.full(len(ids), LOGPROB_FLOOR, np.float32)
    return TopRows(own.cpu().numpy(), ids, logprobs, floor)


def draw(logits_RV: Tensor, labels_R: Tensor, uniforms_RN: Tensor) -> tuple[Tensor, Tensor]:
    """Draw ids by the inverse of the distribution function.

    Returns: ids [R, N] and the labels' own log-probabilities [R] float32.
    Raises: ContributionError when a row holds NaN or +infinity.
    """
    ids, own = [], []
    step = max(1, _CHUNK // logits_RV.shape[1])
    for begin in range(0, len(logits_RV), step):
        rows = slice(begin, begin + step)
        logprobs = logits_RV[rows].double().log_softmax(-1)
        own.append(logprobs.gather(1, labels_R[rows, None])[:, 0].float())
        edges = logprobs.exp_().cumsum(-1)
        # The sum is 1 but for rounding; an id of probability 0 ends where it starts: never drawn.
        wanted = uniforms_RN[rows] * edges[:, -1:]
        ids.append(torch.searchsorted(edges, wanted, right=True))
    found = torch.cat(own)
    if found.isnan().any():
        raise ContributionError(
            "not_finite", "the model's logits hold NaN or infinity: it diverged; train it again"
        )
    return torch.cat(ids), found.clamp(LOGPROB_FLOOR, 0)


def tally(ids_RN: NDArray[Any], k: int) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """Count the draws of each row; the most frequent id first, the smaller of two alike.

    Where more than k different ids were drawn, the first k draws count alone. That is no bias:
    given which ids were drawn, all orders are equally likely, so the first k have the same mean.
    Returns: ids [R, k], -1 behind the last, and log(count / draws) [R, k], the floor there.
    """
    rows, draws = ids_RN.shape
    sorted_RN = np.sort(ids_RN, axis=1)
    several = (np.diff(sorted_RN, axis=1) != 0).sum(axis=1) + 1 > k
    used_R = np.where(several, min(k, draws), draws)
    none = np.iinfo(sorted_RN.dtype).max
    sorted_RN = np.sort(np.where(np.arange(draws) < used_R[:, None], ids_RN, none), axis=1)
    new_RN = np.concatenate([np.ones((rows, 1), bool), np.diff(sorted_RN, axis=1) != 0], axis=1)
    rank_RN = np.cumsum(new_RN, axis=1) - 1
    flat = (np.arange(rows)[:, None] * (draws + 1) + rank_RN).ravel()
    drawn = (sorted_RN != none).ravel()
    counts = np.bincount(flat[drawn], minlength=rows * (draws + 1)).reshape(rows, draws + 1)
    ids = np.full((rows, draws + 1), -1, np.int32)
    ids.ravel()[flat[drawn]] = sorted_RN.ravel()[drawn]
    order = np.argsort(-counts, axis=1, kind="stable")
    pad = np.zeros((rows, max(0, k - draws - 1)), np.int64)
    counts = np.concatenate([np.take_along_axis(counts, order, 1), pad], axis=1)[:, :k]
    ids = np.concatenate([np.take_along_axis(ids, order, 1), pad - 1], axis=1)[:, :k]
    with np.errstate(divide="ignore"):
        logprobs = np.log(counts / used_R[:, None])
    return ids.astype(np.int32), np.maximum(logprobs, LOGPROB_FLOOR).astype(np.float32)
