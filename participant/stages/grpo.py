"""Group-relative policy optimisation: advantages of a group of answers, and the loss of a token.

Source: GRPO (arXiv 2402.03300); clip range, loss over tokens and dropped groups: DAPO (arXiv
2503.14476); the weight between rollout and trainer: truncated importance sampling (FP8-RL, arXiv
2601.18150). Shapes: N = tokens of answers, G = answers of a group.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Clip:
    """How far one step may follow one token."""

    low: float = 0.2
    """The ratio of probabilities counts from 1 - low ..."""
    high: float = 0.28
    """... to 1 + high: more room upwards lets rare tokens grow."""
    weight: float = 2.0
    """Bound on trainer over rollout probability, the weight of a token."""
    kl: float = 0.0
    """Weight of the distance to the model the stage began with, in nats; 0: it may go anywhere."""


def advantages(rewards: Sequence[float | None]) -> list[float | None] | None:
    """How much better than its group each answer is, in standard deviations, [G].

    Answers without a reward (None) count for nothing. Returns: None when the others say nothing:
    fewer than two, or all alike.
    """
    known = [r for r in rewards if r is not None]
    if len(known) < 2 or max(known) - min(known) < 1e-9:
        return None
    mean = math.fsum(known) / len(known)
    deviation = math.sqrt(math.fsum((r - mean) ** 2 for r in known) / len(known))
    return [None if r is None else (r - mean) / deviation for r in rewards]


def token_losses(
    logp_N: Tensor, old_N: Tensor, rollout_N: Tensor, advantage_N: Tensor, clip: Clip
) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss of each token, [N], and what was clipped.

    Args: logp_N: log-probabilities of the tokens now, with gradient. old_N: the trainer's before
        the first step on this rollout. rollout_N: those the tokens were drawn with.
    """
    weight_N = (old_N - rollout_N).exp().clamp(max=clip.weight)
    ratio_N = (logp_N - old_N).exp()
    free_N = ratio_N * advantage_N
    held_N = ratio_N.clamp(1 - clip.low, 1 + clip.high) * advantage_N
    loss_N = -weight_N * torch.minimum(free_N, held_N)
    told = {"clipped": (held_N < free_N).float(), "weight": weight_N}
    return loss_N, told


def distance(logp_N: Tensor, reference_N: Tensor) -> Tensor:
    """Estimate the KL of the model from the reference by token, [N]; never negative.

    Source: the k3 estimator, as in GRPO (arXiv 2402.03300, equation 4).
    """
    gap_N = reference_N - logp_N
    return gap_N.exp() - gap_N - 1
