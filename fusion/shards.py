"""The prompt set in runs of documents, as the pivot and as every source sees them.

Shapes: P = rows of the pivot's stream, D = documents.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Final

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerFast

from fusion.codec import LogitFile
from fusion.contribution import ContributionError, LogitContribution, LogitSource
from fusion.credit import BASE
from fusion.vocab_maps import first_pieces, map_ids

SHARD_DOCUMENTS: Final = 256


class Shards:
    """Cuts a prompt set into shards, and reads each when it is asked for."""

    def __init__(
        self,
        base: LogitFile,
        contributions: Mapping[str, LogitSource],
        ids: NDArray[np.int32],
        written_D: NDArray[np.bool_],
        tokenizer: PreTrainedTokenizerFast,
    ) -> None:
        self.names = (BASE, *sorted(contributions))
        self._sources = [contributions[name] for name in self.names[1:]]
        self._base, self._ids, self._written_D = base, ids, written_D
        self._offsets = np.append(0, np.flatnonzero(ids == ids[-1]) + 1)  # eos ends documents
        first = base.documents(0, 1)
        experts = [source.documents(0, 1) for source in self._sources]
        pieces = [first_pieces(tokenizer, expert) for expert in experts]
        identity = np.arange(base.header.vocab_size)
        self.maps: list[NDArray[np.int64]] = [
            identity,
            *(map_ids(first, e, p) for e, p in zip(experts, pieces, strict=True)),
        ]

    def __iter__(self) -> Iterator[int]:
        return iter(range(0, self._base.header.documents, SHARD_DOCUMENTS))

    def of(self, start: int) -> tuple[LogitContribution, list[LogitContribution]]:
        """Return the shard that starts at this document: the base's view, then the sources'."""
        stop = min(start + SHARD_DOCUMENTS, self._base.header.documents)
        base = self._base.documents(start, stop)
        # A file tells ids by their bytes; two ids may write the same, and ours are known.
        mine = self._ids[self._offsets[start] : self._offsets[stop]]
        student = replace(base, token_ids=mine)
        experts = [source.documents(start, stop) for source in self._sources]
        for name, expert in zip(self.names[1:], experts, strict=True):
            _require_sound(name, expert, student)
        return student, experts

    def written(self, start: int, student: LogitContribution) -> NDArray[np.bool_]:
        """Return [P] whether the pivot wrote the document of each row of this shard."""
        flags_D = self._written_D[start : start + student.header.documents]
        return np.repeat(flags_D, np.diff(student.doc_offsets))


def _require_sound(name: str, expert: LogitContribution, student: LogitContribution) -> None:
    """Check what only a contribution that never was a file can get wrong; files are checked."""
    found_D, wanted_D = (c.byte_ends[c.doc_offsets[1:] - 1] for c in (expert, student))
    if not np.array_equal(found_D, wanted_D):
        raise ValueError(
            f"{name} read {found_D.sum()} bytes of {student.header.documents} documents that have "
            f"{wanted_D.sum()}, or cut them elsewhere; extract its logits from this prompt set"
        )
    for field in ("own_logprob", "topk_logprobs", "tail_logprob"):
        if not np.isfinite(getattr(expert, field)).all():
            raise ContributionError(
                "not_finite",
                f"{field} of {name} holds NaN or infinity: its model diverged; train it again, "
                "or fuse without it",
            )
