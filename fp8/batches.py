"""Batches as a pure function of the step: what a run needs to be resumed without a sampler.

Shapes: B = rows of a batch, T = predicted positions per row, T1 = T + 1.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor


def packed_batches(
    token_ids: Sequence[int] | np.ndarray[Any, Any], *, batch_size: int, seq_len: int, seed: int
) -> Callable[[int], Tensor]:
    """Cut a token stream into windows and shuffle them anew in every epoch.

    Neighbouring windows share one token, so in an epoch every token but the stream's edge is
    predicted once. The windows' start is shifted from epoch to epoch, so the edge varies.

    Args: token_ids: one stream, at least seq_len + 1 tokens; seq_len: T.
    Returns: batch_at(step) -> [B, T1] int64; a pure function, safe to call for any step.
    Raises: ValueError when the stream holds no window.
    """
    stream = np.asarray(token_ids)
    windows = (len(stream) - 1) // seq_len
    if windows < 1 or stream.ndim != 1:
        raise ValueError(
            f"token stream has shape {stream.shape}; wanted one dimension of at least "
            f"{seq_len + 1} tokens; add text or lower seq_len (now {seq_len})"
        )
    spare = (len(stream) - 1) % seq_len

    @lru_cache(maxsize=2)
    def starts(epoch: int) -> np.ndarray[Any, Any]:
        rng = np.random.default_rng([seed, epoch])
        return rng.permutation(windows) * seq_len + rng.integers(spare + 1)

    def batch_at(step: int) -> Tensor:
        places = range(step * batch_size, (step + 1) * batch_size)
        first = [int(starts(place // windows)[place % windows]) for place in places]
        rows = np.stack([stream[at : at + seq_len + 1] for at in first])
        return torch.from_numpy(rows.astype(np.int64))

    return batch_at


def count_tokens(batch: Any) -> int:
    """Tokens a batch trains on: its `tokens` if it has one, else what its ids [B, T1] predict."""
    if isinstance(batch, Mapping):
        batch = batch.get("input_ids")
    if isinstance(batch, Tensor):
        return batch.numel() - (batch.shape[0] if batch.ndim == 2 else 0)
    return int(getattr(batch, "tokens", 0))
