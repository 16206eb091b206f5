"""What the recommended method learns from, computed for one shard of documents.

Row p of every array belongs to token p of the pivot's own token stream (documents, each with eos).
Shapes: P = rows, S = candidates (base pivot first), M = common places, C = kept ids, K = top-K of
a contribution.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from fusion.align import Alignment, align, loglik
from fusion.contribution import LogitContribution
from fusion.routing import Weights

CERTAIN_NATS: Final = float(np.log(0.9))
"""A chunk of the text that an expert finds likelier than this holds no surprise for it."""

Arrays = dict[str, NDArray[Any]]
"""Targets by name, each with one row per token of the pivot; see fusion.objective."""


@dataclass(frozen=True, slots=True)
class _Entries:
    """A teacher's distribution as loose entries (student row, student id, probability)."""

    rows: NDArray[np.int64]
    ids: NDArray[np.int64]
    probs: NDArray[np.float32]


def span_targets(
    student: LogitContribution,
    candidates: Sequence[LogitContribution],
    weights_PS: Weights,
    maps: Sequence[NDArray[np.int64]],
    *,
    kept: int,
    other: bool = True,
) -> Arrays:
    """Mix the candidates' distributions by weight and keep each row's `kept` likeliest ids.

    Where a candidate was not asked (it ships only what it knows better than the base) its weight
    goes to the base. Where it has no row at the same bytes it gives nothing, and its weight is
    lost, not handed to the others: the row then simply counts less.
    Args: candidates: the base pivot, whose rows are the student's, then the experts. maps: of
        each, student ids by its own ids (fusion.vocab_maps.map_ids). other: False renormalises.
    Returns: ids [P, C] int32, -1 where a row names fewer; probs [P, C] float32, what a row leaves
        of 1 is OTHER; weight [P] float32, the routing mass that could be compared.
    """
    rows = student.header.positions
    alignments = [align(student, candidate) for candidate in candidates]
    weights_PS = _delegate(candidates, alignments, weights_PS)
    weight_P = np.zeros(rows, np.float32)
    entries = []
    for index, (candidate, alignment) in enumerate(zip(candidates, alignments, strict=True)):
        if not weights_PS[:, index].any():
            continue
        weight_P[alignment.student_rows] += weights_PS[alignment.student_rows, index]
        found = _teacher_entries(student, candidate, alignment, maps[index])
        entries.append(_Entries(found.rows, found.ids, found.probs * weights_PS[found.rows, index]))
    ids_PC, probs_PC = _pack(entries, rows, student.header.vocab_size, kept)
    left_P = weight_P if other else probs_PC.sum(axis=1)
    probs_PC /= np.maximum(left_P, 1e-12)[:, None]
    return {"ids": ids_PC, "probs": probs_PC, "weight": weight_P}


def _delegate(
    candidates: Sequence[LogitContribution], alignments: Sequence[Alignment], weights_PS: Weights
) -> Weights:
    """Hand the base what experts have at rows they did not ship."""
    moved_PS = weights_PS.copy()
    for index in range(1, len(candidates)):
        at = alignments[index]
        silent = at.student_rows[~candidates[index].shipped[at.teacher_rows]]
        moved_PS[silent, 0] += moved_PS[silent, index]
        moved_PS[silent, index] = 0
    return moved_PS


def _teacher_entries(
    student: LogitContribution,
    teacher: LogitContribution,
    alignment: Alignment,
    mapped: NDArray[np.int64],
) -> _Entries:
    """Write a teacher's rows at the common places as entries in student ids.

    The text's own chunk is known exactly: if the teacher writes that chunk, the student's next
    token is the text's own, whatever the cut. So the chunk's likelihood is moved from the
    chunk's first teacher token to the text's own student token. Mass is moved, never made.
    """
    inside = teacher.shipped[alignment.teacher_rows]
    at, rows = alignment.teacher_rows[inside], alignment.student_rows[inside]
    top_MK, own_M = teacher.topk_ids[at], teacher.own_logprob[at]
    probs_MK = np.exp(teacher.topk_logprobs[at]) * (top_MK >= 0)
    chunk_M = loglik(teacher, at, alignment.teacher_ends[inside])
    is_own_MK = top_MK == teacher.token_ids[at][:, None]
    if teacher.header.sampler == "samples":
        # Drawn counts: what was drawn of the own token, times how much of it is the chunk's.
        part_M = np.exp(np.minimum(chunk_M - own_M, 0))
        moved_M = (probs_MK * is_own_MK).sum(axis=1) * part_M
    else:
        moved_M = np.exp(chunk_M)
    moved_M = moved_M.astype(np.float32)
    probs_MK = np.maximum(probs_MK - moved_M[:, None] * is_own_MK, 0)
    ids = np.concatenate([mapped[top_MK].ravel(), student.token_ids[rows].astype(np.int64)])
    probs = np.concatenate([probs_MK.ravel(), moved_M])
    where = np.concatenate([np.repeat(rows, top_MK.shape[1]), rows])
    kept = (ids >= 0) & (probs > 0)
    return _Entries(where[kept], ids[kept], probs[kept])


def _pack(
    entries: Sequence[_Entries], rows: int, vocab_size: int, kept: int
) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """Sum entries of one row and id, and keep each row's likeliest ids."""
    ids_PC = np.full((rows, kept), -1, np.int32)
    probs_PC = np.zeros((rows, kept), np.float32)
    key = np.concatenate([np.zeros(0, np.int64), *(e.rows * vocab_size + e.ids for e in entries)])
    probs = np.concatenate([np.zeros(0, np.float32), *(e.probs for e in entries)])
    unique, inverse = np.unique(key, return_inverse=True)
    total = np.bincount(inverse, probs, len(unique))
    row, ids = np.divmod(unique, vocab_size)
    order = np.lexsort((ids, -total, row))
    row, ids, total = row[order], ids[order], total[order]
    rank = np.arange(len(row)) - np.searchsorted(row, row)
    best = rank < kept
    ids_PC[row[best], rank[best]] = ids[best]
    probs_PC[row[best], rank[best]] = total[best]
    return ids_PC, probs_PC


def chunk_targets(
    student: LogitContribution, experts: Sequence[LogitContribution], weights_PS: Weights
) -> Arrays:
    """Lay out the chunks of two and more student tokens at the row where each ends.

    Chunks of one student token are in the span targets, whose own token is then exact.
    Args: weights_PS: of the experts alone, in their order.
    Returns, each [P, S-1]: chunk_length int32, 0 where none ends here; chunk_logprob float32 the
        expert's log-likelihood of the chunk; chunk_weight float32 its weight where it starts.
    """
    shape = (student.header.positions, len(experts))
    length, logprob = np.zeros(shape, np.int32), np.zeros(shape, np.float32)
    weight = np.zeros(shape, np.float32)
    for index, expert in enumerate(experts):
        alignment = align(student, expert)
        count = alignment.student_ends - alignment.student_rows
        long = count > 1
        last = alignment.student_ends[long] - 1
        length[last, index] = count[long]
        logprob[last, index] = loglik(
            expert, alignment.teacher_rows[long], alignment.teacher_ends[long]
        )
        weight[last, index] = weights_PS[alignment.student_rows[long], index]
    return {"chunk_length": length, "chunk_logprob": logprob, "chunk_weight": weight}


def certain_mass(
    student: LogitContribution, experts: Sequence[LogitContribution], weights_PS: Weights
) -> NDArray[np.float32]:
    """Return [P] the weight of experts that are as good as certain of the text's own next token.

    To learn from them is to learn the text: what they weigh is cross-entropy by another name. A
    source that knows the prompt set by heart, or says so, would otherwise make the pivot do so too.
    Args: weights_PS: of the experts alone, in their order.
    """
    mass_P = np.zeros(student.header.positions, np.float32)
    for index, expert in enumerate(experts):
        alignment = align(student, expert)
        nats_M = loglik(expert, alignment.teacher_rows, alignment.teacher_ends)
        sure_M = (nats_M > CERTAIN_NATS) & expert.shipped[alignment.teacher_rows]
        rows = alignment.student_rows[sure_M]
        mass_P[rows] += weights_PS[rows, index]
    return mass_P
