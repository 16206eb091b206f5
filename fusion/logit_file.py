"""The file of a logits contribution: 55 bytes per token at K = 16 and 151,936 ids.

Arrays (R = rows shipped; other shapes as in fusion.contribution):
    doc_offsets i64 [D+1]; vocab_lengths u16 [V]; vocab_bytes u8;
    byte_lengths u8 [P]: bytes each token writes, 0 for eos (u16 where a token writes over 255);
    own u8 [P]; shipped_bits u8 [P/8], where a row is left out; topk_ids u8 [R, K * bits / 8];
    topk u8 [R, K]; tail u8 [R], where sampler is top_k.
The text's own tokens are not in it. The reader has the public text and the id -> bytes table, so
byte lengths say them all, and a file that does not spell the prompt set cannot be read.
What cannot be decoded is refused here; whether it makes sense is for check_logits to say.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from fusion import packing
from fusion.contribution import (
    LOGPROB_FLOOR,
    ContributionError,
    LogitContribution,
    LogitHeader,
    runs,
)
from fusion.tensor_file import Entry, TensorFile, malformed

MAX_VOCABULARY: Final = 1 << 24
_VOCABULARY: Final = ("vocab_lengths", "vocab_bytes")
_BITS_A_STEP: Final = 1 << 15


def layout(header: LogitHeader, vocab_bytes: int, longest: int) -> dict[str, Entry]:
    """Every array of a file, widest dtype first. Args: longest: bytes of the longest token."""
    columns, vocab = header.top_k, header.vocab_size
    arrays = {
        "doc_offsets": Entry("int64", (header.documents + 1,)),
        "vocab_lengths": Entry("uint16", (vocab,)),
        "byte_lengths": Entry("uint8" if longest < 256 else "uint16", (header.positions,)),
        "own": Entry("uint8", (header.positions,)),
        "topk_ids": Entry(
            "uint8", (header.shipped, packing.row_bytes(columns, packing.bits_for(vocab)))
        ),
        "topk": Entry("uint8", (header.shipped, columns)),
        "vocab_bytes": Entry("uint8", (vocab_bytes,)),
    }
    if header.shipped < header.positions:
        arrays["shipped_bits"] = Entry("uint8", (-(-header.positions // 8),))
    if header.sampler == "top_k":
        arrays["tail"] = Entry("uint8", (header.shipped,))
    return dict(sorted(arrays.items(), key=lambda item: item[1].dtype))


class LogitFile:
    """A contribution on disk, of which only the documents asked for are read.

    Memory: a table of the vocabulary, 8 bytes per document, and what is asked for.
    """

    def __init__(self, path: Path, prompts: Sequence[str | bytes]) -> None:
        """Check everything but the rows. Args: prompts: the set's documents (bytes: UTF-8).

        Raises: ContributionError.
        """
        self._file = TensorFile(path, LogitHeader)
        self.header = header = self._file.header
        self._prompts = prompts
        _check_counts(header)
        if len(prompts) != header.documents:
            raise malformed(f"{header.documents} documents, the prompt set has {len(prompts)}")
        self._read_vocabulary()
        self._doc_offsets: NDArray[np.int64] = self._file.rows("doc_offsets")
        steps = np.diff(self._doc_offsets)
        ends = (int(self._doc_offsets[0]), int(self._doc_offsets[-1]))
        if ends != (0, header.positions) or steps.min() < 1 or steps.max() > header.positions:
            raise malformed(f"doc_offsets does not rise from 0 to {header.positions}")
        self._index_shipped()

    @property
    def vocabulary(self) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
        """The bytes of every id, and [V+1] where each id's bytes start."""
        return self._vocab_bytes, self._vocab_offsets

    @property
    def doc_offsets(self) -> NDArray[np.int64]:
        """[D+1] first row of each document; the last entry is P."""
        return self._doc_offsets

    def shipped(self) -> NDArray[np.bool_]:
        """[P] whether a row of ids is there."""
        return self._shipped(0, self.header.positions)[0]

    def _read_vocabulary(self) -> None:
        """Read the bytes of every id, and find the smallest id of all bytes and its twins."""
        file, header = self._file, self.header
        sizes = {name: file.arrays.get(name, Entry("", (0,))) for name in _VOCABULARY}
        flat = all(len(entry.shape) == 1 for entry in sizes.values())
        if not flat or sizes["vocab_lengths"].dtype != "uint16":
            raise malformed(f"holds {sizes}, wanted vocab_lengths uint16 and vocab_bytes, flat")
        lengths = file.rows("vocab_lengths").astype(np.int64)
        total = sizes["vocab_bytes"].shape[0]
        wanted = layout(header, total, int(lengths.max(initial=0)))
        found = {name: (entry.dtype, entry.shape) for name, entry in file.arrays.items()}
        if odd := {n for n, e in wanted.items() if found.get(n) != (e.dtype, e.shape)}:
            name = min(odd)
            raise malformed(
                f"{name} is {found.get(name)}, wanted {wanted[name].dtype} {wanted[name].shape}"
            )
        if extra := sorted(found.keys() - wanted.keys()):
            raise malformed(f"holds arrays {extra[:12]} that do not belong there")
        if int(lengths.sum()) != total or lengths[header.eos_id]:
            raise malformed(f"vocab_lengths is not that of {total} bytes and an eos without any")
        self._vocab_bytes: NDArray[np.uint8] = file.rows("vocab_bytes")
        self._vocab_offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        raw = self._vocab_bytes.tobytes()
        self._id_of: dict[bytes, int] = {}
        self._twins: dict[int, list[int]] = {}
        for index, (a, b) in enumerate(pairwise(self._vocab_offsets.tolist())):
            first = self._id_of.setdefault(raw[a:b], index)
            if first != index and b > a:
                self._twins.setdefault(first, []).append(index)
        self._id_of[b""] = header.eos_id

    def _index_shipped(self) -> None:
        """Count the shipped rows up to every _BITS_A_STEP-th one."""
        self._rank = np.zeros(1, np.int64)
        positions = self.header.positions
        if "shipped_bits" not in self._file.arrays:
            return
        counts = [int(self._bits(p).sum()) for p in range(0, positions, _BITS_A_STEP)]
        self._rank = np.concatenate([[0], np.cumsum(counts)])
        last = self._file.rows("shipped_bits", (positions - 1) // 8)[0]
        if self._rank[-1] != self.header.shipped or int(last) >> ((positions - 1) % 8 + 1):
            raise malformed(f"shipped_bits does not say {self.header.shipped} of {positions} rows")

    def _bits(self, start: int, stop: int | None = None) -> NDArray[np.bool_]:
        """Whether the rows start..stop-1 are shipped. Args: start: a multiple of _BITS_A_STEP."""
        stop = min(start + _BITS_A_STEP, self.header.positions) if stop is None else stop
        raw = self._file.rows("shipped_bits", start // 8, -(-stop // 8))
        return np.unpackbits(raw, count=stop - start, bitorder="little").astype(bool)

    def _shipped(self, first: int, last: int) -> tuple[NDArray[np.bool_], int]:
        """Return which of the rows first..last-1 are shipped, and how many before them are."""
        if "shipped_bits" not in self._file.arrays:
            return np.ones(last - first, bool), first
        step = first // _BITS_A_STEP
        bits = self._bits(step * _BITS_A_STEP, last)
        before = bits[: first - step * _BITS_A_STEP]
        return bits[len(before) :], int(self._rank[step] + before.sum())

    def runs(self, rows: int) -> Iterator[tuple[int, int]]:
        """Cut the documents into runs of at most `rows` positions, or of one longer document."""
        return runs(self._doc_offsets, rows)

    def documents(self, start: int, stop: int) -> LogitContribution:
        """Read the documents start..stop-1. Raises: ContributionError."""
        first, last = int(self._doc_offsets[start]), int(self._doc_offsets[stop])
        shipped, before = self._shipped(first, last)
        rows, columns = last - first, self.header.top_k
        topk_ids = np.full((rows, columns), -1, np.int32)
        topk_logprobs = np.full((rows, columns), LOGPROB_FLOOR, np.float32)
        tail = np.zeros(rows, np.float32)
        topk_ids[shipped], topk_logprobs[shipped], tail[shipped] = self._rows_of_ids(
            before, before + int(shipped.sum())
        )
        own = packing.decode_logprobs(self._file.rows("own", first, last))
        offsets = self._doc_offsets[start : stop + 1] - first
        lengths = self._file.rows("byte_lengths", first, last).astype(np.int64)
        texts = [
            _text(prompt, self.header.prefix_bytes * (end - begin > 1))
            for prompt, (begin, end) in zip(
                self._prompts[start:stop], pairwise(offsets.tolist()), strict=True
            )
        ]
        ends = _ends(lengths, offsets, [len(text) for text in texts])
        token_ids = self._spell(b"".join(texts), lengths)
        self._choose_twins(token_ids, own, topk_ids, topk_logprobs)
        return LogitContribution(
            header=replace(
                self.header, documents=stop - start, positions=rows, shipped=int(shipped.sum())
            ),
            doc_offsets=offsets,
            token_ids=token_ids,
            byte_ends=np.maximum(ends - self.header.prefix_bytes, 0).astype(np.int32),
            own_logprob=own,
            topk_ids=topk_ids,
            topk_logprobs=topk_logprobs,
            tail_logprob=tail,
            vocab_bytes=self._vocab_bytes,
            vocab_offsets=self._vocab_offsets,
        )

    def _rows_of_ids(self, start: int, stop: int) -> tuple[NDArray[Any], ...]:
        """Decode ids, their log-probabilities and the tail of the shipped rows start..stop-1."""
        columns, bits = self.header.top_k, packing.bits_for(self.header.vocab_size)
        packed, codes = (self._file.rows(name, start, stop) for name in ("topk_ids", "topk"))
        ids = packing.unpack(packed, columns, bits)
        if ids.size and ids.max() >= self.header.vocab_size:
            raise ContributionError(
                "id_out_of_vocabulary",
                f"topk_ids holds {ids.max()}, the vocabulary has 0..{self.header.vocab_size - 1}: "
                "export with the tokenizer the expert was trained with",
            )
        if packing.spare_bits(packed, columns, bits):
            raise malformed("topk_ids has bits behind a row's last id")
        if self.header.sampler == "top_k":
            tail = packing.decode_logprobs(self._file.rows("tail", start, stop))
            return ids, packing.decode_logprobs(codes), tail
        floor = np.full(stop - start, LOGPROB_FLOOR, np.float32)
        return (*_samples(ids, codes, self.header.draws), floor)

    def _spell(self, text: bytes, lengths: NDArray[np.int64]) -> NDArray[np.int32]:
        """Find every token by its bytes."""
        ends = np.cumsum(lengths)
        cuts = zip((ends - lengths).tolist(), ends.tolist(), strict=True)
        find = self._id_of.get
        ids = np.asarray([find(text[a:b], -1) for a, b in cuts], np.int32)
        if ids.min() < 0:
            raise malformed("the tokens do not spell the prompt set")
        return ids

    def _choose_twins(
        self,
        token_ids: NDArray[np.int32],
        own: NDArray[np.float32],
        topk_ids: NDArray[np.int32],
        topk_logprobs: NDArray[np.float32],
    ) -> None:
        """Where several ids write a token's bytes, take one that the row of ids agrees with."""
        if not self._twins:
            return
        several = np.isin(token_ids, np.fromiter(self._twins, np.int32))
        for row in np.flatnonzero(several & (topk_ids[:, 0] >= 0)).tolist():
            first = int(token_ids[row])
            found = dict(zip(topk_ids[row].tolist(), topk_logprobs[row].tolist(), strict=True))
            alike = [first, *self._twins[first]]
            best = [index for index in alike if index in found and found[index] == own[row]]
            rest = [index for index in alike if index not in found]
            token_ids[row] = (best or rest or alike)[0]


def _check_counts(header: LogitHeader) -> None:
    fits = (
        0 < header.documents <= header.positions
        and 0 <= header.shipped <= header.positions
        and 0 < header.top_k <= header.vocab_size <= MAX_VOCABULARY
        and header.eos_id < header.vocab_size
        and header.prefix_bytes <= 1
        and (header.sampler, header.draws > 0) in {("top_k", False), ("samples", True)}
        and header.draws <= packing.LAST_CODE
        and (header.pivot_sha256 != "" or header.shipped == header.positions)
    )
    if not fits:
        raise malformed(f"its numbers do not fit together: {str(header)[:600]}")


def _text(prompt: str | bytes, prefix: int) -> bytes:
    return b" " * prefix + (prompt.encode() if isinstance(prompt, str) else prompt)


def _ends(
    lengths: NDArray[np.int64], offsets: NDArray[np.int64], sizes: Sequence[int]
) -> NDArray[np.int64]:
    """Return where each token ends in its document; every document must be read to its end."""
    last = offsets[1:] - 1
    inner = np.ones(len(lengths), bool)
    inner[last] = False
    if lengths[last].any() or not lengths[inner].all():
        raise malformed("not every token writes bytes but a document's last, its eos")
    total = np.cumsum(lengths)
    before = np.concatenate([[0], total[last[:-1]]])
    ends = total - np.repeat(before, np.diff(offsets))
    if not np.array_equal(ends[last], sizes):
        at = int((ends[last] != sizes).argmax())
        raise malformed(
            f"a document of {ends[last][at]} bytes, in the prompt set it has {sizes[at]}"
        )
    return np.asarray(ends)


def _samples(
    ids_RK: NDArray[np.int32], counts_RK: NDArray[np.uint8], draws: int
) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """Read counts as shares of the draws, log(count / N)."""
    total_R = counts_RK.sum(axis=1, dtype=np.int64)
    if not np.isin(total_R, (draws, min(draws, ids_RK.shape[1]))).all():
        raise malformed(f"a row's counts sum to {total_R.min()}..{total_R.max()} of {draws} draws")
    if ids_RK[counts_RK == 0].any():
        raise malformed("an id that was never drawn")
    with np.errstate(divide="ignore"):
        logprobs_RK = np.log(counts_RK / total_R[:, None]).astype(np.float32)
    drawn = counts_RK > 0
    return np.where(drawn, ids_RK, -1), np.where(drawn, logprobs_RK, np.float32(LOGPROB_FLOOR))
