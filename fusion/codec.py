"""Logits contributions as files: written in runs of documents, and checked to the last value.

Whatever arrives is hostile until check_logits has read all of it, in memory that does not grow
with the file. Shapes: R = rows of ids, K = kept ids, V = vocabulary, P = positions.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Final

import numpy as np
from numpy.typing import NDArray

from fusion import packing
from fusion.contribution import ContributionError, LogitContribution, LogitHeader, runs
from fusion.logit_file import LogitFile, layout
from fusion.public_pieces import public_only
from fusion.tensor_file import TensorFile, TensorWriter, malformed

__all__ = [
    "LogitFile",
    "LogitWriter",
    "check_logits",
    "read_logits",
    "rewrite_logits",
    "write_logits",
]

ROWS_AT_ONCE: Final = 1 << 14
_SHA256: Final = re.compile("[0-9a-f]{64}")
_STEP: Final = 1 / packing.STEPS_PER_NAT
_LAST: Final = -packing.LAST_CODE / packing.STEPS_PER_NAT


class LogitWriter:
    """Writes a contribution whose documents come in runs; the file appears whole, or not at all."""

    def __init__(
        self,
        path: Path,
        header: LogitHeader,
        *,
        doc_offsets: NDArray[np.int64],
        vocab_bytes: NDArray[np.uint8],
        vocab_offsets: NDArray[np.int64],
        shipped: NDArray[np.bool_] | None = None,
    ) -> None:
        """Lay the file out; all of these are of the whole prompt set.

        Args: shipped: [P] whether a row of ids is shipped; None: all are.
        """
        self._header, self._row, self._kept, self._document = header, 0, 0, 0
        self._doc_offsets, self._lengths = doc_offsets, np.diff(vocab_offsets)
        arrays = layout(header, vocab_bytes.size, int(self._lengths.max()))
        self._writer = TensorWriter(path, arrays, header)
        self._length_dtype = arrays["byte_lengths"].dtype
        self._writer.put("doc_offsets", doc_offsets)
        self._writer.put("vocab_lengths", self._lengths.astype(np.uint16))
        self._writer.put("vocab_bytes", vocab_bytes)
        self._shipped = np.ones(header.positions, bool) if shipped is None else shipped
        if "shipped_bits" in arrays:
            self._writer.put("shipped_bits", np.packbits(self._shipped, bitorder="little"))

    def write(self, run: LogitContribution) -> None:
        """Write the next documents. Raises: ContributionError when a value is not finite."""
        after = self._document + run.header.documents
        if not np.array_equal(
            run.doc_offsets + self._row, self._doc_offsets[self._document : after + 1]
        ):
            raise ValueError(f"documents {self._document}..{after} have other lengths than told")
        for start, stop in runs(run.doc_offsets, ROWS_AT_ONCE):
            self._put(run.documents(start, stop))
        self._document = after

    def _put(self, run: LogitContribution) -> None:
        for name in ("own_logprob", "topk_logprobs", "tail_logprob"):
            if not np.isfinite(getattr(run, name)).all():
                raise ContributionError(
                    "not_finite", f"{name} holds NaN or infinity: the model diverged; train again"
                )
        put, row, kept = self._writer.put, self._row, self._kept
        lengths = self._lengths[run.token_ids].astype(self._length_dtype)
        put("byte_lengths", lengths, row)
        put("own", packing.encode_logprobs(run.own_logprob), row)
        shipped = run.shipped
        if not np.array_equal(shipped, self._shipped[row : row + len(shipped)]):
            raise ValueError(f"other rows of ids behind row {row} than told")
        ids, logprobs = run.topk_ids[shipped], run.topk_logprobs[shipped]
        if self._header.sampler == "top_k":
            put("topk", packing.encode_logprobs(logprobs), kept)
            put("tail", packing.encode_logprobs(run.tail_logprob[shipped]), kept)
        else:
            put("topk", _counts(ids, logprobs, self._header.draws), kept)
            ids = np.maximum(ids, 0)
        put("topk_ids", packing.pack(ids, packing.bits_for(self._header.vocab_size)), kept)
        self._row += run.header.positions
        self._kept += len(ids)

    def __enter__(self) -> LogitWriter:
        self._writer.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Put the file in its place; leave nothing after an error or when documents are missing."""
        done, wanted = (self._row, self._kept), (self._header.positions, self._header.shipped)
        missing = None
        if error is None and done != wanted:
            missing = ValueError(f"{done} rows and rows of ids were written, {wanted} were told")
        self._writer.__exit__(kind, error or missing, trace)
        if missing is not None:
            raise missing


def _counts(
    ids_RK: NDArray[np.int32], logprobs_RK: NDArray[np.float32], draws: int
) -> NDArray[np.uint8]:
    """How often each id was drawn. A row had all the draws, or as many as it has columns."""
    share_RK = np.exp(logprobs_RK.astype(np.float64)) * (ids_RK >= 0)
    counts_RK = np.rint(share_RK * draws)
    fewer = np.abs(share_RK * draws - counts_RK).max(axis=1, initial=0) > 1e-3
    counts_RK[fewer] = np.rint(share_RK[fewer] * min(draws, ids_RK.shape[1]))
    return np.asarray(counts_RK, dtype=np.uint8)


def write_logits(path: Path, contribution: LogitContribution) -> None:
    """Write a whole contribution. Raises: ContributionError when a value is not finite."""
    c = contribution
    with LogitWriter(
        path,
        c.header,
        doc_offsets=c.doc_offsets,
        vocab_bytes=c.vocab_bytes,
        vocab_offsets=c.vocab_offsets,
        shipped=c.shipped,
    ) as writer:
        writer.write(c)


def read_logits(path: Path, prompts: Sequence[str | bytes]) -> LogitContribution:
    """Read a whole contribution that check_logits has accepted. Raises ContributionError."""
    file = LogitFile(path, prompts)
    return file.documents(0, file.header.documents)


# ---------------------------------------------------------------------------- checking
def check_logits(
    path: Path, *, prompts: Sequence[str | bytes], prompt_set_sha256: str, top_k: int
) -> LogitHeader:
    """Read a contribution to the last value and refuse anything the round did not ask for.

    Args: prompts: the set's documents (bytes: UTF-8).
    Raises: ContributionError, whose code says what is wrong and whose text says what to do.
    """
    file = _asked_for(path, prompts, prompt_set_sha256, top_k)
    for start, stop in file.runs(ROWS_AT_ONCE):
        _check_rows(file.documents(start, stop))
    return file.header


def rewrite_logits(
    path: Path, out: Path, *, prompts: Sequence[str | bytes], prompt_set_sha256: str, top_k: int
) -> LogitHeader:
    """Check as check_logits does, and write the values that were read as a file of our own.

    Not one byte is copied: what the layout leaves to a writer's choice (order, spaces, names) is
    chosen here, so nothing can be told by it; nor by words that only private text has made pieces
    of the vocabulary (fusion/public_pieces.py). Else a file of LogitWriter comes out as it was.
    Args: out: appears whole, or not at all.
    Raises: ContributionError.
    """
    file = _asked_for(path, prompts, prompt_set_sha256, top_k)
    vocab_bytes, vocab_offsets = public_only(*file.vocabulary, prompts)
    with LogitWriter(
        out,
        file.header,
        doc_offsets=file.doc_offsets,
        vocab_bytes=vocab_bytes,
        vocab_offsets=vocab_offsets,
        shipped=file.shipped(),
    ) as writer:
        for start, stop in file.runs(ROWS_AT_ONCE):
            run = file.documents(start, stop)
            _check_rows(run)
            writer.write(run)
    return file.header


def _asked_for(
    path: Path, prompts: Sequence[str | bytes], prompt_set_sha256: str, top_k: int
) -> LogitFile:
    """Open a contribution whose header says what the round wants. Raises: ContributionError."""
    header = TensorFile(path, LogitHeader).header
    if header.prompt_set_sha256 != prompt_set_sha256:
        raise ContributionError(
            "wrong_prompt_set",
            f"computed on prompt set {header.prompt_set_sha256[:12]}, this round's is "
            f"{prompt_set_sha256[:12]}: pull the round's prompt set and compute again",
        )
    if header.top_k != top_k:
        raise ContributionError(
            "wrong_k", f"holds top {header.top_k}, the round asks for {top_k}: export again"
        )
    for name in ("tokenizer_sha256", "model_sha256", "pivot_sha256"):
        value = getattr(header, name)
        if not _SHA256.fullmatch(value) and (name, value) != ("pivot_sha256", ""):
            raise malformed(f"{name} is {value[:80]!r}, no sha256")
    return LogitFile(path, prompts)


def check_asked(
    header: LogitHeader, *, sampler: str, draws: int, share: float, pivot_sha256: str
) -> None:
    """Refuse a contribution whose rows were not chosen as the round asked.

    Args: share: of the positions, at most. pivot_sha256: of the pivot that they were to be chosen
        against, unless all were asked for.
    Raises: ContributionError.
    """
    found = (header.sampler, header.draws, header.pivot_sha256)
    against = "" if share == 1 else pivot_sha256
    wanted = (sampler, draws if sampler == "samples" else 0, against)
    if found != wanted:
        raise malformed(
            f"rows are of sampler {found[0]!r}, {found[1]} draws, pivot {found[2][:12]!r}, the "
            f"round asks for {wanted[0]!r}, {wanted[1]}, {wanted[2][:12]!r}"
        )
    most = math.floor(share * header.positions)
    if header.shipped > most or (share == 1 and header.shipped < header.positions):
        raise malformed(
            f"holds {header.shipped} rows of {header.positions}, the round asks for "
            f"{'all' if share == 1 else f'{most} at most'}"
        )


def _check_rows(c: LogitContribution) -> None:
    """Check that every row of ids is a distribution: sorted, distinct, whole, true to its own."""
    shipped = c.shipped
    ids_RK, top_RK, own_R = c.topk_ids[shipped], c.topk_logprobs[shipped], c.own_logprob[shipped]
    if (np.diff(top_RK, axis=1) > 0).any():
        raise malformed("a row's ids are not sorted, likeliest first")
    sorted_RK = np.sort(ids_RK, axis=1)
    if ((np.diff(sorted_RK, axis=1) == 0) & (sorted_RK[:, 1:] >= 0)).any():
        raise malformed("topk_ids holds an id twice in one row")
    if c.header.sampler != "top_k":
        return  # LogitFile has counted the draws, and a draw need not be the text's own token.
    tail_R = c.tail_logprob[shipped]
    _check_mass(top_RK, tail_R, c.header.vocab_size)
    hit_RK = ids_RK == c.token_ids[shipped][:, None]
    top_own_R = np.where(hit_RK, top_RK, 0).sum(axis=1)
    # A token that was not kept is no likelier than the last kept one, nor than all such together.
    most_R = np.minimum(top_RK[:, -1], np.maximum(tail_R + _STEP, _LAST))
    if (np.where(hit_RK.any(axis=1), own_R != top_own_R, own_R > most_R)).any():
        raise malformed("own_logprob contradicts the row's top ids")


def _check_mass(top_RK: NDArray[np.float32], tail_R: NDArray[np.float32], vocab_size: int) -> None:
    """Check that each row sums to 1, up to what rounding to the codec's step explains."""
    mass_R = np.exp(top_RK).sum(axis=1) + np.exp(tail_R)
    # What is below the last code reads as the last code, and so adds up to its mass.
    spare = (top_RK.shape[1] + 1) * math.exp(_LAST) + 1e-4
    low, high = math.exp(-packing.MAX_ERROR) - spare, math.exp(packing.MAX_ERROR) + spare
    if ((mass_R < low) | (mass_R > high)).any():
        raise ContributionError(
            "mass",
            f"a row's probabilities sum to {mass_R.min():.3f}..{mass_R.max():.3f}, wanted "
            f"{low:.3f}..{high:.3f}: ship log-softmax over the whole vocabulary at temperature 1, "
            "never renormalised",
        )
    left = vocab_size - top_RK.shape[1]
    most_R = top_RK[:, -1] + math.log(left) + 2 * _STEP if left else np.full(len(top_RK), _LAST)
    if (tail_R > np.maximum(most_R, _LAST)).any():
        raise ContributionError(
            "mass",
            f"a row leaves more to its tail than {left} ids no likelier than its last can hold: "
            "ship the likeliest ids",
        )
