"""One expert's view of a prompt set, in memory: what alignment, routing and targets read.

Shapes: D = documents, P = positions (tokens, each document's eos among them), K = kept ids,
V = vocabulary. Log-probabilities are in nats, natural and at temperature 1.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Final, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

CODEC_VERSION: Final = 2
LOGPROB_FLOOR: Final = -60.0
"""Smaller log-probabilities (below 1e-26) are held as this, so that every value is finite."""

Code = Literal[
    "truncated",
    "malformed",
    "not_finite",
    "mass",
    "wrong_k",
    "id_out_of_vocabulary",
    "wrong_prompt_set",
    "wrong_pivot",
    "wrong_shape",
    "missing_tensor",
    "unknown_tensor",
]


class ContributionError(ValueError):
    """A contribution is not what the round asked for; `code` names how."""

    def __init__(self, code: Code, message: str) -> None:
        super().__init__(message)
        self.code: Code = code


@dataclass(frozen=True, slots=True, kw_only=True)
class LogitHeader:
    """What a logits contribution says of itself. Hashes are lower-case hex sha256."""

    codec_version: int
    prompt_set_sha256: str
    tokenizer_sha256: str
    model_sha256: str
    pivot_sha256: str
    """The pivot against which positions were chosen; "" when all were shipped."""
    sampler: str
    """top_k: each row's likeliest ids; samples: what was drawn, and how often."""
    draws: int
    """Draws per row at most (samples); 0 for top_k."""
    vocab_size: int
    top_k: int
    documents: int
    positions: int
    shipped: int
    """Positions whose row of ids is there."""
    eos_id: int
    prefix_bytes: int
    """1 for a tokenizer that reads every text with one space before it (SentencePiece), else 0."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LogitContribution:
    """One expert's view of a prompt set, or of a run of its documents.

    Row p is the distribution over token p given the tokens before it in its document (its first
    row: given eos as start). The last row of a document is its eos.
    """

    header: LogitHeader
    doc_offsets: NDArray[np.int64]
    """[D+1] first row of each document; the last entry is P."""
    token_ids: NDArray[np.int32]
    """[P] the text's own tokens."""
    byte_ends: NDArray[np.int32]
    """[P] bytes of the document's text read once token p is; a prefix does not count."""
    own_logprob: NDArray[np.float32]
    """[P] log-probability of token_ids[p]; there for every row."""
    topk_ids: NDArray[np.int32]
    """[P, K] the likeliest ids, likeliest first; -1: no id, in a whole row that is not shipped."""
    topk_logprobs: NDArray[np.float32]
    """[P, K] their log-probabilities; the floor where there is no id."""
    tail_logprob: NDArray[np.float32]
    """[P] log of all the other ids' mass together: 0 in a row that is not shipped."""
    vocab_bytes: NDArray[np.uint8]
    """The bytes of every id, one after the other."""
    vocab_offsets: NDArray[np.int64]
    """[V+1] where each id's bytes start; specials have none."""

    @property
    def shipped(self) -> NDArray[np.bool_]:
        """[P] whether the row of ids is there."""
        return self.topk_ids[:, 0] >= 0

    def documents(self, start: int, stop: int) -> LogitContribution:
        """Return the documents start..stop-1 as a contribution of their own; nothing is copied."""
        first, last = int(self.doc_offsets[start]), int(self.doc_offsets[stop])
        rows = slice(first, last)
        header = replace(
            self.header,
            documents=stop - start,
            positions=last - first,
            shipped=int(self.shipped[rows].sum()),
        )
        return replace(
            self,
            header=header,
            doc_offsets=self.doc_offsets[start : stop + 1] - first,
            **{name: getattr(self, name)[rows] for name in ROW_ARRAYS},
        )


ROW_ARRAYS: Final = (
    "token_ids",
    "byte_ends",
    "own_logprob",
    "topk_ids",
    "topk_logprobs",
    "tail_logprob",
)
"""The arrays of a contribution that have one entry per position."""


class LogitSource(Protocol):
    """Whatever gives documents of a prompt set as contributions: one in memory, or a file."""

    @property
    def header(self) -> LogitHeader:
        """Of the whole prompt set."""
        ...

    def documents(self, start: int, stop: int) -> LogitContribution:
        """Return the documents start..stop-1."""
        ...


def join(parts: Sequence[LogitContribution]) -> LogitContribution:
    """Put runs of documents of one contribution together again."""
    counts = {
        name: sum(getattr(part.header, name) for part in parts)
        for name in ("documents", "positions", "shipped")
    }
    lengths = np.concatenate([np.diff(part.doc_offsets) for part in parts])
    return replace(
        parts[0],
        header=replace(parts[0].header, **counts),
        doc_offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        **{name: np.concatenate([getattr(p, name) for p in parts]) for name in ROW_ARRAYS},
    )


def runs(doc_offsets: NDArray[np.int64], rows: int) -> Iterator[tuple[int, int]]:
    """Cut documents into runs of at most `rows` positions, or of one longer document.

    Yields: (start, stop) of each run.
    """
    start, documents = 0, len(doc_offsets) - 1
    while start < documents:
        fits = int(np.searchsorted(doc_offsets, doc_offsets[start] + rows, side="right")) - 1
        stop = max(fits, start + 1)
        yield start, stop
        start = stop
