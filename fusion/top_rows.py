"""What is kept of a row of logits, in little more than one pass over the vocabulary.

The K largest lie in the K blocks with the largest maxima, so only those blocks are searched; the
kept ids are left out of the sum of the others, so a small tail is not lost to cancellation.
On CPU a few rows at a time stay in the cache: numpy does the passes, as its exp is twice as fast
as torch's, and torch selects, in tensors too small for its threads, as top_rows has its own.
Shapes: N = rows, V = vocabulary, K = kept ids, n = rows of a chunk, G = blocks.
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

_CHUNK: Final = 1 << 19
_DEVICE_CHUNK: Final = 1 << 25
"""Logits in fp32 at once, on CPU and on other devices."""


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
    cpu = logits_NV.device.type == "cpu"
    step = max(1, (_CHUNK if cpu else _DEVICE_CHUNK) // logits_NV.shape[1])
    chunks = list(zip(torch.split(logits_NV, step), torch.split(labels_N, step), strict=True))
    threads = min(torch.get_num_threads(), len(chunks))
    if cpu and threads > 1:
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
    wide_nV = logits_nV.float()
    x: NDArray[np.float32] = wide_nV.numpy()
    rows, vocab = x.shape
    size, count = _blocks(vocab, k)
    peaks = x[:, : size * count].reshape(rows, size, count).max(axis=1)
    best = torch.from_numpy(peaks).topk(k, sorted=False).indices
    candidates = (best[:, :, None] + torch.arange(size) * count).flatten(1)
    if size * count < vocab:
        rest = torch.arange(size * count, vocab).expand(rows, -1)
        candidates = torch.cat([candidates, rest], 1)
    values, places = wide_nV.gather(1, candidates).topk(k)
    ids, top = candidates.gather(1, places).numpy(), values.numpy()
    own = x[np.arange(rows), labels_n.numpy()]
    with np.errstate(divide="ignore", invalid="ignore", under="ignore", over="ignore"):
        peak = top[:, :1]
        # Far from overflow there is nothing to shift: one pass less.
        shift = np.where(np.abs(peak) < 40, 0, peak).astype(np.float32)
        shares = np.exp(x - shift if shift.any() else x)
        shares[np.arange(rows)[:, None], ids] = 0
        tail = shares.sum(axis=1)
        total = np.log(tail + np.exp(top - shift).sum(axis=1))
        lse = total + shift[:, 0]
        return own - lse, ids, top - lse[:, None], np.log(tail) - total


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
