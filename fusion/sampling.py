"""Ids out of a model, a batch at a time: keys and values are kept, and each row draws for itself.

Shapes: B = rows still written, T = tokens read, V = vocabulary, H = heads, D = features of a head.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache, DynamicLayer


class GenerateError(ValueError):
    """Nothing can be written as asked; the message says what to change."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How ids are drawn."""

    temperature: float
    """0: always the likeliest."""
    top_p: float = 1.0
    """Draw from the fewest ids that hold this much probability."""
    ends: frozenset[int]
    """Ids at which a row ends."""
    mute: tuple[int, ...] = ()
    """Ids never drawn."""

    def __post_init__(self) -> None:
        """Refuse numbers that cannot be meant."""
        if not (math.isfinite(self.temperature) and self.temperature >= 0 and 0 < self.top_p <= 1):
            raise GenerateError(
                f"temperature {self.temperature} and top_p {self.top_p} cannot be meant; wanted a "
                "temperature of at least 0 (0: always the likeliest) and top_p above 0, at most 1"
            )


@dataclass(slots=True)
class Row:
    """What is read, and what has been written after it."""

    index: int
    ids: list[int]
    """What is read before the first new token; at least one."""
    limit: int
    """New tokens at most, the one that ends it included."""
    noise: np.random.Generator
    """Its own: what a row draws depends on no other row, and on no batch."""
    written: list[int] = field(default_factory=list)
    """Without the id that ended it."""
    end: int | None = None
    """The id that ended it; None: it was cut by its limit, or is not done."""
    logprobs: list[float] = field(default_factory=list)
    """Of each id drawn, `end` included, in nats under what it was drawn from."""

    @property
    def done(self) -> bool:
        """Whether nothing more is written."""
        return self.end is not None or len(self.written) == self.limit


class _RoomyLayer(DynamicLayer):  # type: ignore[misc]
    """Keys and values with room to spare: a token is written in place.

    transformers' own layer copies all that went before for each token: up to three times slower.
    """

    keys: Tensor
    values: Tensor
    _rooms: tuple[Tensor, ...] = ()
    """[B, H, room, D] each; keys and values are their beginnings. (): they have no room."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append [B, H, T, D] to what is there, and return all of it."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        seen = self.get_seq_length()
        end = seen + key_states.shape[2]
        if not self._rooms or end > self._rooms[0].shape[2]:
            self._rooms = tuple(
                new.new_empty((*new.shape[:2], end + max(32, end // 2), new.shape[3]))
                for new in (key_states, value_states)
            )
            if seen:
                self._rooms[0][:, :, :seen] = self.keys
                self._rooms[1][:, :, :seen] = self.values
        for room, new in zip(self._rooms, (key_states, value_states), strict=True):
            room[:, :, seen:end] = new
        self.keys, self.values = (room[:, :, :end] for room in self._rooms)
        return self.keys, self.values

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Keep these rows only."""
        super().reorder_cache(beam_idx)
        self._rooms = ()


@torch.no_grad()  # no inference mode: the weights' FP8 copies made here are trained with afterwards
def write(model: PreTrainedModel, rows: list[Row], sampling: Sampling) -> Iterator[int]:
    """Write the rows to their ends; after each token, tell how many more are settled."""
    device, cache = next(model.parameters()).device, DynamicCache(config=model.config)
    cache.layers = [_RoomyLayer() if type(x) is DynamicLayer else x for x in cache.layers]
    width = max(len(row.ids) for row in rows)
    pad = [width - len(row.ids) for row in rows]
    ids_BT = torch.tensor(
        [row.ids[:1] * n + row.ids for n, row in zip(pad, rows, strict=True)], device=device
    )
    mask_BT = (torch.arange(width) >= torch.tensor(pad)[:, None]).long().to(device)
    position_BT = (mask_BT.cumsum(-1) - 1).clamp(min=0)
    mute = torch.tensor(sampling.mute, dtype=torch.long, device=device)
    while rows:
        logits_BTV = model(
            input_ids=ids_BT,
            attention_mask=mask_BT,
            position_ids=position_BT,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits
        logits_BV = logits_BTV[:, -1].float().index_fill(-1, mute, -torch.inf)
        drawn_B, logprob_B = draw(logits_BV, rows, sampling)
        drawn = zip(rows, drawn_B.tolist(), logprob_B.tolist(), strict=True)
        yield sum(_append(row, i, logprob, sampling) for row, i, logprob in drawn)
        alive = [at for at, row in enumerate(rows) if not row.done]
        ids_BT, position_BT = drawn_B[:, None], position_BT[:, -1:] + 1
        mask_BT = torch.nn.functional.pad(mask_BT, (0, 1), value=1)
        # Dropping rows copies the cache, so it must pay: a quarter of the batch, or all.
        if 4 * len(alive) <= 3 * len(rows) or not alive:
            rows, kept = [rows[at] for at in alive], torch.tensor(alive, device=device)
            if rows:
                cache.reorder_cache(kept)
                ids_BT, position_BT, mask_BT = ids_BT[kept], position_BT[kept], mask_BT[kept]


def _append(row: Row, drawn: int, logprob: float, sampling: Sampling) -> int:
    """Give a row its next token; returns how many of its tokens are settled by that."""
    if row.done:
        return 0
    row.logprobs.append(logprob)
    if drawn in sampling.ends:
        row.end = drawn
        return row.limit - len(row.written)
    row.written.append(drawn)
    return 1


def draw(logits_BV: Tensor, rows: Sequence[Row], sampling: Sampling) -> tuple[Tensor, Tensor]:
    """Draw the next id of each row: the first to arrive, when ids race at their probabilities.

    Of all ways to draw, this one is changed least by a rounding of the logits.
    Returns: ids [B], and their log-probabilities [B] under what they were drawn from.
    """
    if bool((top_B := logits_BV.amax(-1)).isfinite().logical_not().any()):
        raise GenerateError(
            f"the model's largest logits are not finite (found {float(top_B.sum())}); its training "
            "has diverged: take an earlier checkpoint, or train it with a lower lr"
        )
    if sampling.temperature == 0:
        ids_B = logits_BV.argmax(-1)
        return ids_B, torch.zeros_like(top_B)
    logprobs_BV = (logits_BV / sampling.temperature).log_softmax(-1)
    if sampling.top_p < 1:
        sorted_BV, ids_BV = logprobs_BV.sort(dim=-1, descending=True, stable=True)
        before_BV = sorted_BV.double().exp().cumsum(-1) - sorted_BV.double().exp()
        logprobs_BV = logprobs_BV.masked_fill(
            torch.empty_like(ids_BV, dtype=torch.bool).scatter_(
                -1, ids_BV, before_BV >= sampling.top_p
            ),
            -torch.inf,
        ).log_softmax(-1)
    # Drawn in 64 bits: an arrival of 0, which 32 bits know, would let an id win that hardly can.
    wait_BV = np.stack([row.noise.standard_exponential(logits_BV.shape[1]) for row in rows])
    log_wait_BV = torch.from_numpy(np.log(wait_BV).astype(np.float32)).to(logits_BV.device)
    ids_B = (logprobs_BV - log_wait_BV).argmax(-1)
    return ids_B, logprobs_BV.gather(-1, ids_B[:, None])[:, 0]
