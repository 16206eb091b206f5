"""What the sources of a preference fusion make of the pivot's view: the reference it is held to.

Each source moves it by how far it is from the pivot at an answer; what of that counts is decided
here, once, for the run and for the credit. Shapes: N = pairs, S = sources; 2 = chosen, rejected.
Source: InfiFPO (arXiv 2505.13878): probability clipping, max-margin fusion.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Literal

import torch
from torch import Tensor

from fusion.pair_scores import PairScores
from fusion.pair_scoring import Length, divided

Fusion = Literal["mean", "max_margin"]
LOUDEST: Final = 2.0
"""How many times as far from the pivot as the median source one source may be, in the mean over all
answers. Lies are cheap and can be as large as one likes; this makes the largest cost no more than
an expert that knows twice as much. Sources of which one is right and two lie cannot be helped."""
_ENOUGH: Final = 3
"""Of fewer sources nobody can say which is the loud one."""


@dataclass(frozen=True, slots=True)
class Moved:
    """What the sources say, seen from the pivot."""

    pivot: Tensor
    """[2, N] its logs, divided by a length; of the better answer first, as those of `gap`."""
    gap: Tensor
    """[S, 2, N] how far each source is above the pivot; below 0: under it."""
    swapped: Tensor
    """[N] where the better answer is the one that the file calls rejected."""
    turned: Tensor
    """[S] what each source's distances were multiplied with, in (0, 1]; 1: left as they came."""


def move(
    pivot: PairScores,
    scores: Mapping[str, PairScores],
    *,
    length: Length,
    judge: Literal["given", "experts"],
) -> Moved:
    """Hold the sources, in the order of their names, against the pivot, none louder than allowed.

    Args: scores: of the same pairs as the pivot's. judge: who says which answer is the better one:
        the file, or the mean of the sources' margins.
    """
    pivot_2N = divided(pivot, pivot, length)
    if not scores:
        none_N = torch.zeros(pivot_2N.shape[1], dtype=torch.bool)
        return Moved(pivot_2N, pivot_2N.new_empty((0, *pivot_2N.shape)), none_N, torch.ones(0))
    logs_S2N = torch.stack([divided(scores[name], pivot, length) for name in sorted(scores)])
    turned_S = quietened((logs_S2N - pivot_2N).abs().mean((1, 2)))
    gap_S2N = (logs_S2N - pivot_2N) * turned_S[:, None, None]
    heard_S2N = pivot_2N + gap_S2N
    swapped_N = (heard_S2N[:, 0] - heard_S2N[:, 1]).mean(0) < 0
    if judge == "given":
        swapped_N = torch.zeros_like(swapped_N)
    pivot_2N, gap_S2N = (torch.where(swapped_N, x.flip(-2), x) for x in (pivot_2N, gap_S2N))
    return Moved(pivot_2N, gap_S2N, swapped_N, turned_S)


def quietened(far_S: Tensor) -> Tensor:
    """Return [S] what brings the loudest sources down to LOUDEST times the median; 1 for others.

    Args: far_S: how far each source is from the pivot in the mean. Who is nowhere from it says
        nothing, and is no measure of those who speak.
    """
    speaking = far_S[far_S > 0]
    if len(speaking) < _ENOUGH:
        return torch.ones_like(far_S)
    most = LOUDEST * torch.quantile(speaking, 0.5)
    return torch.where(far_S > most, most / far_S.clamp(min=1e-300), torch.ones_like(far_S))


def kept(gap_S2N: Tensor, *, clip: bool) -> Tensor:
    """What counts of the distances: with `clip` none at which a source is weaker than the pivot.

    Weaker: below it on the better answer, above it on the other; there it could only add noise.
    """
    if not clip:
        return gap_S2N
    return torch.stack([gap_S2N[:, 0].clamp(min=0), gap_S2N[:, 1].clamp(max=0)], dim=1)


def fused_reference(
    pivot_2N: Tensor, gap_S2N: Tensor, *, fusion: Fusion, clip: bool = True
) -> Tensor:
    """Fuse what the sources think of both answers: log M, [2, N].

    max_margin takes the source farthest from the pivot. No source: the pivot itself, which makes
    it plain DPO.
    """
    if not len(gap_S2N):
        return pivot_2N
    gap_S2N = kept(gap_S2N, clip=clip)
    if fusion == "mean":
        return pivot_2N + gap_S2N.mean(0)
    above_2N, below_2N = gap_S2N.amax(0), gap_S2N.amin(0)
    return pivot_2N + torch.where(above_2N >= -below_2N, above_2N, below_2N)
