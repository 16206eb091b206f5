"""Targets of the published baselines, computed for one shard of documents.

Row p of every array belongs to token p of the pivot's own token stream. All of them read what
ours reads, K ids of every position, and keep the faults they were published with; each says where
it had to deviate. Shapes: P = rows of the student, S = experts, K = kept ids, V = vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from types import MappingProxyType
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray

from fusion.align import align, loglik
from fusion.contribution import LogitContribution
from fusion.dtw import one_to_one
from fusion.losses import standardize
from fusion.targets import Arrays
from fusion.vocab_maps import MinedMap, map_ids, projection, vocabulary

INFIFUSION_K: Final = 10
FUSELLM_K: Final = 10

Build = Callable[[LogitContribution, Sequence[LogitContribution]], Arrays]


def rank_targets(student: LogitContribution, experts: Sequence[LogitContribution]) -> Arrays:
    """Sort and z-score the experts' top K, paired by index, as InfiFusion and InfiGFusion do.

    Returns: rank_probs [P, S, K] float32, softmax of the z-scored logits; rank_mask [P, S] bool,
        False where an expert has no row of K ids at this index.
    """
    kept = min(INFIFUSION_K, *(expert.header.top_k for expert in experts))
    shape = (student.header.positions, len(experts))
    mask, probs = np.zeros(shape, bool), np.zeros((*shape, kept), np.float32)
    for index, expert in enumerate(experts):
        mine, theirs = _by_index(student, expert)
        full = expert.topk_ids[theirs, kept - 1] >= 0
        mine, theirs = mine[full], theirs[full]
        top = torch.from_numpy(expert.topk_logprobs[theirs, :kept].astype(np.float32))
        probs[mine, index] = standardize(top).softmax(-1).numpy()
        mask[mine, index] = True
    return {"rank_probs": probs, "rank_mask": mask}


def uld_targets(student: LogitContribution, experts: Sequence[LogitContribution]) -> Arrays:
    """Lay out the experts' sorted probabilities, paired by index, for fusion.losses.uld.

    Returns: uld_probs [P, S, K] float32; uld_each [P, S] float32, the probability of each id that
        is not shipped; uld_size [P, S] int32, the expert's vocabulary, 0 where it has no row.
    """
    kept = min(expert.header.top_k for expert in experts)
    shape = (student.header.positions, len(experts))
    probs, each = np.zeros((*shape, kept), np.float32), np.zeros(shape, np.float32)
    size = np.zeros(shape, np.int32)
    for index, expert in enumerate(experts):
        mine, theirs = _by_index(student, expert)
        top = np.exp(expert.topk_logprobs[theirs, :kept]) * (expert.topk_ids[theirs, :kept] >= 0)
        rest = np.maximum(1 - top.sum(-1), 0)
        probs[mine, index] = top
        each[mine, index] = rest / max(1, expert.header.vocab_size - kept)
        size[mine, index] = expert.header.vocab_size
    return {"uld_probs": probs, "uld_each": each, "uld_size": size}


def _by_index(
    student: LogitContribution, expert: LogitContribution
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Pair the j-th rows of every document that the expert ships, as the released data layers do.

    The longer side's rest is cut off. Positions drift apart as soon as two tokenizers differ:
    that is the baselines' own fault, kept on purpose.
    """
    counts = np.minimum(np.diff(student.doc_offsets), np.diff(expert.doc_offsets))
    inside = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    mine = np.repeat(student.doc_offsets[:-1], counts) + inside
    theirs = np.repeat(expert.doc_offsets[:-1], counts) + inside
    shipped = expert.shipped[theirs]
    return mine[shipped], theirs[shipped]


def minced_targets(student: LogitContribution, experts: Sequence[LogitContribution]) -> Arrays:
    """Fuse the experts as FuseLLM does: MinED ids, rows by DTW, per document the best expert.

    Where a token is paired with one token of the expert, and that maps to it, the target is the
    expert's renormalised top K in student ids, else the text's own token alone. Of the experts
    the one with the least cross-entropy of the document is taken (MinCE).
    Deviations: rows are paired by the token they predict (the released code pairs by the token
    they read, FuseAI issues 27 and 28); cross-entropy is summed over the text, not averaged over
    tokens, whose number differs. Whether the pivot stood among the candidates could not be
    verified; here it does not.
    Returns: ids [P, K] int32, -1 none; probs [P, K] float32, each row sums to 1.
    Source: FuseLLM (arXiv 2401.10491).
    """
    chosen_D = np.argmin([_document_sums(-e.own_logprob, e) for e in experts], axis=0)
    kept = min(FUSELLM_K, max(expert.header.top_k for expert in experts))
    ids = np.full((student.header.positions, kept), -1, np.int32)
    probs = np.zeros(ids.shape, np.float32)
    ids[:, 0], probs[:, 0] = student.token_ids, 1
    mine = vocabulary(student)
    for index, expert in enumerate(experts):
        theirs = vocabulary(expert)
        mined = _mined(tuple(mine), tuple(theirs), _eos(student, expert))
        rows, at = _paired(student, expert, mine, theirs, np.flatnonzero(chosen_D == index))
        paired = (mined.of(expert.token_ids[at]) == student.token_ids[rows]) & expert.shipped[at]
        rows, at = rows[paired], at[paired]
        named = mined.of(expert.topk_ids[at, :kept])
        found, mass = _summed(named, _named(expert, at, named))
        ids[rows, : found.shape[1]], probs[rows, : found.shape[1]] = found, mass
    return {"ids": ids, "probs": probs}


@lru_cache(maxsize=8)
def _mined(mine: tuple[bytes, ...], theirs: tuple[bytes, ...], eos: tuple[int, int]) -> MinedMap:
    """Shards of one run share a map, and so what it has found."""
    return MinedMap(mine, theirs, eos=eos)


def _eos(student: LogitContribution, expert: LogitContribution) -> tuple[int, int]:
    return int(student.token_ids[-1]), int(expert.token_ids[-1])


def _document_sums(values_P: NDArray[Any], of: LogitContribution) -> NDArray[np.float64]:
    return np.add.reduceat(values_P.astype(np.float64), of.doc_offsets[:-1])


def _paired(
    student: LogitContribution,
    expert: LogitContribution,
    mine: Sequence[bytes],
    theirs: Sequence[bytes],
    documents: NDArray[np.int64],
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the rows of both that DTW pairs one to one in these documents."""
    rows, at = [], []
    for document in documents.tolist():
        first, end = student.doc_offsets[document : document + 2].tolist()
        start, stop = expert.doc_offsets[document : document + 2].tolist()
        found = one_to_one(
            [mine[i] for i in student.token_ids[first:end].tolist()],
            [theirs[i] for i in expert.token_ids[start:stop].tolist()],
        )
        rows.append(first + np.flatnonzero(found >= 0))
        at.append(start + found[found >= 0])
    none = [np.zeros(0, np.int64)]
    return np.concatenate(rows or none), np.concatenate(at or none)


def _named(
    expert: LogitContribution, at: NDArray[np.int64], ids_MK: NDArray[np.integer[Any]]
) -> NDArray[np.float32]:
    """Return [M, K] the expert's probabilities of its first K ids, 0 where ids_MK has none."""
    probs_MK = np.exp(expert.topk_logprobs[at, : ids_MK.shape[1]])
    return np.where(ids_MK >= 0, probs_MK, np.float32(0))


def _summed(
    ids_MK: NDArray[np.int64], probs_MK: NDArray[np.float32]
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Sum entries of one row and id into the first of them, and make each row sum to 1."""
    same_MKK = (ids_MK[:, :, None] == ids_MK[:, None, :]) & (ids_MK >= 0)[:, :, None]
    first_MK = same_MKK.any(-1) & (same_MKK.argmax(-1) == np.arange(ids_MK.shape[1]))
    mass_MK = (same_MKK * probs_MK[:, None, :]).sum(-1) * first_MK
    mass_MK = mass_MK / np.maximum(mass_MK.sum(-1, keepdims=True), 1e-12)
    return np.where(first_MK, ids_MK, -1), mass_MK.astype(np.float32)


def gold_targets(student: LogitContribution, experts: Sequence[LogitContribution]) -> Arrays:
    """Lay out the byte-offset groups of TRL's GOLD at the row where each begins.

    A group's distribution is that of its first position times the chain of its other tokens'
    probabilities, for the expert here and for the student in fusion.methods. Deviation: first
    positions are those that predict the group's first token (TRL's default takes the answer
    positions, one later).
    Returns: gold_tokens [P, S] int32, the student's tokens in the group, 0 where none begins;
        gold_ids [P, S, K] int32 and gold_probs float32, of ids with equal bytes; gold_rest
        [P, S, K] float32, of all others.
    """
    kept = max(expert.header.top_k for expert in experts)
    shape = (student.header.positions, len(experts))
    tokens, ids = np.zeros(shape, np.int32), np.full((*shape, kept), -1, np.int32)
    probs, rest = np.zeros(ids.shape, np.float32), np.zeros(ids.shape, np.float32)
    for index, expert in enumerate(experts):
        groups = align(student, expert)
        asked = expert.shipped[groups.teacher_rows]
        rows, at = groups.student_rows[asked], groups.teacher_rows[asked]
        chain = np.exp(loglik(expert, at + 1, groups.teacher_ends[asked]))[:, None]
        width, top = expert.header.top_k, expert.topk_ids[at]
        found = np.where(top >= 0, map_ids(student, expert)[top], -1)
        all_probs = _named(expert, at, top)
        tokens[rows, index] = groups.student_ends[asked] - rows
        ids[rows, index, :width] = found
        probs[rows, index, :width] = _named(expert, at, found) * chain
        rest[rows, index, :width] = all_probs * (found < 0) * chain
    return {"gold_tokens": tokens, "gold_ids": ids, "gold_probs": probs, "gold_rest": rest}


def gold_shared(student: LogitContribution, experts: Sequence[LogitContribution]) -> Arrays:
    """Return gold_matched [S, V] bool, and gold_share [S], matched ids / expert's vocabulary."""
    matched = np.zeros((len(experts), student.header.vocab_size), bool)
    share = np.zeros(len(experts), np.float32)
    for index, expert in enumerate(experts):
        mapped = map_ids(student, expert)
        matched[index, mapped[mapped >= 0]] = True
        share[index] = (mapped >= 0).mean()
    return {"gold_matched": matched, "gold_share": share}


def projection_targets(student: LogitContribution, experts: Sequence[LogitContribution]) -> Arrays:
    """Lay out the experts' top K in their own ids, one vocabulary after the other.

    Returns: teacher_ids [P, S, K] int32, -1 where the expert has no row at the same bytes;
        teacher_probs [P, S, K] float32.
    Source: X-Token (arXiv 2605.21699); its projection is in projection_shared.
    """
    kept = max(expert.header.top_k for expert in experts)
    ids = np.full((student.header.positions, len(experts), kept), -1, np.int32)
    probs, first = np.zeros(ids.shape, np.float32), 0
    for index, expert in enumerate(experts):
        common = align(student, expert)
        rows, at = common.student_rows, common.teacher_rows
        width, top = expert.header.top_k, expert.topk_ids[at]
        ids[rows, index, :width] = np.where(top >= 0, first + top, -1)
        probs[rows, index, :width] = _named(expert, at, top)
        first += expert.header.vocab_size
    return {"teacher_ids": ids, "teacher_probs": probs}


def projection_shared(student: LogitContribution, experts: Sequence[LogitContribution]) -> Arrays:
    """Return W as entries: projection_student, _teacher and _share, each [nnz], and its width.

    projection_size [] is the number of all experts' ids, which follow one another.
    """
    mine, first = vocabulary(student), 0
    parts: list[tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float32]]] = []
    for expert in experts:
        ids, shares = projection(mine, vocabulary(expert), eos=_eos(student, expert))
        row, column = np.nonzero(ids >= 0)
        parts.append((row, first + ids[row, column], shares[row, column]))
        first += expert.header.vocab_size
    names = ("projection_student", "projection_teacher", "projection_share")
    arrays = (np.concatenate(column) for column in zip(*parts, strict=True))
    return dict(zip(names, arrays, strict=True)) | {"projection_size": np.asarray(first)}


BASELINES: Final[Mapping[str, Build]] = MappingProxyType(
    {
        "infifusion": rank_targets,
        "infigfusion": rank_targets,
        "uld": uld_targets,
        "minced": minced_targets,
        "gold": gold_targets,
        "p_kl": projection_targets,
    }
)
"""Per loss: the targets of a shard's rows."""

SHARED: Final[Mapping[str, Build]] = MappingProxyType(
    {"gold": gold_shared, "p_kl": projection_shared}
)
"""Per loss: what its batches share (FusionBatch.shared). It hangs on the vocabularies alone, so
any one document will do."""
