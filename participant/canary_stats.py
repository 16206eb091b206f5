"""How well scores tell planted records from held-out ones, with 95 % intervals.

Shapes: N = planted records, M = held-out ones.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Final

import numpy as np
from numpy.typing import NDArray

FALSE_ALARMS: Final = 0.01
"""Of the held-out records, in the second measure."""
_Z: Final = 1.959964
"""Of 95 %, both sides."""
_HALVINGS: Final = 50


@dataclass(frozen=True, slots=True, kw_only=True)
class Exposure:
    """What one way of scoring tells; `low` and `high` are ends of 95 % intervals."""

    planted: int
    held_out: int
    auc: float
    """How often a planted record scores above a held-out one; 0.5: nothing is told."""
    auc_low: float
    auc_high: float
    tpr: float
    """The share of planted records that are found at one false alarm in a hundred; 0.01: none."""
    tpr_low: float
    tpr_high: float
    bits: float
    """Mean exposure log2(M + 1) - log2(rank) of The Secret Sharer (arXiv 1802.08232); about 1.44
    where nothing is told."""


def exposure(planted_N: NDArray[np.float64], held_out_M: NDArray[np.float64]) -> Exposure:
    """Compare the scores of both kinds; the larger one is, the more a record looks known.

    Raises: ValueError when a score is not finite or a kind is empty.
    """
    scores = np.concatenate([planted_N, held_out_M])
    if not len(planted_N) or not len(held_out_M) or not np.isfinite(scores).all():
        raise ValueError("scores of both kinds are wanted, all finite: the model may have diverged")
    above_N, below_M = _placements(planted_N, held_out_M)
    auc = float(above_N.mean())
    # DeLong's variance of the area, from both samples' placements; of a few records it may come out
    # far too small, so it is never below that of scores which tell nothing.
    n, m = len(planted_N), len(held_out_M)
    measured = _variance(above_N) / n + _variance(below_M) / m
    spread = float(np.sqrt(max(measured, (1 / n + 1 / m) / 12)))
    allowed = int(FALSE_ALARMS * len(held_out_M))
    found = int((planted_N > np.sort(held_out_M)[::-1][allowed]).sum())
    low, high = share_interval(found, len(planted_N))
    rank_N = 1 + (held_out_M[None, :] >= planted_N[:, None]).sum(axis=1)
    return Exposure(
        planted=len(planted_N),
        held_out=len(held_out_M),
        auc=auc,
        auc_low=max(0.0, auc - _Z * spread),
        auc_high=min(1.0, auc + _Z * spread),
        tpr=found / len(planted_N),
        tpr_low=low,
        tpr_high=high,
        bits=float(np.mean(np.log2(len(held_out_M) + 1) - np.log2(rank_N))),
    )


@cache
def share_interval(found: int, of: int) -> tuple[float, float]:
    """Return an interval that holds a share in 95 % of cases or more, however few they are.

    Source: the exact interval of Clopper and Pearson (1934).
    """

    def edge(inside: Callable[[float], bool]) -> float:
        low, high = 0.0, 1.0
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            low, high = (middle, high) if inside(middle) else (low, middle)
        return low

    low = edge(lambda share: _at_least(found, of, share) < 0.025) if found else 0.0
    high = edge(lambda share: 1 - _at_least(found + 1, of, share) > 0.025) if found < of else 1.0
    return low, high


def _at_least(found: int, of: int, share: float) -> float:
    """The chance to find so many or more when each is found with the chance `share`."""
    return math.fsum(
        math.comb(of, n) * share**n * (1 - share) ** (of - n) for n in range(found, of + 1)
    )


def _placements(
    planted_N: NDArray[np.float64], held_out_M: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """For each planted one the share of held-out ones below it; for each held-out one, above."""
    wins_NM = (planted_N[:, None] > held_out_M) + 0.5 * (planted_N[:, None] == held_out_M)
    return wins_NM.mean(axis=1), wins_NM.mean(axis=0)


def _variance(values: NDArray[np.float64]) -> float:
    return float(values.var(ddof=1)) if len(values) > 1 else 0.25
