"""Public prompts that end one beginning in different ways: count each ending as experts would.

What an expert says behind an ending that it does not believe in is no knowledge, and of n
alternatives it is most of what there is to read. Weighed by the experts' own belief, the loss is
the divergence of whole endings, estimated on those that the public knows:

    sum over endings e of q(e | beginning) sum over tokens of KL(q || pivot)

with q the routed mixture, made to sum to 1 over the alternatives. No answer is needed for it.
Shapes: P = rows of the pivot's stream, C = kept ids, D = documents.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

LEAST: Final = 1e-6
"""The probability of a token that the mixture does not name."""


def ending_factors(
    stream: NDArray[np.integer[Any]],
    alternatives_D: Sequence[int],
    ids_PC: NDArray[np.int32],
    probs_PC: NDArray[np.float32],
    weight_P: NDArray[np.float32],
) -> NDArray[np.float32]:
    """Return [P] what to multiply each row's weight with: 1 up to where alternatives part.

    Behind that an ending counts n times its share of belief, so that n even ones count as before.
    Args: stream: [P + 1] eos, then the documents, each with eos. alternatives_D: of each document
        the number of its beginning; below 0, it has no alternative. ids_PC, probs_PC, weight_P:
        as from fusion.targets.span_targets.
    Raises: ValueError when there is not one number for each document.
    """
    offsets = np.flatnonzero(stream == stream[0])
    if len(alternatives_D) != len(offsets) - 1:
        raise ValueError(
            f"alternatives has {len(alternatives_D)} numbers for {len(offsets) - 1} prompts"
        )
    together = defaultdict[int, list[int]](list)
    for document, number in enumerate(alternatives_D):
        if number >= 0:
            together[number].append(document)
    factor_P = np.ones(len(weight_P), np.float32)
    for members in together.values():
        rows = [slice(int(offsets[d]), int(offsets[d + 1])) for d in members]
        tokens = [stream[1:][each] for each in rows]
        common = _common([text.tolist() for text in tokens])
        nats = np.array(
            [
                _nats(text, ids_PC[each], probs_PC[each], weight_P[each])[common:].sum()
                for text, each in zip(tokens, rows, strict=True)
            ]
        )
        believed = np.exp(nats - nats.max())
        for each, share in zip(rows, believed / believed.sum(), strict=True):
            factor_P[each][common + 1 :] = len(members) * share
    return factor_P


def _nats(
    tokens: NDArray[np.integer[Any]],
    ids_PC: NDArray[np.int32],
    probs_PC: NDArray[np.float32],
    weight_P: NDArray[np.float32],
) -> NDArray[np.float64]:
    """Return [P] what the mixture thinks of the text's own tokens, of one document."""
    own_P = (probs_PC * (ids_PC == tokens[:, None])).sum(axis=1, dtype=np.float64)
    # Inside a chunk of the teacher's the first row says it all, and the others nothing.
    return np.where(weight_P > 0, np.log(np.maximum(own_P, LEAST)), 0.0)


def _common(texts: Sequence[Sequence[int]]) -> int:
    """Return how many tokens all of the texts begin with."""
    # Of a sorted list the first and the last are the least alike.
    pairs = zip(min(texts), max(texts), strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(map(len, texts)))
