"""Whom to listen to at each place: weights over the candidates, summing to 1 (or 0, see below).

A candidate is the base pivot (always the first) or an expert. Every route is a function of one
shard of documents; what needs the whole prompt set (a source's total share) is scaled afterwards.
Shapes: P = rows of the student, S = candidates, D = documents, L = rows of the longest document.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Final

import numpy as np
from numpy.typing import NDArray

from fusion.align import row_starts
from fusion.contribution import LogitContribution
from fusion.settings import FusionSettings

Weights = NDArray[np.float32]
CLAIMED: Final = frozenset({"posterior", "document"})
"""Routings that go by what the sources say of themselves."""
EVEN_SHARES: Final = 1.5
"""How many even shares of such a routing one source may have: a choice that leaves room for prompts
of which half are about one source's subject. What it costs: benchmarks/fusion_hostile.py."""
_SLACK: Final = 1e-3


def route(
    student: LogitContribution, candidates: Sequence[LogitContribution], settings: FusionSettings
) -> Weights:
    """Return [P, S]: the weights that the settings ask for, gated and capped by position.

    Args: candidates: the base pivot, then the experts.
    """
    weights_PS = ROUTES[settings.routing](student, candidates, settings)
    if settings.gate_nats is not None:
        evidence_PS = evidence(student, candidates, settings.decay)
        weights_PS = gate(weights_PS, evidence_PS, settings.gate_nats)
    return cap_weights(weights_PS, settings.max_weight)


def prefix_loglik(student: LogitContribution, candidate: LogitContribution) -> NDArray[np.float64]:
    """Return [P] nats: how likely the candidate found its document up to each student row.

    A candidate's token counts once it lies wholly before the row, never earlier: a token of the
    candidate's that is read only in part would tell of text that the row has not seen.
    """
    read = np.searchsorted(row_starts(candidate), row_starts(student), side="right") - 1
    before = np.concatenate([[0.0], np.cumsum(candidate.own_logprob.astype(np.float64))])
    at_doc = np.repeat(before[candidate.doc_offsets[:-1]], np.diff(student.doc_offsets))
    return np.asarray(before[read] - at_doc, dtype=np.float64)


def evidence(
    student: LogitContribution, candidates: Sequence[LogitContribution], decay: float
) -> NDArray[np.float64]:
    """Return [P, S] nats: each candidate's log-likelihood of the document so far, no look-ahead.

    Sums fade by `decay` per student token, in (0, 1]; 1 never forgets.
    """
    seen_PS = np.stack([prefix_loglik(student, c) for c in candidates], axis=1)
    counts = np.diff(student.doc_offsets)
    rows_D, score_DS = student.doc_offsets[:-1], np.zeros((len(counts), len(candidates)))
    score_PS = np.zeros_like(seen_PS)
    for step in range(1, int(counts.max())):
        alive = counts > step
        rows = rows_D[alive] + step
        score_DS[alive] = decay * score_DS[alive] + seen_PS[rows] - seen_PS[rows - 1]
        score_PS[rows] = score_DS[alive]
    return score_PS


def posterior_weights(
    student: LogitContribution, candidates: Sequence[LogitContribution], settings: FusionSettings
) -> Weights:
    """The posterior of each candidate given the document so far: softmax of prior + evidence."""
    score_PS = evidence(student, candidates, settings.decay) + _log_prior(len(candidates), settings)
    return _softmax(score_PS / settings.temperature)


def document_weights(
    student: LogitContribution, candidates: Sequence[LogitContribution], settings: FusionSettings
) -> Weights:
    """All of a document to the candidate that finds it likeliest as a whole, the base included.

    FuseLLM's MinCE (arXiv 2401.10491), per document and in nats of the same bytes, so that
    tokenizers compare. The first of equals wins.
    """
    totals_DS = np.stack(
        [np.add.reduceat(c.own_logprob.astype(np.float64), c.doc_offsets[:-1]) for c in candidates],
        axis=1,
    )
    best_D = (totals_DS + _log_prior(len(candidates), settings)).argmax(axis=1)
    chosen_DS = np.eye(len(candidates), dtype=np.float32)[best_D]
    return np.repeat(chosen_DS, np.diff(student.doc_offsets), axis=0)


def static_weights(
    student: LogitContribution, candidates: Sequence[LogitContribution], settings: FusionSettings
) -> Weights:
    """The prior at every position, whatever the text: trust that an operator gives by hand."""
    weights_S = _softmax(_log_prior(len(candidates), settings))
    return np.tile(weights_S, (student.header.positions, 1)).astype(np.float32)


def uniform_weights(
    student: LogitContribution, candidates: Sequence[LogitContribution], settings: FusionSettings
) -> Weights:
    """Every expert alike at every place, the base pivot never."""
    weights_PS = np.full(
        (student.header.positions, len(candidates)), 1 / (len(candidates) - 1), np.float32
    )
    weights_PS[:, 0] = 0.0
    return weights_PS


Route = Callable[[LogitContribution, Sequence[LogitContribution], FusionSettings], Weights]
ROUTES: Final[Mapping[str, Route]] = MappingProxyType(
    {
        "posterior": posterior_weights,
        "document": document_weights,
        "static": static_weights,
        "uniform": uniform_weights,
    }
)


def gate(weights_PS: Weights, evidence_PS: NDArray[np.float64], margin_nats: float) -> Weights:
    """Do no harm: silence an expert wherever it has read the text so far worse than the base.

    Its weight goes to the base. Args: margin_nats: how much worse it may be.
    """
    silent_PS = evidence_PS < evidence_PS[:, :1] - margin_nats
    kept_PS = np.where(silent_PS, 0, weights_PS)
    kept_PS[:, 0] += weights_PS.sum(axis=1) - kept_PS.sum(axis=1)
    return kept_PS.astype(np.float32)


def cap_weights(weights_PS: Weights, most: float) -> Weights:
    """Let no expert have more than `most` at any position; the base takes what is left over."""
    capped_PS = weights_PS.copy()
    capped_PS[:, 1:] = np.minimum(weights_PS[:, 1:], np.float32(most))
    capped_PS[:, 0] += (weights_PS - capped_PS).sum(axis=1)
    return capped_PS


def without_base(weights_PS: Weights, written_P: NDArray[np.bool_]) -> Weights:
    """Hand the base's weight to the experts at rows of documents that it wrote itself.

    There its own likelihood is the highest by construction and tells nothing: it would be asked to
    judge its own text. Experts keep their odds; where none has any weight all have the same.
    """
    experts_PS = weights_PS[:, 1:].astype(np.float64) + 1e-9
    experts_PS *= weights_PS.sum(axis=1, keepdims=True) / experts_PS.sum(axis=1, keepdims=True)
    handed_PS = np.concatenate([np.zeros((len(weights_PS), 1)), experts_PS], axis=1)
    return np.asarray(np.where(written_P[:, None], handed_PS, weights_PS), np.float32)


def most_of_all(settings: FusionSettings, sources: int) -> float:
    """Return the most that one of so many sources may have of the whole prompt set."""
    if settings.max_share is not None:
        return settings.max_share
    return min(1.0, EVEN_SHARES / sources) if settings.routing in CLAIMED else 1.0


def share_factors(shares_S: NDArray[np.float64], most: float) -> NDArray[np.float64]:
    """Return [S-1] what to multiply each expert's weights by to bring its share to `most`.

    Above 1 for an expert that has room, so that scale_experts knows who may take what others lose.
    Args: shares_S: mean weight of each candidate over the whole prompt set, the base first.
    """
    return np.asarray(most / np.maximum(shares_S[1:], 1e-12))


def over(factors: NDArray[np.float64]) -> bool:
    """Whether any expert has more than its share."""
    return bool((factors < 1 - _SLACK).any())


def scale_experts(weights_PS: Weights, factors: NDArray[np.float64]) -> Weights:
    """Scale down the experts over their share; the others have what they lose, by their odds.

    Experts at their share already take nothing. Where nobody else has any weight the base takes
    it. Rows keep their sums.
    """
    scaled_PS = weights_PS.astype(np.float64)
    scaled_PS[:, 1:] *= np.minimum(factors, 1)
    lost_P1 = np.maximum(
        weights_PS.sum(axis=1, keepdims=True) - scaled_PS.sum(axis=1, keepdims=True), 0
    )
    open_PS = scaled_PS * np.concatenate([[1.0], factors > 1 + _SLACK])
    # Who claims to know every word leaves the others next to nothing; among them it still tells.
    open_PS[:, 0] += np.finfo(np.float64).tiny
    scaled_PS += lost_P1 * (open_PS / open_PS.sum(axis=1, keepdims=True))
    return scaled_PS.astype(np.float32)


def _log_prior(candidates: int, settings: FusionSettings) -> NDArray[np.float64]:
    if settings.prior is None:
        return np.zeros(candidates)
    if len(settings.prior) != candidates:
        raise ValueError(
            f"the routing prior has {len(settings.prior)} weights, wanted {candidates}: one for "
            "the base pivot, then one for each source in the order of their names"
        )
    return np.log(np.asarray(settings.prior, dtype=np.float64))


def _softmax(scores: NDArray[np.float64]) -> Weights:
    powers = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return np.asarray(powers / powers.sum(axis=-1, keepdims=True), np.float32)
