"""Text out of a model: batched sampling, and the prompt set of an on-policy round.

A model reads eos and then the document; a completion ends at eos or at its limit. In an
on-policy round the experts judge what the pivot itself writes on from public openings, so that
it is corrected where it goes and not only where the public text goes.
Source: on-policy distillation, GKD (arXiv 2306.13649); across tokenizers, SimCT (arXiv 2605.07711).
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Final

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from fusion.byte_tables import ByteTable, byte_table, encode_text
from fusion.models import context_length, eos_id
from fusion.sampling import GenerateError as GenerateError
from fusion.sampling import Row, Sampling, write

ROUNDS: Final = 8
"""How often openings are drawn anew for completions that were empty or there already."""


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
    # Ids that write nothing (a padded vocabulary's, other specials) would be no text.
    mute = tuple(i for i, piece in enumerate(table.pieces) if not piece and i != eos)
    sampling = Sampling(temperature=temperature, top_p=top_p, ends=frozenset({eos}), mute=mute)
    rows = _rows(tokenizer, prompts, eos, seed, (max_new_tokens, context_length(model)))
    # Rows of like length side by side: less padding to compute.
    order = sorted(rows, key=lambda row: (len(row.ids), row.index))
    total, was_training, told = sum(row.limit for row in rows), model.training, 0
    model.eval()
    try:
        for first in range(0, len(order), batch_size):
            for tokens in write(model, order[first : first + batch_size], sampling):
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


def _rows(
    tokenizer: PreTrainedTokenizerFast,
    prompts: Sequence[str],
    eos: int,
    seed: int,
    most: tuple[int, int],
) -> list[Row]:
    """Read the prompts; `most` is new tokens at most, and tokens of the context."""
    new, context = most
    rows: list[Row] = []
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
        rows.append(Row(index, ids, min(new, context + 1 - len(ids)), noise))
    return rows


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
