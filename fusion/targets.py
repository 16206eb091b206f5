"""Everything a fusion run learns from, computed once before training as packed arrays.

Row p of every array belongs to token p of the pivot's own token stream (documents, each with
eos), so that a batch of windows is a slice, and a fusion step costs little more than a plain one.
Shapes: P = rows, S = candidates (base pivot first), C = kept ids, K = top-K of a contribution.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from fusion.align import Alignment, align, map_ids, vocabulary
from fusion.codec import LogitContribution
from fusion.losses import standardize
from fusion.models import encode_text

INFIFUSION_K = 10
_ROWS_AT_ONCE = 16_384


@dataclass(frozen=True, slots=True)
class SpanTargets:
    """The routed mixture of the candidates' distributions, in student ids."""

    ids: Tensor
    """[P, C] int32, -1 where a row names fewer."""
    probs: Tensor
    """[P, C] float32; what a row leaves of 1 is OTHER."""
    weight: Tensor
    """[P] float32: the routing mass of the candidates that can be compared at this row."""


@dataclass(frozen=True, slots=True)
class ChunkTargets:
    """Chunks that are not one token to one: they end at this row."""

    length: Tensor
    """[P, S-1] int32: the chunk's student tokens; 0 where none ends here."""
    logprob: Tensor
    """[P, S-1] float32: the teacher's log-likelihood of the chunk."""
    weight: Tensor
    """[P, S-1] float32: the teacher's routing weight where the chunk starts."""


@dataclass(frozen=True, slots=True)
class RankTargets:
    """Sorted, z-scored, softmaxed top-K of every expert, paired by index in the document."""

    probs: Tensor
    """[P, S-1, K] float32."""
    mask: Tensor
    """[P, S-1] bool: False where the expert's document has fewer rows."""


@dataclass(frozen=True, slots=True)
class _Entries:
    """A teacher's distribution as loose entries (student row, student id, probability)."""

    rows: NDArray[np.int64]
    ids: NDArray[np.int64]
    probs: NDArray[np.float32]


def span_targets(
    student: LogitContribution,
    candidates: Sequence[LogitContribution],
    weights_PS: NDArray[np.float32],
    tokenizer: PreTrainedTokenizerFast,
    *,
    kept: int,
) -> SpanTargets:
    """Mix the candidates' distributions by weight and keep each row's `kept` likeliest ids.

    A candidate that has no row at the same bytes gives nothing there, and its weight is lost,
    not handed to the others: the row then simply counts less.
    """
    rows = student.header.positions
    weight_P = np.zeros(rows, np.float32)
    entries = []
    for index, candidate in enumerate(candidates):
        if not weights_PS[:, index].any():
            continue
        alignment = align(student, candidate)
        weight_P[alignment.student_rows] += weights_PS[alignment.student_rows, index]
        found = _teacher_entries(student, candidate, alignment, tokenizer)
        entries.append(_Entries(found.rows, found.ids, found.probs * weights_PS[found.rows, index]))
    ids_PC, probs_PC = _pack(entries, rows, student.header.vocab_size, kept)
    probs_PC /= np.maximum(weight_P, 1e-12)[:, None]
    return SpanTargets(
        torch.from_numpy(ids_PC), torch.from_numpy(probs_PC), torch.from_numpy(weight_P)
    )


def _teacher_entries(
    student: LogitContribution,
    teacher: LogitContribution,
    alignment: Alignment,
    tokenizer: PreTrainedTokenizerFast,
) -> _Entries:
    """Write a teacher's rows at the common places as entries in student ids.

    The text's own chunk is known exactly: if the teacher writes that chunk, the student's next
    token is the text's own, whatever the cut. So the chunk's likelihood is moved from the
    chunk's first teacher token to the text's own student token. Mass is moved, never made.
    """
    mapped = map_ids(student, teacher, first_pieces(tokenizer, teacher))
    at, rows = alignment.teacher_rows, alignment.student_rows
    probs_MK = np.exp(teacher.topk_logprobs[at].astype(np.float32))
    top_MK = teacher.topk_ids[at]
    chunk_M = np.exp(chunk_logprobs(teacher, alignment)).astype(np.float32)
    probs_MK -= chunk_M[:, None] * (top_MK == teacher.token_ids[at][:, None])
    ids = np.concatenate([mapped[top_MK].ravel(), student.token_ids[rows].astype(np.int64)])
    probs = np.concatenate([probs_MK.ravel(), chunk_M])
    where = np.concatenate([np.repeat(rows, top_MK.shape[1]), rows])
    kept = (ids >= 0) & (probs > 0)
    return _Entries(where[kept], ids[kept], probs[kept])


def chunk_logprobs(teacher: LogitContribution, alignment: Alignment) -> NDArray[np.float64]:
    """Return [M] the teacher's log-likelihood of each chunk."""
    total = np.concatenate([[0.0], np.cumsum(teacher.own_logprob.astype(np.float64))])
    return np.asarray(total[alignment.teacher_ends] - total[alignment.teacher_rows])


def first_pieces(tokenizer: PreTrainedTokenizerFast, teacher: LogitContribution) -> list[int]:
    """Return for each teacher id what the student writes first for its bytes; -1 if none."""
    pieces = []
    for piece in vocabulary(teacher):
        try:
            ids = encode_text(tokenizer, piece.decode()) if piece else []
        except UnicodeDecodeError:  # part of a character: no text of its own
            ids = []
        pieces.append(ids[0] if ids else -1)
    return pieces


def _pack(
    entries: Sequence[_Entries], rows: int, vocab_size: int, kept: int
) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """Sum entries of one row and id, and keep each row's likeliest ids."""
    ids_PC = np.full((rows, kept), -1, np.int32)
    probs_PC = np.zeros((rows, kept), np.float32)
    for start in range(0, rows, _ROWS_AT_ONCE):
        parts = [_between(e, start, start + _ROWS_AT_ONCE) for e in entries]
        key = np.concatenate([e.rows * vocab_size + e.ids for e in parts])
        unique, inverse = np.unique(key, return_inverse=True)
        total = np.bincount(inverse, np.concatenate([e.probs for e in parts]), len(unique))
        row, ids = np.divmod(unique, vocab_size)
        order = np.lexsort((ids, -total, row))
        row, ids, total = row[order], ids[order], total[order]
        rank = np.arange(len(row)) - np.searchsorted(row, row)
        best = rank < kept
        ids_PC[row[best], rank[best]] = ids[best]
        probs_PC[row[best], rank[best]] = total[best]
    return ids_PC, probs_PC


def _between(entries: _Entries, start: int, end: int) -> _Entries:
    inside = (entries.rows >= start) & (entries.rows < end)
    return _Entries(entries.rows[inside], entries.ids[inside], entries.probs[inside])


def chunk_targets(
    student: LogitContribution,
    experts: Sequence[LogitContribution],
    weights_PS: NDArray[np.float32],
) -> ChunkTargets:
    """Lay out the chunks of two and more student tokens at the row where each ends.

    Chunks of one student token are in the span targets, whose own token is then exact.
    Args: weights_PS: of the experts alone, in their order.
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
        logprob[last, index] = chunk_logprobs(expert, alignment)[long]
        weight[last, index] = weights_PS[alignment.student_rows[long], index]
    return ChunkTargets(*(torch.from_numpy(a) for a in (length, logprob, weight)))


def rank_targets(student: LogitContribution, experts: Sequence[LogitContribution]) -> RankTargets:
    """Pair the j-th row of every document, as InfiFusion's released data layer does.

    The longer side's rest is cut off. Positions drift apart as soon as two tokenizers differ:
    that is the baseline's own fault, kept on purpose.
    """
    shape = (student.header.positions, len(experts))
    mask = np.zeros(shape, bool)
    probs = torch.zeros((*shape, INFIFUSION_K))
    for index, expert in enumerate(experts):
        counts = np.minimum(np.diff(student.doc_offsets), np.diff(expert.doc_offsets))
        inside = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        mine = np.repeat(student.doc_offsets[:-1], counts) + inside
        theirs = np.repeat(expert.doc_offsets[:-1], counts) + inside
        top = torch.from_numpy(expert.topk_logprobs[theirs, :INFIFUSION_K].astype(np.float32))
        probs[mine, index] = standardize(top).softmax(-1)
        mask[mine, index] = True
    return RankTargets(probs, torch.from_numpy(mask))
