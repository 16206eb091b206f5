"""Distillation losses: SpanKL with an OTHER bucket, ALM, and InfiFusion's sorted top-K loss.

Shapes: N = positions, V = student vocabulary, C = kept ids of a target, K = kept ranks,
S = teachers. Everything is in nats; gradients flow to the student only.
"""

from __future__ import annotations

from torch import Tensor

OTHER_FLOOR = 1e-6
"""The student's OTHER mass is held above this, so that its logarithm stays finite in fp32."""


def span_kl(logprobs_NV: Tensor, ids_NC: Tensor, probs_NC: Tensor) -> Tensor:
    """Return [N] forward KL between target and student on the partition {ids} + OTHER.

    The target's OTHER is what its ids leave of 1; the student's likewise. Nothing is
    renormalised, so both confidence and identity of the target's ids are taught, and ids that
    the target does not name are only held down as one.
    Args: ids_NC: student ids, each once in a row; -1 where a row holds fewer.
        probs_NC: their probabilities; a row sums to at most 1 (up to rounding).
    Source: OTHER bucket as in reference distillation with top-K targets; see docs/decisions.md.
    """
    named_NC = ids_NC >= 0
    log_s_NC = logprobs_NV.gather(-1, ids_NC.clamp_min(0))
    s_NC = log_s_NC.exp() * named_NC
    probs_NC = (probs_NC * named_NC).to(logprobs_NV.dtype)
    other_N = (1 - probs_NC.sum(-1)).clamp_min(0)
    log_other_s_N = (1 - s_NC.sum(-1)).clamp_min(OTHER_FLOOR).log()
    cross_N = (probs_NC * log_s_NC).sum(-1) + other_N * log_other_s_N
    entropy_N = probs_NC.xlogy(probs_NC).sum(-1) + other_N.xlogy(other_N)
    return entropy_N - cross_N


def alm(student_logprob_N: Tensor, teacher_logprob_N: Tensor) -> Tensor:
    """Return [N] binary KL between a chunk's likelihood under the teacher and the student.

    Source: approximate likelihood matching (arXiv 2503.20083), its binary form at temperature 1.
    """
    p_N = teacher_logprob_N.exp()
    # Below 1, so that log(1 - s) and its gradient stay finite.
    s_N = student_logprob_N.exp().clamp_max(1 - OTHER_FLOOR)
    entropy_N = p_N * teacher_logprob_N + (1 - p_N).xlogy(1 - p_N)
    return entropy_N - p_N * student_logprob_N - (1 - p_N) * (1 - s_N).log()


def standardize(logits_NK: Tensor) -> Tensor:
    """Shift and scale the kept logits to mean 0 and standard deviation 1."""
    centred_NK = logits_NK - logits_NK.mean(-1, keepdim=True)
    # Inside the root: equal logits then have a gradient, 0, and not 0 times infinity.
    return centred_NK / (centred_NK.square().mean(-1, keepdim=True) + 1e-12).sqrt()


def infifusion(logits_NV: Tensor, teacher_NSK: Tensor, mask_NS: Tensor) -> Tensor:
    """Return [N] sum over teachers / S of the L1 gap of z-scored top-K, compared rank by rank.

    Ranks are compared, not ids: a student with every id wrong can have loss 0. The faithful
    baseline, not our recommendation.
    Args: teacher_NSK: standardize() then softmax of each teacher's K largest, sorted down.
        mask_NS: False where a teacher has no row at this index.
    Source: InfiFusion (arXiv 2501.02795) v3: ULD + top-K + logits standardization, K = 10.
    """
    top_NK = logits_NV.topk(teacher_NSK.shape[-1], dim=-1).values
    gap_NS = (standardize(top_NK).softmax(-1)[:, None] - teacher_NSK).abs().sum(-1)
    return (gap_NS * mask_NS).sum(-1) / mask_NS.shape[-1]
