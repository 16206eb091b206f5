"""Text out of a model: batched sampling, and the prompt set of an on-policy round.

A model reads eos and then the document; a completion ends at eos or at its limit. In an
on-policy round the experts judge what the pivot itself writes on from public openings, so that
it is corrected where it goes and not only where the public text goes.
Source: on-policy distillation, GKD (arXiv 2306.13649); across tokenizers, SimCT (arXiv 2605.07711).
Shapes: B = rows still written, T = tokens read, V = vocabulary, H = heads, D = features of a head.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast
from transformers.cache_utils import DynamicCache, DynamicLayer

from fusion.byte_tables import ByteTable, byte_table, encode_text
from fusion.models import context_length, eos_id

ROUNDS: Final = 8
"""How often openings are drawn anew for completions that were empty or there already."""


class GenerateError(ValueError):
    """Nothing can be written as asked; the message says what to change."""


@dataclass(frozen=True, slots=True)
class _Sampling:
    temperature: float
    top_p: float
    eos: int
    table: ByteTable

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0 and 0 < self.top_p <= 1):
            raise GenerateError(
                f"temperature {self.temperature} and top_p {self.top_p} cannot be meant; wanted a "
                "temperature of at least 0 (0: always the likeliest) and top_p above 0, at most 1"
            )


@dataclass(slots=True)
class _Row:
    """One prompt, and what has been written after it."""

    index: int
    ids: list[int]
    """What is read before the first new token: eos and the prompt."""
    limit: int
    """New tokens at most, eos included."""
    noise: np.random.Generator
    """Its own: what a row draws depends on no other row, and on no batch."""
    written: list[int] = field(default_factory=list)
    done: bool = False


def complete(  # noqa: PLR0913 - the knobs of sampling, each by keyword
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    prompts: Sequence[str],
    *,
    max_new_tokens: int,
    temperature: float,
    top_p: float = 1.0,
    seed: int,
    batch_size: int,
    keep_prompt: bool = True,
    on_progress: Callable[[int, int], None] | None = None,
) -> list[str]:
    """Let the model write on from each prompt, to eos, to the limit or to its context's end.

    A text hangs on the model, the seed and its prompt (and, for a prompt given several times, on
    how often it came before): not on the order, the batches or the padding, but for the rounding
    of logits in float32, which may decide a tie closer than 1e-6. A lower limit gives the same
    texts, cut. Only whole characters are returned: a text ends where its bytes stop being UTF-8.

    Args: temperature: 0 takes the likeliest id. top_p: draw from the fewest ids that hold this
        much probability. batch_size: rows written at once; their keys and values are in memory.
        on_progress: told (tokens, tokens at most), of which a row that ends early skips the rest.
    Raises: GenerateError for numbers that cannot be meant, a prompt that fills the context, and a
        model whose logits are not finite; TokenizerError when ids cannot be read as bytes.
    """
    if min(max_new_tokens, batch_size) < 1 or seed < 0:
        raise GenerateError(
            f"max_new_tokens {max_new_tokens} and batch_size {batch_size} must be at least 1, "
            f"seed {seed} at least 0"
        )
    eos = eos_id(tokenizer)
    table = byte_table(tokenizer, int(model.config.vocab_size))
    sampling = _Sampling(temperature, top_p, eos, table)
    rows = _rows(tokenizer, prompts, eos, seed, (max_new_tokens, context_length(model)))
    # Rows of like length side by side: less padding to compute.
    order = sorted(rows, key=lambda row: (len(row.ids), row.index))
    total, was_training, told = sum(row.limit for row in rows), model.training, 0
    model.eval()
    try:
        for first in range(0, len(order), batch_size):
            for tokens in _write(model, order[first : first + batch_size], sampling):
                told += tokens
                if on_progress is not None:
                    on_progress(told, total)
    finally:
        model.train(was_training)
    texts = [_utf8(table, row.written, whole=not prompts[row.index]) for row in rows]
    return [p + t for p, t in zip(prompts, texts, strict=True)] if keep_prompt else texts


def on_policy_prompts(  # noqa: PLR0913 - the knobs of sampling, each by keyword
    pivot: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    public_documents: Sequence[str],
    *,
    share_of_document: float | tuple[float, float],
    count: int,
    seed: int,
    max_new_tokens: int | None = None,
    temperature: float = 1.0,
    top_p: float = 1.0,
    batch_size: int = 256,
    on_progress: Callable[[int, int], None] | None = None,
) -> list[str]:
    """Let the pivot write documents on from the openings of public ones.

    An opening is the document's first tokens, half of the pivot's context at most, without the
    bytes of a character that they cut. Texts to which the pivot added nothing but blanks, and
    texts that are there already, are dropped, and other openings drawn in their place.

    Args: share_of_document: tokens of the opening over tokens of its document, in [0, 1]; of a
        pair, drawn evenly between the two. count: texts wanted. max_new_tokens: None: what the
        context holds. on_progress: as for `complete`, anew for each time openings are drawn.
    Raises: GenerateError, also when `count` different texts do not come.
    """
    low, high = (
        share_of_document
        if isinstance(share_of_document, tuple)
        else (share_of_document, share_of_document)
    )
    if not (0 <= low <= high <= 1) or count < 1 or not any(public_documents):
        raise GenerateError(
            f"share_of_document {share_of_document}, count {count} and {len(public_documents)} "
            "documents; wanted 0 <= low <= high <= 1, a count of at least 1 and a text to open with"
        )
    table = byte_table(tokenizer, int(pivot.config.vocab_size))
    documents = [encode_text(tokenizer, text) for text in public_documents if text]
    half, rng = context_length(pivot) // 2, np.random.default_rng(seed)
    found: dict[str, None] = {}
    for again in range(ROUNDS):
        # What failed once may well fail again: later draws are wide.
        wanted = count - len(found)
        picked = _picked(rng, len(documents), 2 * wanted + 8 if again else wanted)
        shares = rng.uniform(low, high, len(picked))
        openings = [
            _utf8(table, documents[i][: min(half, round(share * len(documents[i])))], whole=True)
            for i, share in zip(picked, shares, strict=True)
        ]
        tails = complete(
            pivot,
            tokenizer,
            openings,
            max_new_tokens=max_new_tokens or context_length(pivot),
            temperature=temperature,
            top_p=top_p,
            seed=int(rng.integers(2**62)),
            batch_size=batch_size,
            keep_prompt=False,
            on_progress=on_progress,
        )
        found |= {o + t: None for o, t in zip(openings, tails, strict=True) if t.strip()}
        if len(found) >= count:
            return list(found)[:count]
    raise GenerateError(
        f"found {len(found)} different texts in {ROUNDS} draws, wanted {count}: give more public "
        "documents, a higher temperature, more new tokens or a wider share_of_document"
    )


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


def _rows(
    tokenizer: PreTrainedTokenizerFast,
    prompts: Sequence[str],
    eos: int,
    seed: int,
    most: tuple[int, int],
) -> list[_Row]:
    """Read the prompts; `most` is new tokens at most, and tokens of the context."""
    new, context = most
    rows: list[_Row] = []
    seen: Counter[str] = Counter()
    for index, prompt in enumerate(prompts):
        ids = [eos, *encode_text(tokenizer, prompt)]
        if len(ids) > context:
            raise GenerateError(
                f"prompt {index} ({prompt[:40]!r}) has {len(ids) - 1} tokens; wanted at most "
                f"{context - 1}, for the model sees {context} with the eos before it: cut it"
            )
        name = int.from_bytes(hashlib.sha256(prompt.encode()).digest()[:16])
        noise = np.random.default_rng([seed, name, seen[prompt]])
        seen[prompt] += 1
        # The last new token is not read, so one more fits than there is room for.
        rows.append(_Row(index, ids, min(new, context + 1 - len(ids)), noise))
    return rows


@torch.inference_mode()
def _write(model: PreTrainedModel, rows: list[_Row], sampling: _Sampling) -> Iterator[int]:
    """Write the rows to their ends; after each token, tell how many more are settled."""
    device, cache = next(model.parameters()).device, DynamicCache(config=model.config)
    cache.layers = [_RoomyLayer() if type(x) is DynamicLayer else x for x in cache.layers]
    width = max(len(row.ids) for row in rows)
    pad = [width - len(row.ids) for row in rows]
    ids_BT = torch.tensor(
        [[sampling.eos] * n + row.ids for n, row in zip(pad, rows, strict=True)], device=device
    )
    mask_BT = (torch.arange(width) >= torch.tensor(pad)[:, None]).long().to(device)
    position_BT = (mask_BT.cumsum(-1) - 1).clamp(min=0)
    mute_V = torch.tensor([not piece for piece in sampling.table.pieces], device=device)
    mute_V[sampling.eos] = False
    while rows:
        logits_BTV = model(
            input_ids=ids_BT,
            attention_mask=mask_BT,
            position_ids=position_BT,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits
        # Ids that write nothing (a padded vocabulary's, other specials) would be no text.
        logits_BV = logits_BTV[:, -1].float().masked_fill(mute_V, -torch.inf)
        drawn_B = _draw(logits_BV, rows, sampling)
        yield sum(_append(row, i, sampling) for row, i in zip(rows, drawn_B.tolist(), strict=True))
        alive = [at for at, row in enumerate(rows) if not row.done]
        ids_BT, position_BT = drawn_B[:, None], position_BT[:, -1:] + 1
        mask_BT = torch.nn.functional.pad(mask_BT, (0, 1), value=1)
        # Dropping rows copies the cache, so it must pay: a quarter of the batch, or all.
        if 4 * len(alive) <= 3 * len(rows) or not alive:
            rows, kept = [rows[at] for at in alive], torch.tensor(alive, device=device)
            if rows:
                cache.reorder_cache(kept)
                ids_BT, position_BT, mask_BT = ids_BT[kept], position_BT[kept], mask_BT[kept]


def _append(row: _Row, drawn: int, sampling: _Sampling) -> int:
    """Give a row its next token; returns how many of its tokens are settled by that."""
    if row.done:
        return 0
    if drawn == sampling.eos:
        row.done = True
        return row.limit - len(row.written)
    row.written.append(drawn)
    row.done = len(row.written) == row.limit
    return 1


def _draw(logits_BV: Tensor, rows: Sequence[_Row], sampling: _Sampling) -> Tensor:
    """Draw the next id of each row: the first to arrive, when ids race at their probabilities.

    Of all ways to draw, this one is changed least by a rounding of the logits.
    """
    if bool((top_B := logits_BV.amax(-1)).isfinite().logical_not().any()):
        raise GenerateError(
            f"the model's largest logits are not finite (found {float(top_B.sum())}); its training "
            "has diverged: take an earlier checkpoint, or train it with a lower lr"
        )
    if sampling.temperature == 0:
        return logits_BV.argmax(-1)
    logprobs_BV = (logits_BV / sampling.temperature).log_softmax(-1)
    if sampling.top_p < 1:
        sorted_BV, ids_BV = logprobs_BV.sort(dim=-1, descending=True, stable=True)
        before_BV = sorted_BV.double().exp().cumsum(-1) - sorted_BV.double().exp()
        logprobs_BV = logprobs_BV.masked_fill(
            torch.empty_like(ids_BV, dtype=torch.bool).scatter_(
                -1, ids_BV, before_BV >= sampling.top_p
            ),
            -torch.inf,
        )
    # Drawn in 64 bits: an arrival of 0, which 32 bits know, would let an id win that hardly can.
    wait_BV = np.stack([row.noise.standard_exponential(logits_BV.shape[1]) for row in rows])
    log_wait_BV = torch.from_numpy(np.log(wait_BV).astype(np.float32)).to(logits_BV.device)
    return (logprobs_BV - log_wait_BV).argmax(-1)


def _utf8(table: ByteTable, ids: Sequence[int], *, whole: bool) -> str:
    """Read ids as text as far as they are UTF-8; whole: they begin a document."""
    data = b"".join(table.pieces[i] for i in ids)
    if whole:
        data = data.removeprefix(table.prefix)
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        return data[: error.start].decode()


def _picked(rng: np.random.Generator, documents: int, count: int) -> list[int]:
    """Pick documents: each once before any is picked again."""
    epochs = -(-count // documents)
    order = np.concatenate([rng.permutation(documents) for _ in range(epochs)])
    return [int(i) for i in order[:count]]
