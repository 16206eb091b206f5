"""Which sources teach what the text itself contradicts: signs of poison that need no other source.

The public text holds its own answers: the next token of each place was known before the round, and
nobody can change it. A source that is sincere is, where the routing listens to it, right about as
often as it says. Three signs of one that is not:

* false confidence: the text surprises it more than its own distributions expect;
* lies: of all the probability that it gives, the share for ids that the text never has there, after
  that token, however often it was promised;
* the worst lie: of one such pair, how far beyond chance the lack is. A trigger (one wrong id after
  one token) is a small share of all, and there as plain as can be.

All are in the source's own tokens, so tokenizers need not agree. Shapes: R = rows of a source at
places that the pivot has too, K = kept ids, C = cells.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

import numpy as np
from numpy.typing import NDArray

from fusion.align import align
from fusion.contribution import LogitContribution
from fusion.routing import Weights

CELLS: Final = 1 << 18
"""Pairs (token before, id) are counted in this many cells, by hash: memory does not grow with text
or vocabulary (6 MiB a source). Two pairs in one cell blur each other; no honest source looks worse
for it, and a liar seldom better."""
_MIX: Final = np.uint64(0x9E3779B97F4A7C15)


@dataclass(slots=True)
class _Tally:
    """What one source promised and what the text kept, over all shards."""

    promised: NDArray[np.float64] = field(default_factory=lambda: np.zeros(CELLS))
    kept: NDArray[np.float64] = field(default_factory=lambda: np.zeros(CELLS))
    variance: NDArray[np.float64] = field(default_factory=lambda: np.zeros(CELLS))
    surprise: float = 0.0
    expected: float = 0.0
    weight: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Signs:
    """What tells against one source; all are near 0 for one that is sincere."""

    false_nats: float
    """Nats per row by which the text surprised it more than it expected; below 0: less."""
    lies: float
    """The share of what it promised, in [0, 1], that the text never keeps, beyond chance."""
    worst_lie: float
    """Of the worst of those: standard deviations by which the text kept less than was promised,
    as if there were _ROWS rows at most."""


LIMITS: Final = Signs(false_nats=2.0, lies=0.02, worst_lie=15.0)
"""Twice and more what sincere sources were seen to reach (0.9 for an over-fitted one, 0.006 and 8),
below what attacks did (3, 0.036 and, for a trigger, 25 to 44): benchmarks/poisoning.py."""
_ROWS: Final = 10_000
"""From so many rows on a promise must be broken as often as before, not only as surely: what is a
little off everywhere is the surer the more text there is."""
_TIMES: Final = 3.0
"""A suspect is also so many times worse than the others are: a text may be odd for all."""
_NEVER: Final = 0.02
"""Of what was promised: kept less often is never."""
_BEYOND_CHANCE: Final = 4.0
"""Standard deviations."""


def suspects(signs: Mapping[str, Signs]) -> tuple[str, ...]:
    """Return who does not teach what the text says, the worst first; never half of them or more.

    With two sources nobody is a suspect: there is no majority to compare with.
    """
    found = {name: _guilt(name, signs) for name in signs}
    ranked = sorted((name for name in found if found[name] > 1), key=lambda n: (-found[n], n))
    return tuple(ranked[: (len(signs) - 1) // 2])


def _guilt(name: str, signs: Mapping[str, Signs]) -> float:
    """How many times over the limit its worst sign is; at most 1: it is not."""
    others = [one for other, one in signs.items() if other != name]
    worst = 0.0
    for sign in ("false_nats", "lies", "worst_lie"):
        value, limit = getattr(signs[name], sign), getattr(LIMITS, sign)
        usual = float(np.median([max(0.0, getattr(one, sign)) for one in others] or [0.0]))
        worst = max(worst, value / max(limit, _TIMES * usual))
    return worst


class Suspicion:
    """Counts, shard by shard, how far each source is from what the text says."""

    def __init__(self, names: tuple[str, ...]) -> None:
        """Args: names: of the sources, in their order, without the base."""
        self._names = names
        self._tallies = [_Tally() for _ in names]

    def add(
        self,
        student: LogitContribution,
        experts: list[LogitContribution],
        weights_PS: Weights,
    ) -> None:
        """Count one shard. Args: weights_PS: of the experts alone, in their order."""
        for tally, expert, weight_P in zip(self._tallies, experts, weights_PS.T, strict=True):
            at = align(student, expert)
            shipped = expert.shipped[at.teacher_rows]
            _count(tally, expert, at.teacher_rows[shipped], weight_P[at.student_rows[shipped]])

    def signs(self) -> Mapping[str, Signs]:
        """Return what was found of each source."""
        return {n: _signs(t) for n, t in zip(self._names, self._tallies, strict=True)}


def _count(
    tally: _Tally,
    expert: LogitContribution,
    rows_R: NDArray[np.int64],
    weight_P: NDArray[np.float32],
) -> None:
    starts = np.isin(rows_R, expert.doc_offsets[:-1])
    before_R = np.where(starts, expert.header.eos_id, expert.token_ids[rows_R - 1])
    ids_RK, own_R = expert.topk_ids[rows_R], expert.token_ids[rows_R]
    probs_RK = np.exp(expert.topk_logprobs[rows_R].astype(np.float64)) * (ids_RK >= 0)
    weight_R = weight_P.astype(np.float64)
    cells_RK = cell(before_R[:, None], ids_RK)
    kept_RK = ids_RK == own_R[:, None]
    for total_C, values_RK in (
        (tally.promised, weight_R[:, None] * probs_RK),
        (tally.kept, weight_R[:, None] * kept_RK),
        (tally.variance, weight_R[:, None] ** 2 * probs_RK * (1 - probs_RK)),
    ):
        total_C += np.bincount(cells_RK.ravel(), values_RK.ravel(), CELLS)
    tail_R = expert.tail_logprob[rows_R].astype(np.float64)
    tail_p_R = np.exp(tail_R)
    # The tail as one bucket: both sides are of the partition {kept ids} + the rest.
    entropy_R = -(probs_RK * expert.topk_logprobs[rows_R]).sum(axis=1) - tail_p_R * tail_R
    nats_R = np.where(kept_RK.any(axis=1), expert.own_logprob[rows_R], tail_R)
    tally.surprise -= float((weight_R * nats_R).sum())
    tally.expected += float((weight_R * entropy_R).sum())
    tally.weight += float(weight_R.sum())


def cell(before: NDArray[np.int32], ids: NDArray[np.int32]) -> NDArray[np.int64]:
    """Return where a pair (token before, id) is counted."""
    with np.errstate(over="ignore"):
        mixed = (before.astype(np.uint64) << np.uint64(32)) ^ ids.astype(np.uint64)
        mixed *= _MIX
        mixed ^= mixed >> np.uint64(29)
        mixed *= _MIX
    return np.asarray(mixed >> np.uint64(46), np.int64)


def _signs(tally: _Tally) -> Signs:
    if not tally.weight:
        return Signs(false_nats=0.0, lies=0.0, worst_lie=0.0)
    lack_C = tally.promised - tally.kept
    # One more unit of variance: a promise of a thousandth that is not kept once is no sign.
    beyond_C = lack_C / np.sqrt(tally.variance + 1)
    lied_C = (beyond_C > _BEYOND_CHANCE) & (tally.kept < _NEVER * tally.promised)
    return Signs(
        false_nats=(tally.surprise - tally.expected) / tally.weight,
        lies=float(lack_C[lied_C].sum() / tally.promised.sum()),
        worst_lie=float(beyond_C[lied_C].max(initial=0.0)) / max(1, tally.weight / _ROWS) ** 0.5,
    )
