"""What is kept of a row of logits, in one pass over the vocabulary.

The K largest lie in the K blocks with the largest maxima, so only those blocks are searched; the
kept ids are left out of the sum of the others, so a small tail is not lost to cancellation.
On CPU that pass takes each block's maximum and its sum of exp while the row lies in the core's own
cache; the rest works on what came out. numpy does the pass, as its exp is twice as fast as
torch's, and torch selects, in tensors too small for its threads, as top_rows has its own.
Shapes: N = rows, V = vocabulary, K = kept ids, n = rows of a chunk, G = blocks, C = candidates.
"""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fusion.contribution import LOGPROB_FLOOR, ContributionError

_CHUNK: Final = 1 << 20
_DEVICE_CHUNK: Final = 1 << 25
"""Logits in fp32 at once, on CPU and on other devices."""
_CACHED: Final = 1 << 16
"""Logits of a turn on CPU: they and their exp take half of a core's cache of 1 MiB."""
_SAFE: Final = 40.0
"""Nats around 0 where nothing overflows and exp needs no shift: one pass less."""


@dataclass(frozen=True, slots=True)
class TopRows:
    """Log-probabilities of rows, float32, at least LOGPROB_FLOOR."""

    own: NDArray[np.float32]
    """[N] of the labels."""
    ids: NDArray[np.int32]
    """[N, K], likeliest first."""
    logprobs: NDArray[np.float32]
    """[N, K] of the ids."""
    tail: NDArray[np.float32]
    """[N] of all other ids together."""


def top_rows(logits_NV: Tensor, labels_N: Tensor, k: int) -> TopRows:
    """Keep the k likeliest ids of every row, and the label's own log-probability.

    Raises: ContributionError when a row holds NaN or +infinity.
    """
    cpu, (rows, vocab) = logits_NV.device.type == "cpu", logits_NV.shape
    threads = torch.get_num_threads() if cpu else 1
    step = max(1, min(-(-rows // threads), (_CHUNK if cpu else _DEVICE_CHUNK) // vocab))
    chunks = list(zip(torch.split(logits_NV, step), torch.split(labels_N, step), strict=True))
    threads = min(threads, len(chunks))
    if threads > 1:
        with ThreadPoolExecutor(threads) as pool:
            parts = list(pool.map(partial(_on_cpu, k), *zip(*chunks, strict=True)))
    else:
        parts = [(_on_cpu if cpu else _on_device)(k, *chunk) for chunk in chunks]
    own, ids, logprobs, tail = (np.concatenate(part) for part in zip(*parts, strict=True))
    if np.isnan(own).any() or np.isnan(logprobs).any():
        raise ContributionError(
            "not_finite", "the model's logits hold NaN or infinity: it diverged; train it again"
        )
    held = (np.clip(part, LOGPROB_FLOOR, 0).astype(np.float32) for part in (own, logprobs, tail))
    own, logprobs, tail = held
    return TopRows(own, ids.astype(np.int32), logprobs, tail)


def _blocks(vocab: int, k: int) -> tuple[int, int]:
    """Return (ids of a block, blocks): block g is g, g + G, g + 2G..., so maxima vectorise."""
    size = 1 << max(0, round(math.log2(math.sqrt(vocab / k))))
    return size, vocab // size


def _on_cpu(k: int, logits_nV: Tensor, labels_n: Tensor) -> tuple[NDArray[Any], ...]:
    rows, vocab = logits_nV.shape
    size, count = _blocks(vocab, k)
    with np.errstate(divide="ignore", invalid="ignore", under="ignore", over="ignore"):
        peaks_nG, sums_nG, shift_n1 = _by_block(logits_nV, size, count)
        best_nK = torch.from_numpy(peaks_nG).topk(k, sorted=False).indices
        found_nC = (best_nK[:, :, None] + torch.arange(size) * count).flatten(1)
        if size * count < vocab:
            rest = torch.arange(size * count, vocab).expand(rows, -1)
            found_nC = torch.cat([found_nC, rest], 1)
        values_nC = logits_nV.gather(1, found_nC).float()
        top_nK, places_nK = values_nC.topk(k)
        others_nC = np.exp(values_nC.numpy() - shift_n1)
        np.put_along_axis(others_nC, places_nK.numpy(), 0, axis=1)
        np.put_along_axis(sums_nG, best_nK.numpy(), 0, axis=1)
        tail_n = sums_nG.sum(axis=1) + others_nC.sum(axis=1)
        top = top_nK.numpy()
        total_n = np.log(tail_n + np.exp(top - shift_n1).sum(axis=1))
        lse_n = total_n + shift_n1[:, 0]
        own_n = logits_nV.gather(1, labels_n[:, None])[:, 0].float().numpy()
        ids_nK = found_nC.gather(1, places_nK).numpy()
        return own_n - lse_n, ids_nK, top - lse_n[:, None], np.log(tail_n) - total_n


def _by_block(
    logits_nV: Tensor, size: int, count: int
) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.float32]]:
    """Return each block's maximum and its sum of exp(logit - shift), [n, G], and the shift [n, 1].

    Of what lies behind the last whole block only the shift knows.
    """
    rows, vocab = logits_nV.shape
    whole = size * count
    peaks, sums = np.empty((2, rows, count), np.float32)
    shift = np.zeros((rows, 1), np.float32)
    turn = max(1, _CACHED // vocab)
    powers = np.empty((turn, whole), np.float32)
    for first in range(0, rows, turn):
        at = slice(first, first + turn)
        all_ids: NDArray[np.float32] = logits_nV[at].float().numpy()
        x, rest = all_ids[:, :whole], all_ids[:, whole:]
        out = powers[: len(x)]
        x.reshape(len(x), size, count).max(axis=1, out=peaks[at])
        peak = np.maximum(
            peaks[at].max(axis=1, keepdims=True), rest.max(axis=1, keepdims=True, initial=-np.inf)
        )
        if (np.abs(peak) < _SAFE).all():
            np.exp(x, out=out)
        else:
            shift[at] = peak
            np.exp(np.subtract(x, peak, out=out), out=out)
        out.reshape(len(x), size, count).sum(axis=1, out=sums[at])
    return peaks, sums, shift


def _on_device(k: int, logits_nV: Tensor, labels_n: Tensor) -> tuple[NDArray[Any], ...]:
    with torch.inference_mode():
        x = logits_nV.float()
        own = x.gather(1, labels_n[:, None])[:, 0]
        top, ids = x.topk(k, dim=-1)
        shares = (x - top[:, :1]).exp_().scatter_(1, ids, 0.0)
        tail = shares.sum(-1)
        total = (tail + (top - top[:, :1]).exp().sum(-1)).log()
        lse = total + top[:, 0]
        found = (own - lse, ids, top - lse[:, None], tail.log() - total)
        return tuple(part.cpu().numpy() for part in found)
