"""Pairs of answers as a tokenizer cuts them: rows of ids, and which pairs a pivot can learn from.

Neither torch nor transformers is imported.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fusion.byte_tables import TokenizerError, encode_text, eos_id
from fusion.pair_file import PairFile, PreferenceError, PreferencePair, read_pairs

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def encoded(
    tokenizer: PreTrainedTokenizerFast, pairs: Sequence[PreferencePair]
) -> tuple[list[tuple[list[int], list[int]]], list[int]]:
    """Ids of chosen and rejected of each pair, and how many come before the response.

    Prompt and response are cut apart: else a token might lie across, and belong to neither.
    Raises: PreferenceError when there is no pair; TokenizerError when ids would not spell a text.
    """
    if not pairs:
        raise PreferenceError("there are no pairs: give at least one")
    eos, rows, prompts = eos_id(tokenizer), [], []
    for pair in pairs:
        before = [eos, *encode_text(tokenizer, pair.prompt)]
        chosen, rejected = (
            [*before, *encode_text(tokenizer, text, prefixed=not pair.prompt), eos]
            for text in (pair.chosen, pair.rejected)
        )
        rows.append((chosen, rejected))
        prompts.append(len(before))
    return rows, prompts


def answer_tokens(
    tokenizer: PreTrainedTokenizerFast, pairs: Sequence[PreferencePair]
) -> list[tuple[int, int]]:
    """Tokens of chosen and rejected of each pair, the end of each among them. Raises: as encoded.

    What is told of an answer is told of each of these.
    """
    rows, prompts = encoded(tokenizer, pairs)
    return [
        (len(chosen) - start, len(rejected) - start)
        for (chosen, rejected), start in zip(rows, prompts, strict=True)
    ]


def readable(
    path: Path, tokenizer: PreTrainedTokenizerFast, context: int | None
) -> tuple[PairFile, list[bool]]:
    """Read the pairs that a pivot can learn from, and which pairs of the file these are.

    Args: tokenizer, context: the pivot's; pairs longer than its context (tokens) are left out.
        None: it does not tell.
    Raises: PreferenceError when none is left.
    """
    whole, faults = read_pairs(path), dict[int, str]()
    eos_id(tokenizer)  # without one no pair can be read, and that is no fault of the pairs
    for place, pair in enumerate(whole.pairs):
        try:
            rows, _ = encoded(tokenizer, [pair])
        except TokenizerError:
            faults[place] = "not given back by the pivot's tokenizer"
            continue
        if context is not None and max(map(len, rows[0])) - 1 > context:
            faults[place] = "longer than the pivot can see at once"
    file = whole.without(faults)
    file.require_some(path)
    return file, [place not in faults for place in range(len(whole.pairs))]
