"""Distillation losses, ours and the published ones: functions of tensors, position by position.

Shapes: N = positions, V = student vocabulary, C = kept ids of a target, K = kept ranks,
S = teachers. Everything is in nats; gradients flow to the student only.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

EDGE = 1e-6
"""Log-likelihoods of chunks are held this far below 0, so that log(1 - p) stays finite."""


def span_kl(log_s_NC: Tensor, log_other_N: Tensor, probs_NC: Tensor) -> Tensor:
    """Return [N] forward KL between target and student on the partition {ids} + OTHER.

    The target's OTHER is what its ids leave of 1; the student's likewise. Nothing is
    renormalised, so both confidence and identity of the target's ids are taught, and ids that
    the target does not name are only held down as one. A target that leaves nothing is plain
    cross-entropy less a constant: with counts of samples as probabilities the gradient is, in
    the mean over samplings, that of the whole distribution (RS-KD, arXiv 2503.16870).
    Args: log_s_NC, log_other_N: as from fused.selected_logprobs. probs_NC: the ids'
        probabilities, 0 where a row names fewer; a row sums to at most 1 (up to rounding).
    Source: OTHER bucket as in reference distillation with top-K targets; see docs/decisions.md.
    """
    probs_NC = probs_NC.to(log_s_NC.dtype)
    # What rounding of a sum of C numbers makes is no mass.
    other_N = (1 - probs_NC.sum(-1)).clamp_min(0)
    other_N = torch.where(other_N > 1e-6, other_N, 0.0)
    cross_N = (probs_NC * log_s_NC).sum(-1) + other_N * log_other_N
    entropy_N = probs_NC.xlogy(probs_NC).sum(-1) + other_N.xlogy(other_N)
    return entropy_N - cross_N


def cross_entropy(log_s_NC: Tensor, probs_NC: Tensor) -> Tensor:
    """Return [N] cross-entropy of targets that name all that counts, as FuseLLM's fused ones."""
    return -(probs_NC.to(log_s_NC.dtype) * log_s_NC).sum(-1)


def alm(student_logprob_N: Tensor, teacher_logprob_N: Tensor, temperature: float = 1.0) -> Tensor:
    """Return [N] binary KL between a chunk's likelihood under the teacher and the student.

    Both likelihoods are raised to 1 / temperature, and the KL is multiplied by it, so that its
    size stays: at infinity it is t - s + t log(s / t) of the log-likelihoods t and s, the limit
    that the paper reaches with 100. Ours is 1.
    Source: approximate likelihood matching (arXiv 2503.20083), its binary form.
    """
    s_N = student_logprob_N.clamp_max(-EDGE)
    t_N = teacher_logprob_N.to(s_N.dtype).clamp_max(-EDGE)
    if math.isinf(temperature):
        return t_N - s_N + t_N * (s_N / t_N).log()
    s_N, t_N = s_N / temperature, t_N / temperature
    # expm1: of chunks that are nearly sure, 1 - p is a difference of numbers near 1.
    rest_N = -torch.expm1(t_N)
    gap_N = rest_N.log() - (-torch.expm1(s_N)).log()
    return temperature * (t_N.exp() * (t_N - s_N) + rest_N * gap_N)


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


def features(rank_probs: Tensor) -> Tensor:
    """Return the z-scored logits that rank probabilities, standardize() then softmax, came from."""
    log_p = rank_probs.clamp_min(1e-30).log()
    return log_p - log_p.mean(-1, keepdim=True)


def rank_graph(student_TK: Tensor, teacher_TK: Tensor, mask_T: Tensor) -> Tensor:
    """Return a sequence's L1 gap between the sorted node features of two co-activation graphs.

    A graph's nodes are ranks, its edges C = mean over positions of z z^T of z-scored top-K
    logits; a node's feature is the mean of its edges' sizes. Sorted again: ranks are not ids, and
    here not even ranks. Which aggregate the paper takes, and the weight of this term, could not
    be verified: its code is gone.
    Args: both z-scored, largest first; mask False where a position is not compared.
    Source: InfiGFusion (arXiv 2505.13893), its O(n log n) bound of Gromov-Wasserstein.
    """

    def nodes(z_TK: Tensor) -> Tensor:
        z_TK = z_TK * mask_T[:, None]
        edges_KK = z_TK.T @ z_TK / mask_T.sum().clamp_min(1)
        return edges_KK.abs().mean(-1).sort(descending=True).values

    return (nodes(student_TK) - nodes(teacher_TK.to(student_TK.dtype))).abs().sum()


def uld(logits_NV: Tensor, probs_NK: Tensor, each_N: Tensor, size_N: Tensor) -> Tensor:
    """Return [N] L1 gap of the two whole distributions, each sorted down, the shorter zero-padded.

    Deviation: the paper has all of the teacher's probabilities, a shipment its K largest and the
    mass of the rest, which is here spread evenly.
    Args: each_N: the probability of each of the teacher's other ids. size_N: the teacher's
        vocabulary; 0 where there is no teacher, whose cost is 0.
    Source: ULD (arXiv 2402.12030).
    """
    student_NV = logits_NV.softmax(-1).sort(-1, descending=True).values
    vocabulary, kept = student_NV.shape[-1], probs_NK.shape[-1]
    each_N, probs_NK = each_N.to(student_NV.dtype), probs_NK.to(student_NV.dtype)
    rank_V = torch.arange(vocabulary, device=logits_NV.device)
    teacher_NV = torch.where(rank_V < size_N[:, None], each_N[:, None], 0.0)
    teacher_NV = torch.cat([probs_NK, teacher_NV[:, kept:]], -1)[:, :vocabulary]
    beyond_N = each_N * (size_N - max(vocabulary, kept)).clamp_min(0)
    beyond_N = beyond_N + probs_NK[:, vocabulary:].sum(-1)
    gap_N: Tensor = (student_NV - teacher_NV).abs().sum(-1)
    return (gap_N + beyond_N) * (size_N > 0)


def projected_kl(
    logits_NV: Tensor, to_teachers_XV: Tensor, ids_NK: Tensor, probs_NK: Tensor
) -> Tensor:
    """Return [N] sum over the teacher's top K of p log(p / q), q = student @ W, in teacher ids.

    Neither side is renormalised, and what lies outside the top K is not compared: nothing keeps
    the sum above 0. Whether the paper renormalises could not be verified.
    Args: to_teachers_XV: W transposed, sparse, X teacher ids. ids_NK: -1 names nothing.
    Source: X-Token (arXiv 2605.21699), its P-KL.
    """
    student_VN = logits_NV.softmax(-1).T
    mass_XN: Tensor = torch.sparse.mm(to_teachers_XV.to(student_VN.dtype), student_VN)
    q_NK: Tensor = mass_XN.T.gather(-1, ids_NK.clamp_min(0)).clamp_min(1e-12)
    p_NK = probs_NK.to(q_NK.dtype) * (ids_NK >= 0)
    return (p_NK.xlogy(p_NK) - p_NK * q_NK.log()).sum(-1)


def gold(
    student_NV: Tensor,
    matched_V: Tensor,
    ids_NK: Tensor,
    probs_NK: Tensor,
    rest_NK: Tensor,
    *,
    beta: float = 0.5,
) -> Tensor:
    """Return [N, 2]: JSD over the string-equal ids, and sorted L1 over all others.

    Its published flaws are kept. Probabilities of the common ids come from the softmax over the
    whole vocabulary and are not completed by an OTHER, so every id outside is pushed down with
    the teacher's common mass, whatever the teacher thinks of it. The rest is compared by rank.
    The halves' weights are sizes of vocabularies, not mass. Deviation: what is not shipped of the
    teacher counts as 0.
    Args: student_NV: probabilities. matched_V: bool, ids that the teacher writes with equal
        bytes. ids_NK: student ids, -1 none; probs_NK: the teacher's of them. rest_NK: the
        teacher's of ids that have no equal. beta: 0 is KL(teacher || student), 1 the reverse.
    Source: TRL's GOLD, after its description; no code was read into ours.
    """
    at_NK = ids_NK.clamp_min(0)
    p_NK = probs_NK.to(student_NV.dtype) * (ids_NK >= 0)
    teacher_NV = torch.zeros_like(student_NV).scatter_add(-1, at_NK, p_NK) * matched_V
    common_NV = student_NV * matched_V
    common_N = _jsd(teacher_NV, common_NV, beta)
    other_NV = (student_NV * ~matched_V).sort(-1, descending=True).values
    width = max(other_NV.shape[-1], rest_NK.shape[-1])
    rest_NK = rest_NK.to(student_NV.dtype).sort(-1, descending=True).values
    other_N = (_padded(other_NV, width) - _padded(rest_NK, width)).abs().sum(-1)
    return torch.stack([common_N, other_N], -1)


def _jsd(p_NV: Tensor, q_NV: Tensor, beta: float) -> Tensor:
    if beta in (0.0, 1.0):
        return _kl(p_NV, q_NV) if beta == 0 else _kl(q_NV, p_NV)
    mixed_NV = beta * p_NV + (1 - beta) * q_NV
    return beta * _kl(p_NV, mixed_NV) + (1 - beta) * _kl(q_NV, mixed_NV)


def _kl(p_NV: Tensor, q_NV: Tensor) -> Tensor:
    # Not xlogy: its gradient at 0 is infinite, and times a mask NaN.
    return (p_NV * (p_NV.clamp_min(1e-30).log() - q_NV.clamp_min(1e-30).log())).sum(-1)


def _padded(values_NC: Tensor, width: int) -> Tensor:
    return torch.nn.functional.pad(values_NC, (0, width - values_NC.shape[-1]))
