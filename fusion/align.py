"""Where two tokenizations of one text may be compared: where both have read the same bytes.

Row p of a contribution predicts token p from the tokens before it, so a row's place in the text
is the number of bytes read BEFORE token p: prediction prefixes are aligned, never the tokens
themselves. A document's eos row has read all of it, so eos meets eos; a token that ends inside a
character is a place like any other. Shapes: P = rows of the student, M = common places, V = ids.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from fusion.codec import LogitContribution


@dataclass(frozen=True, slots=True)
class Alignment:
    """The common places of a student and a teacher, in the order of the text.

    Between two neighbouring places lies a chunk: the same bytes, read as student rows
    [student_rows[m], student_ends[m]) and as teacher rows [teacher_rows[m], teacher_ends[m]).
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
    lengths = np.diff(c.vocab_offsets)[c.token_ids]
    lengths[c.doc_offsets[1:] - 1] = 1
    return np.concatenate([[0], np.cumsum(lengths)[:-1]])


def align(student: LogitContribution, teacher: LogitContribution) -> Alignment:
    """Find the rows at which both have read exactly the same bytes. O(bytes of the text).

    Raises: ValueError when the two were not computed on the same documents.
    """
    student_starts, teacher_starts = row_starts(student), row_starts(teacher)
    if not np.array_equal(
        _doc_starts(student, student_starts), _doc_starts(teacher, teacher_starts)
    ):
        raise ValueError(
            "the two contributions hold documents of other lengths; both must be computed on "
            "one prompt set"
        )
    row_at = np.full(student_starts[-1] + 1, -1, dtype=np.int64)
    row_at[student_starts] = np.arange(len(student_starts))
    found = row_at[teacher_starts]
    teacher_rows = np.flatnonzero(found >= 0)
    student_rows = found[teacher_rows]
    # Every document's first row is common, so a chunk never leaves its document.
    return Alignment(
        student_rows,
        teacher_rows,
        np.append(student_rows[1:], len(student_starts)),
        np.append(teacher_rows[1:], len(teacher_starts)),
    )


def _doc_starts(contribution: LogitContribution, starts: NDArray[np.int64]) -> NDArray[np.int64]:
    return np.append(starts[contribution.doc_offsets[:-1]], starts[-1])


def coverage(alignment: Alignment, student_rows: int) -> float:
    """Return the share of the student's rows that are common places."""
    return len(alignment.student_rows) / student_rows


def vocabulary(contribution: LogitContribution) -> list[bytes]:
    """Return the bytes of every id; specials and padding have none."""
    raw, offsets = contribution.vocab_bytes.tobytes(), contribution.vocab_offsets.tolist()
    return [raw[a:b] for a, b in pairwise(offsets)]


def map_ids(
    student: LogitContribution,
    teacher: LogitContribution,
    first_pieces: Sequence[int] | None = None,
) -> NDArray[np.int64]:
    """Map every teacher id to the student id that writes the same bytes, eos to eos, else -1.

    Args: first_pieces: [V of teacher] what the student's tokenizer writes first for each
        teacher token, or -1; taken where no student id has equal bytes. If the teacher's token
        comes next in the text, so does that piece, so the id still names an event.
    """
    by_bytes: dict[bytes, int] = {}
    for index, piece in enumerate(vocabulary(student)):
        if piece:
            by_bytes.setdefault(piece, index)
    pieces = vocabulary(teacher)
    fallback = [-1] * len(pieces) if first_pieces is None else first_pieces
    mapped = [by_bytes.get(piece, fallback[i]) if piece else -1 for i, piece in enumerate(pieces)]
    mapped[int(teacher.token_ids[-1])] = int(student.token_ids[-1])
    return np.asarray(mapped, dtype=np.int64)
