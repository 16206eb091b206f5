"""Where two tokenizations of one text may be compared: where both have read the same bytes.

Row p of a contribution predicts token p from the tokens before it, so a row's place in the text
is the number of bytes read BEFORE token p: prediction prefixes are aligned, never the tokens
themselves. A document's eos row has read all of it, so eos meets eos; a token that ends inside a
character is a place like any other. Of several rows at one byte (a token may write nothing: the
space that SentencePiece reads before a text) the last is the place: it predicts the next byte.
Shapes: P = rows of a contribution, M = common places.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fusion.contribution import LogitContribution


@dataclass(frozen=True, slots=True)
class Alignment:
    """The common places of a student and a teacher, in the order of the text.

    Between two neighbouring places lies a chunk: the same bytes, read as student rows
    [student_rows[m], student_ends[m]) and as teacher rows [teacher_rows[m], teacher_ends[m]).
    Rows before a document's first place, which read its prefix alone, are in no chunk.
    """

    student_rows: NDArray[np.int64]
    teacher_rows: NDArray[np.int64]
    student_ends: NDArray[np.int64]
    teacher_ends: NDArray[np.int64]


def row_starts(contribution: LogitContribution) -> NDArray[np.int64]:
    """Return [P] bytes of the whole prompt set read before each row; each document adds one.

    The one more byte per document keeps a document's eos row apart from the next one's first.
    """
    c = contribution
    firsts, lasts = c.doc_offsets[:-1], c.doc_offsets[1:] - 1
    starts = np.zeros(len(c.byte_ends), np.int64)
    starts[1:] = c.byte_ends[:-1]
    starts[firsts] = 0
    sizes = c.byte_ends[lasts].astype(np.int64) + 1
    return np.asarray(starts + np.repeat(np.cumsum(sizes) - sizes, np.diff(c.doc_offsets)))


def align(student: LogitContribution, teacher: LogitContribution) -> Alignment:
    """Find the rows at which both have read exactly the same bytes. O(bytes of the text).

    Raises: ValueError when the two were not computed on the same documents.
    """
    mine, theirs = (c.byte_ends[c.doc_offsets[1:] - 1] for c in (student, teacher))
    if not np.array_equal(mine, theirs):
        raise ValueError(
            "the two contributions hold documents of other lengths; both must be computed on "
            "one prompt set"
        )
    student_starts, teacher_starts = row_starts(student), row_starts(teacher)
    row_at = np.full(student_starts[-1] + 1, -1, dtype=np.int64)
    row_at[student_starts] = np.arange(len(student_starts))  # of equal ones the last is kept
    is_place = np.append(np.diff(teacher_starts) > 0, True)
    teacher_rows = np.flatnonzero(is_place & (row_at[teacher_starts] >= 0))
    student_rows = row_at[teacher_starts[teacher_rows]]
    return Alignment(
        student_rows,
        teacher_rows,
        _chunk_ends(student, student_rows),
        _chunk_ends(teacher, teacher_rows),
    )


def _chunk_ends(contribution: LogitContribution, rows: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return [M] where each chunk ends: at the next place, or where the document does."""
    doc_ends = contribution.doc_offsets[1:]
    own_end = doc_ends[np.searchsorted(doc_ends, rows, side="right")]
    return np.asarray(np.minimum(np.append(rows[1:], own_end[-1]), own_end))


def loglik(
    contribution: LogitContribution, starts: NDArray[np.int64], ends: NDArray[np.int64]
) -> NDArray[np.float64]:
    """Return [M] nats: how likely the contribution finds its rows starts to ends-1 together."""
    total = np.concatenate([[0.0], np.cumsum(contribution.own_logprob, dtype=np.float64)])
    return np.asarray(total[ends] - total[starts])
