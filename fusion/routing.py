"""Whom to listen to at each place: weights over the candidates, summing to at most 1.

A candidate is the base pivot (always the first) or an expert. Shapes: P = rows of the student,
S = candidates, D = documents, L = rows of the longest document.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from fusion.align import row_starts
from fusion.codec import LogitContribution


def prefix_loglik(student: LogitContribution, candidate: LogitContribution) -> NDArray[np.float64]:
    """Return [P] nats: how likely the candidate found its document up to each student row.

    A candidate's token counts once it lies wholly before the row, never earlier: a token of the
    candidate's that is read only in part would tell of text that the row has not seen.
    """
    read = np.searchsorted(row_starts(candidate), row_starts(student), side="right") - 1
    before = np.concatenate([[0.0], np.cumsum(candidate.own_logprob.astype(np.float64))])
    at_doc = np.repeat(before[candidate.doc_offsets[:-1]], np.diff(student.doc_offsets))
    return np.asarray(before[read] - at_doc, dtype=np.float64)


def posterior_weights(
    student: LogitContribution,
    candidates: Sequence[LogitContribution],
    *,
    decay: float = 0.9,
    temperature: float = 1.0,
) -> NDArray[np.float32]:
    """Return [P, S]: the posterior of each candidate given the document so far, no look-ahead.

    Log-likelihoods are summed with a decay per student token, so that old text fades; softmax
    over candidates under an even prior. Rows sum to 1.
    Args: decay: in (0, 1]; 1 never forgets. temperature: above 0; more is flatter.
    """
    if not (0 < decay <= 1 and temperature > 0):
        raise ValueError(
            f"decay {decay} is not in (0, 1], or temperature {temperature} not above 0"
        )
    seen_PS = np.stack([prefix_loglik(student, c) for c in candidates], axis=1)
    counts = np.diff(student.doc_offsets)
    rows_D, score_DS = student.doc_offsets[:-1], np.zeros((len(counts), len(candidates)))
    score_PS = np.zeros_like(seen_PS)
    for step in range(1, int(counts.max())):
        alive = counts > step
        rows = rows_D[alive] + step
        score_DS[alive] = decay * score_DS[alive] + seen_PS[rows] - seen_PS[rows - 1]
        score_PS[rows] = score_DS[alive]
    score_PS = score_PS / temperature
    score_PS -= score_PS.max(axis=1, keepdims=True)
    weights_PS = np.exp(score_PS)
    return np.asarray(weights_PS / weights_PS.sum(axis=1, keepdims=True), dtype=np.float32)


def uniform_weights(rows: int, candidates: int) -> NDArray[np.float32]:
    """Return [P, S]: every expert alike at every place, the base pivot never."""
    weights_PS = np.full((rows, candidates), 1.0 / (candidates - 1), dtype=np.float32)
    weights_PS[:, 0] = 0.0
    return weights_PS
