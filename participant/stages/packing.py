"""Conversations packed into rows: none is cut, none sees another, only answers are learned.

Shapes: B = rows of a batch, T1 = tokens of a row.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fp8.batches import IGNORED
from participant.stages.conversations import Example


def packed_examples(
    examples: Sequence[Example], *, batch_size: int, seq_len: int, seed: int, pad_id: int
) -> Callable[[int], dict[str, Tensor]]:
    """Lay examples side by side into rows of seq_len + 1 tokens, in an order drawn each epoch.

    position_ids begin at 0 with each example, which is how attention tells them apart (see
    `fp8.losses`), and with the padding behind the last. labels are the ids where an answer is,
    else IGNORED: the loss is the mean over answers' tokens.

    Args: examples: of at most seq_len + 1 tokens each. pad_id: fills rows; never learned.
    Returns: batch_at(step) -> {input_ids, position_ids, labels}, each [B, T1] int64; pure. Every
        row learns at least one token.
    Raises: ValueError when there is no example.
    """
    if not examples:
        raise ValueError("found no example to pack, wanted at least one")
    bins = fill([len(example.ids) for example in examples], seq_len + 1)
    rows_RT1 = [_row([examples[i] for i in one], seq_len + 1, pad_id) for one in bins]

    @lru_cache(maxsize=2)
    def order(epoch: int) -> NDArray[np.int64]:
        return np.random.default_rng([seed, epoch]).permutation(len(rows_RT1))

    def batch_at(step: int) -> dict[str, Tensor]:
        places = range(step * batch_size, (step + 1) * batch_size)
        picked = [rows_RT1[order(at // len(bins))[at % len(bins)]] for at in places]
        ids, positions, labels = torch.from_numpy(np.stack(picked, axis=1))
        return {"input_ids": ids, "position_ids": positions, "labels": labels}

    return batch_at


def fill(lengths: Sequence[int], room: int) -> list[list[int]]:
    """Put each into the fullest bin it fits, the longest first; returns the bins' indices.

    Best fit decreasing wastes at most 2/9 more bins than the best packing; in practice little.
    Raises: ValueError for one that no bin holds.
    """
    if max(lengths) > room:
        raise ValueError(f"found an example of {max(lengths)} tokens, wanted at most {room}")
    bins: list[list[int]] = []
    open_by_room: dict[int, list[int]] = {}
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        left = min((r for r, there in open_by_room.items() if there and r >= lengths[i]), default=0)
        if left:
            at = open_by_room[left].pop()
        else:
            left, at = room, len(bins)
            bins.append([])
        bins[at].append(i)
        open_by_room.setdefault(left - lengths[i], []).append(at)
    return bins


def _row(examples: Sequence[Example], length: int, pad_id: int) -> NDArray[np.int64]:
    """Ids, positions and labels of one row, [3, T1]."""
    row = np.full((3, length), IGNORED, dtype=np.int64)
    row[0] = pad_id
    start = 0
    for example in examples:
        size = len(example.ids)
        row[0, start : start + size] = example.ids
        row[1, start : start + size] = np.arange(size)
        for first, stop in example.answers:
            row[2, start + first : start + stop] = example.ids[first:stop]
        start += size
    row[1, start:] = np.arange(length - start)
    return row
