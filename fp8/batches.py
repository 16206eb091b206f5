"""Batches as a pure function of the step: what a run needs to be resumed without a sampler.

Shapes: B = rows of a batch, T = predicted positions per row, T1 = T + 1.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fp8.documents import Documents

IGNORED: Final = -100
"""The label of a position that predicts nothing, as in torch and transformers."""


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
    if stream.ndim != 1:
        raise ValueError(f"token stream has shape {stream.shape}; wanted one dimension of tokens")
    windows_at = _shuffled_windows(len(stream), batch_size, seq_len, seed)

    def batch_at(step: int) -> Tensor:
        rows = np.stack([stream[at : at + seq_len + 1] for at in windows_at(step)])
        return torch.from_numpy(rows.astype(np.int64))

    return batch_at


def packed_documents(
    documents: Documents, *, batch_size: int, seq_len: int, seed: int
) -> Callable[[int], dict[str, Tensor]]:
    """Cut the documents, end to end, into windows in which no document knows of another.

    The windows are those of `packed_batches`. position_ids begin at 0 with each document, and
    with each window, which is how transformers' attention tells documents apart (`fp8.losses`);
    labels are the ids (transformers shifts them) but IGNORED where a document or a window begins.
    A document cut by a window's edge goes on in another window without what came before.

    Args: documents: in memory, or a token file of any size, of which only the windows are read;
        seq_len: T, at least 2.
    Returns: batch_at(step) -> {input_ids, position_ids, labels}, each [B, T1] int64; pure. Every
        row predicts at least one token.
    Raises: ValueError when there is no window.
    """
    if seq_len < 2:
        raise ValueError(f"seq_len is {seq_len}; a window of documents needs at least 2")
    windows_at = _shuffled_windows(len(documents.tokens), batch_size, seq_len, seed)

    def batch_at(step: int) -> dict[str, Tensor]:
        starts = windows_at(step)
        ids_BT1 = np.stack([documents.tokens[at : at + seq_len + 1] for at in starts])
        position_BT1 = np.stack([_positions(documents.offsets, at, seq_len + 1) for at in starts])
        ids = torch.from_numpy(ids_BT1.astype(np.int64))
        positions = torch.from_numpy(position_BT1)
        labels = ids.masked_fill(positions == 0, IGNORED)
        return {"input_ids": ids, "position_ids": positions, "labels": labels}

    return batch_at


def count_tokens(batch: Any) -> int:
    """Tokens a batch trains on: its labels' that count, what its ids predict, or its `tokens`."""
    if isinstance(batch, Mapping):
        if isinstance(labels := batch.get("labels"), Tensor):
            return int((labels[:, 1:] != IGNORED).sum())
        batch = batch.get("input_ids")
    if isinstance(batch, Tensor):
        return batch.numel() - (batch.shape[0] if batch.ndim == 2 else 0)
    return int(getattr(batch, "tokens", 0))


def part_of(batch: Any, index: int, parts: int) -> Any:
    """Return one of `parts` pieces of a batch: consecutive rows, as even as they go.

    Args: batch: a tensor whose rows come first, a mapping of such, or an object with a method
        part(index, parts) of its own.
    Raises: ValueError when there are fewer rows than pieces; TypeError for any other batch.
    """
    if parts == 1:
        return batch
    if isinstance(batch, Tensor):
        if batch.ndim == 0 or len(batch) < parts:
            raise ValueError(
                f"a batch of shape {tuple(batch.shape)} cannot be cut into {parts} pieces (one for "
                "each rank and each accumulation); make batches larger, or accumulate less"
            )
        return batch.tensor_split(parts)[index]
    if isinstance(batch, Mapping):
        return {name: part_of(value, index, parts) for name, value in batch.items()}
    if callable(own := getattr(batch, "part", None)):
        return own(index, parts)
    raise TypeError(
        f"a batch of type {type(batch).__name__} cannot be cut into {parts} pieces; give tensors, "
        "a mapping of tensors, or an object with a method part(index, parts)"
    )


def _shuffled_windows(
    tokens: int, batch_size: int, seq_len: int, seed: int
) -> Callable[[int], list[int]]:
    """Return where the windows of a step's batch begin, as a function of the step."""
    windows = (tokens - 1) // seq_len
    if windows < 1:
        raise ValueError(
            f"token stream has {tokens} tokens; wanted at least {seq_len + 1}; "
            f"add text or lower seq_len (now {seq_len})"
        )
    spare = (tokens - 1) % seq_len

    @lru_cache(maxsize=2)
    def starts(epoch: int) -> NDArray[np.int64]:
        rng = np.random.default_rng([seed, epoch])
        return rng.permutation(windows) * seq_len + rng.integers(spare + 1)

    def windows_at(step: int) -> list[int]:
        places = range(step * batch_size, (step + 1) * batch_size)
        return [int(starts(place // windows)[place % windows]) for place in places]

    return windows_at


def _positions(offsets: NDArray[np.uint64], start: int, length: int) -> NDArray[np.int64]:
    """Positions within their documents of the tokens from `start` on, which itself is 0."""
    # uint64 as the offsets are: of two types numpy would make a third, and copy a whole file.
    edges = np.array([start, start + length], dtype=np.uint64)
    first, last = np.searchsorted(offsets, edges, side="right")
    begins = np.zeros(length, dtype=np.int64)
    here = offsets[first:last].astype(np.int64) - start
    here = here[here < length]
    begins[here] = here
    return np.arange(length) - np.maximum.accumulate(begins)
