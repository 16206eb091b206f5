"""Shipping only where it helps: the positions at which the expert beats the pivot.

A participant holds the pivot and runs it on the prompts itself. The text's own log-probabilities
are shipped for every position (routing and ALM need them, a byte each); the rows of ids, which
cost the most, only where the expert's log-likelihood of the chunk that starts there is above the
pivot's by a margin, and only for so many positions. Shapes: P = positions of the expert.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from fusion.align import align, loglik
from fusion.contribution import LOGPROB_FLOOR, LogitContribution


@dataclass(frozen=True, slots=True)
class Budget:
    """How many positions may ship their row of ids, and by how much they must beat the pivot."""

    share: float
    """Of all positions, in (0, 1]."""
    margin_nats: float = 0.0
    """Only positions whose chunk is likelier than the pivot says by more than this."""

    def __post_init__(self) -> None:
        """Refuse numbers that cannot be meant."""
        if not (0 < self.share <= 1 and np.isfinite(self.margin_nats)):
            raise ValueError(
                f"share {self.share} must be in (0, 1] and margin_nats {self.margin_nats} finite"
            )


def gains(expert: LogitContribution, pivot: LogitContribution) -> NDArray[np.float32]:
    """Return [P] by how many nats the expert finds the chunk that starts at a row likelier.

    A row at which the pivot has not read exactly the same bytes starts no chunk: -inf.
    Raises: ValueError when the two are not of the same documents.
    """
    places = align(expert, pivot)
    found = np.full(expert.header.positions, -np.inf, np.float32)
    mine = loglik(expert, places.student_rows, places.student_ends)
    found[places.student_rows] = mine - loglik(pivot, places.teacher_rows, places.teacher_ends)
    return found


def choose(gain_P: NDArray[np.float32], budget: Budget) -> NDArray[np.bool_]:
    """Return [P] which positions ship: those above the margin, best first, within the share.

    Of equal ones the earlier ship.
    """
    wanted = gain_P > budget.margin_nats
    room = int(budget.share * len(gain_P))
    if int(wanted.sum()) <= room:
        return np.asarray(wanted)
    if room == 0:
        return np.zeros_like(wanted)
    last = np.partition(gain_P, len(gain_P) - room)[len(gain_P) - room]
    chosen = gain_P > last
    chosen[np.flatnonzero(gain_P == last)[: room - int(chosen.sum())]] = True
    return np.asarray(chosen)


def keep(
    contribution: LogitContribution, chosen: NDArray[np.bool_], pivot_sha256: str
) -> LogitContribution:
    """Leave out the rows of ids that were not chosen; their mass is all in the tail."""
    c = contribution
    header = replace(c.header, shipped=int(chosen.sum()), pivot_sha256=pivot_sha256)
    return replace(
        c,
        header=header,
        topk_ids=np.where(chosen[:, None], c.topk_ids, np.int32(-1)),
        topk_logprobs=np.where(chosen[:, None], c.topk_logprobs, np.float32(LOGPROB_FLOOR)),
        tail_logprob=np.where(chosen, c.tail_logprob, np.float32(0)),
    )
