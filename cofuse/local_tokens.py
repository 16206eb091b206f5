"""Where the tokenizers of a local fusion cut the prompt set, and how often they agree.

Shapes: P = positions of one document (tokens, its eos last), K = kept ids.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerFast

from cofuse.local_models import LocalInputError, Model
from fusion import packing
from fusion.byte_tables import TokenizerError, byte_table, encode

Starts = list[NDArray[np.int64]]
"""By document, [P] bytes of it read before each position; eos is predicted after all of them."""


def cut(key: str, model: Model, prompts: Sequence[str]) -> Starts:
    """Where a model's tokenizer cuts each document.

    Args: key: what the spec calls the model.
    Raises: LocalInputError when it does not give the text back byte by byte, or has no eos.
    """
    try:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(model.folder, local_files_only=True)
        if tokenizer.eos_token_id is None:
            raise TokenizerError("the tokenizer has no eos token; set one: documents end in it")
        table = byte_table(tokenizer, model.vocabulary)
        lengths = np.asarray([len(piece) for piece in table.pieces])
        starts = []
        for prompt in prompts:
            ends = np.cumsum(lengths[encode(tokenizer, table, prompt)]) - len(table.prefix)
            starts.append(np.concatenate([[0], np.maximum(ends, 0)]).astype(np.int64))
    except (TokenizerError, OSError, ValueError) as error:
        raise LocalInputError(f"{key}: {model.folder}: {error}") from error
    return starts


def shared_places(pivot: Starts, source: Starts) -> tuple[float, float]:
    """Compare where two tokenizers cut the same documents.

    Returns: the shares of the pivot's positions at which the source has read the same bytes, and
        at which it reads the same bytes next as well; the second is at most the first.
    """
    common = same = total = 0
    for ours, theirs in zip(pivot, source, strict=True):
        at = np.minimum(np.searchsorted(theirs, ours), len(theirs) - 1)
        meets = theirs[at] == ours
        # The end of the eos row, one past the text, is common to all.
        ends, their_ends = (np.append(x[1:], x[-1] + 1) for x in (ours, theirs))
        common += int(meets.sum())
        same += int((meets & (their_ends[at] == ends)).sum())
        total += len(ours)
    return common / total, same / total


def row_bytes(top_k: int, vocabulary: int) -> int:
    """Bytes of one position in a contribution file (fusion/codec.py).

    Packed ids, and a byte each for their K codes, the tail, the text's own token and its length.
    """
    return packing.row_bytes(top_k, packing.bits_for(vocabulary)) + top_k + 3
