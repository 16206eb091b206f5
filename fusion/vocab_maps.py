"""What the ids of one vocabulary mean in another: by equal bytes, by first piece, by edits, by W.

Vocabularies are compared by the bytes that their ids write (fusion.byte_tables), never by token
strings: the same space is written in three ways there. Shapes: V_S, V_T = ids of the student and
of the teacher; specials and padding write no bytes and, eos apart, correspond to nothing (-1).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerFast

from fusion.byte_tables import TokenizerError, encode_text
from fusion.contribution import LogitContribution
from fusion.edit_distance import NearestStrings

PROJECTION_WIDTH: Final = 4
PROJECTION_DECAY: Final = 0.5
"""Weight of a piece over that of the piece before it. Our choice: the paper only says that weights
decay exponentially."""


def vocabulary(contribution: LogitContribution) -> list[bytes]:
    """Return the bytes of every id; specials and padding have none."""
    raw, offsets = contribution.vocab_bytes.tobytes(), contribution.vocab_offsets.tolist()
    return [raw[a:b] for a, b in pairwise(offsets)]


def ids_by_bytes(pieces: Sequence[bytes]) -> dict[bytes, int]:
    """Return the id of each piece. Of two ids with equal bytes the later is taken.

    The twins are SentencePiece's byte `<0x41>` and its piece `A`: in the vocabularies of Llama 2
    and Mistral bytes come first, and are written only where there is no piece. Which of the two
    another tokenizer writes only the tokenizer knows (first_pieces asks it).
    """
    return {piece: index for index, piece in enumerate(pieces) if piece}


def map_ids(
    student: LogitContribution,
    teacher: LogitContribution,
    first_pieces: Sequence[int] | None = None,
) -> NDArray[np.int64]:
    """Map every teacher id to the student id that writes the same bytes, eos to eos, else -1.

    Args: first_pieces: [V_T] what the student's tokenizer writes first for each teacher token, or
        -1; taken where no student id has equal bytes, or several have. If the teacher's token
        comes next in the text, so does that piece, so the id still names an event.
    """
    mine, theirs = vocabulary(student), vocabulary(teacher)
    by_bytes = ids_by_bytes(mine)
    mapped = np.full(len(theirs), -1, np.int64)
    for index, piece in enumerate(theirs):
        first = -1 if first_pieces is None else first_pieces[index]
        known = 0 <= first < len(mine)
        if piece and known and mine[first] == piece:
            mapped[index] = first
        elif piece:
            mapped[index] = by_bytes.get(piece, first if known else -1)
    mapped[int(teacher.token_ids[-1])] = int(student.token_ids[-1])
    return mapped


def first_pieces(tokenizer: PreTrainedTokenizerFast, teacher: LogitContribution) -> list[int]:
    """Return [V_T] what the student writes first for the bytes of each teacher id; -1 if nothing.

    The bytes are read as the middle of a text, so no prefix is written before them.
    """
    pieces = []
    for piece in vocabulary(teacher):
        try:
            ids = encode_text(tokenizer, piece.decode(), prefixed=False)
        except (UnicodeDecodeError, TokenizerError):
            ids = []  # part of a character, or a text that the student cannot write
        pieces.append(ids[0] if ids else -1)
    return pieces


def projection(
    student_pieces: Sequence[bytes],
    teacher_pieces: Sequence[bytes],
    *,
    eos: tuple[int, int],
    encode: Callable[[bytes], Sequence[int]] | None = None,
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Return X-Token's W: how the mass of each student id spreads over teacher ids.

    A student id with a teacher id of equal bytes gives it all. Any other is read with the
    teacher's vocabulary, and its first four pieces share its mass in falling powers of
    PROJECTION_DECAY. Rows sum to 1, or to 0 where the teacher has no such bytes.
    Args: eos: the student's and the teacher's. encode: how the teacher's tokenizer cuts bytes;
        None: the longest piece first, which needs no tokenizer (a contribution ships none).
    Returns: ids [V_S, 4], -1 for none; weights [V_S, 4].
    Source: X-Token (arXiv 2605.21699), projection matrix W.
    """
    by_bytes = ids_by_bytes(teacher_pieces)
    longest = max(map(len, by_bytes), default=0)
    ids = np.full((len(student_pieces), PROJECTION_WIDTH), -1, np.int64)
    weights = np.zeros(ids.shape, np.float32)
    for row, piece in enumerate(student_pieces):
        if row == eos[0]:
            found: Sequence[int] = [eos[1]]
        elif piece in by_bytes:
            found = [by_bytes[piece]]
        else:
            found = encode(piece) if encode and piece else _cut(piece, by_bytes, longest)
        if count := min(len(found), PROJECTION_WIDTH):
            ids[row, :count] = found[:count]
            shares = PROJECTION_DECAY ** np.arange(count)
            weights[row, :count] = shares / shares.sum()
    return ids, weights


def _cut(piece: bytes, by_bytes: dict[bytes, int], longest: int) -> list[int]:
    """Cut bytes into the longest known pieces, from the left; nothing where one byte is unknown."""
    found, start = [], 0
    while start < len(piece):
        ends = range(min(len(piece), start + longest), start, -1)
        end = next((e for e in ends if piece[start:e] in by_bytes), None)
        if end is None:
            return []
        found.append(by_bytes[piece[start:end]])
        start = end
    return found


class MinedMap:
    """Every teacher id's student id: the one with equal bytes, else the nearest in edits.

    An id is looked up when it is first asked for, a few milliseconds each where bytes differ.
    Source: FuseLLM (arXiv 2401.10491), vocabulary mapping by minimal edit distance (MinED).
    """

    def __init__(
        self,
        student_pieces: Sequence[bytes],
        teacher_pieces: Sequence[bytes],
        *,
        eos: tuple[int, int],
    ) -> None:
        """Prepare the search. Args: eos: the student's and the teacher's."""
        self._by_bytes = ids_by_bytes(student_pieces)
        self._known = list(self._by_bytes)
        self._strings = NearestStrings(self._known)
        self._pieces = teacher_pieces
        self._mapped = np.asarray([self._by_bytes.get(p, -1) for p in teacher_pieces], np.int64)
        self._mapped[eos[1]] = eos[0]
        self._open = (self._mapped < 0) & np.asarray([p != b"" for p in teacher_pieces])

    def of(self, ids: NDArray[np.integer[Any]]) -> NDArray[np.int64]:
        """Return the student ids of teacher ids, in their shape; -1 for specials, padding, -1."""
        named = ids >= 0
        asked = np.unique(ids[named])
        for index in asked[self._open[asked]].tolist():
            nearest = self._known[self._strings.nearest(self._pieces[index])]
            self._mapped[index] = self._by_bytes[nearest]
            self._open[index] = False
        return np.where(named, self._mapped[ids], -1)
