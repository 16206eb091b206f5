"""Who moved the reference of a preference fusion, and how far each source agrees with the pairs.

Shapes: S = sources, N = pairs; 2 = chosen, then rejected.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

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
        went from the pivot, 0 where it went nowhere.
    """
    if not scores:
        return {}
    base_2N = divided(pivot, pivot, settings.length)
    logs_S2N = torch.stack([divided(one, pivot, settings.length) for one in scores.values()])
    gap_S2N = logs_S2N - base_2N
    margin_SN = logs_S2N[:, 0] - logs_S2N[:, 1]
    if settings.judge == "experts":
        gap_S2N = torch.where(margin_SN.mean(0) < 0, gap_S2N.flip(1), gap_S2N)
    stronger_S2N = gap_S2N * torch.tensor([[1.0], [-1.0]]) > 0
    if settings.clip:
        gap_S2N = gap_S2N * stronger_S2N
    far_S2N = gap_S2N.abs()
    if settings.fusion == "max_margin":
        far_S2N = far_S2N * (far_S2N == far_S2N.amax(0))
    total = float(far_S2N.sum()) or 1.0
    return {
        name: {
            "agrees": float((margin_SN[s] > 0).double().mean()),
            "margin": float(margin_SN[s].mean()),
            "stronger": float(stronger_S2N[s].double().mean()),
            "share": float(far_S2N[s].sum()) / total,
        }
        for s, name in enumerate(scores)
    }
