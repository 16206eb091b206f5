"""Who moved the reference of a preference fusion, and how far each source agrees with the pairs.

Shapes: S = sources, N = pairs; 2 = chosen, then rejected.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from fusion.pair_reference import kept, move
from fusion.pair_scores import PairScores
from fusion.pair_scoring import divided
from fusion.preference import PreferenceSettings


def judgement(
    pivot: PairScores, scores: Mapping[str, PairScores], settings: PreferenceSettings
) -> dict[str, dict[str, float]]:
    """Tell of each source how it judged the pairs as the file has them, and what that did.

    Returns: by source: `agrees`, the share of pairs of which it prefers the chosen answer;
        `margin`, nats by which it does in the mean, divided as settings.length says; `stronger`,
        the share of answers at which it is stronger than the pivot (above it on the better one,
        below on the other, as settings.judge says); `share`, its part of how far the reference
        went from the pivot, 0 where it went nowhere; `turned`, what its distances from the pivot
        were multiplied with, below 1 for one that is much louder than the others.
    """
    if not scores:
        return {}
    moved = move(pivot, scores, length=settings.length, judge=settings.judge)
    stronger_S2N = moved.gap * torch.tensor([[1.0], [-1.0]]) > 0
    far_S2N = kept(moved.gap, clip=settings.clip).abs()
    if settings.fusion == "max_margin":
        far_S2N = far_S2N * (far_S2N == far_S2N.amax(0))
    total = float(far_S2N.sum()) or 1.0
    told = {}
    for s, name in enumerate(sorted(scores)):
        chosen_N, rejected_N = divided(scores[name], pivot, settings.length)
        told[name] = {
            "agrees": float((chosen_N > rejected_N).double().mean()),
            "margin": float((chosen_N - rejected_N).mean()),
            "stronger": float(stronger_S2N[s].double().mean()),
            "share": float(far_S2N[s].sum()) / total,
            "turned": float(moved.turned[s]),
        }
    return told
