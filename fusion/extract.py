"""What an expert thinks of a text: a contribution, made shard by shard in memory that stays flat.

Shapes: D = documents, P = positions, K = kept ids, V = vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Final, Literal, Required, TypedDict, Unpack

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from fusion.budget import Budget, choose, gains, keep
from fusion.byte_tables import ByteTable, byte_table, encode, hash_tokenizer
from fusion.codec import LogitFile, LogitWriter
from fusion.contribution import (
    CODEC_VERSION,
    LogitContribution,
    LogitHeader,
    LogitSource,
    join,
    runs,
)
from fusion.models import eos_id
from fusion.samples import sampled_rows, uniforms
from fusion.scoring import Scored, score
from fusion.top_rows import top_rows

SHARD_POSITIONS: Final = 1 << 15
"""Positions of a shard: at K = 16 its rows of ids take 4 MiB."""
Progress = Callable[[int, int], None]


class Options(TypedDict, total=False):
    """What to compute of a model on a prompt set."""

    top_k: Required[int]
    prompt_set_sha256: Required[str]
    model_sha256: Required[str]
    on_progress: Progress | None
    """Told (positions done, positions in all)."""
    budget: Budget | None
    """Ship rows of ids only where the expert beats the pivot; None: everywhere."""
    pivot: LogitSource | None
    """What the pivot thinks of the same prompts; a budget needs it."""
    sampler: Literal["top_k", "samples"]
    """samples: `draws` ids per position, drawn by `seed`; not the top_k likeliest (default)."""
    draws: int
    """1..255; default 50."""
    seed: int
    """Of the draws; default 0."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Wanted:
    """Options with their defaults."""

    top_k: int
    prompt_set_sha256: str
    model_sha256: str
    on_progress: Progress | None = None
    budget: Budget | None = None
    pivot: LogitSource | None = None
    sampler: Literal["top_k", "samples"] = "top_k"
    draws: int = 50
    seed: int = 0


def extract_logits(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    prompts: Sequence[str],
    **options: Unpack[Options],
) -> LogitContribution:
    """Compute a participant's contribution on a prompt set, at temperature 1, in memory.

    Args: options: see Options; top_k and the two hashes must be given.
    Raises: TokenizerError when the tokenizer does not spell a prompt byte by byte;
        ContributionError when the model's logits are not finite.
    """
    work = _Extraction(model, tokenizer, prompts, _Wanted(**options))
    budget, pivot = work.wanted.budget, work.wanted.pivot
    whole = join(list(work.shards()))
    if budget is None:
        return whole
    beside = _pivot(pivot, len(prompts))
    gain = gains(whole, beside.documents(0, len(prompts)))
    return keep(whole, choose(gain, budget), beside.header.model_sha256)


def extract_to_file(
    path: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    prompts: Sequence[str],
    **options: Unpack[Options],
) -> LogitHeader:
    """Write what write_logits would write of extract_logits, byte for byte, holding one shard.

    With a budget every row is laid down beside `path` first, and the chosen ones are copied.
    Args, Raises: as extract_logits.
    """
    work = _Extraction(model, tokenizer, prompts, _Wanted(**options))
    budget, pivot = work.wanted.budget, work.wanted.pivot
    if budget is None:
        with work.writer(path) as writer:
            for shard in work.shards():
                writer.write(shard)
                del shard  # not held while the next one is made
        return work.header
    beside = _pivot(pivot, len(prompts))
    everything = path.with_name(path.name + ".all")
    try:
        gain, at = np.empty(work.header.positions, np.float32), 0
        with work.writer(everything) as writer:
            for (start, stop), shard in zip(work.runs(), work.shards(), strict=True):
                rows = slice(at, at := at + shard.header.positions)
                gain[rows] = gains(shard, beside.documents(start, stop))
                writer.write(shard)
        return _copy_chosen(path, everything, work, choose(gain, budget), beside)
    finally:
        everything.unlink(missing_ok=True)


def _copy_chosen(
    path: Path,
    everything: Path,
    work: _Extraction,
    chosen: NDArray[np.bool_],
    pivot: LogitSource,
) -> LogitHeader:
    sha256 = pivot.header.model_sha256
    header = replace(work.header, shipped=int(chosen.sum()), pivot_sha256=sha256)
    source = LogitFile(everything, work.prompts)
    with work.writer(path, header, chosen) as writer:
        for start, stop in work.runs():
            rows = slice(int(work.doc_offsets[start]), int(work.doc_offsets[stop]))
            writer.write(keep(source.documents(start, stop), chosen[rows], sha256))
    return header


def _pivot(pivot: LogitSource | None, documents: int) -> LogitSource:
    if pivot is None or pivot.header.documents != documents:
        found = "none" if pivot is None else f"one of {pivot.header.documents}"
        raise ValueError(
            f"a budget needs a pivot's contribution on the same {documents} documents, got "
            f"{found}: extract the pivot's first"
        )
    return pivot


@dataclass
class _Extraction:
    """One model and one prompt set; what is computed of it, by runs of documents."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerFast
    prompts: Sequence[str]
    wanted: _Wanted

    def __post_init__(self) -> None:
        """Refuse numbers that cannot be meant."""
        vocab = int(self.model.config.vocab_size)
        if not (0 < self.wanted.top_k <= vocab and 0 < self.wanted.draws < 256):
            raise ValueError(
                f"top_k {self.wanted.top_k} must be in 1..{vocab}, the vocabulary, and draws "
                f"{self.wanted.draws} in 1..255"
            )

    @cached_property
    def table(self) -> ByteTable:
        """The bytes of every id."""
        return byte_table(self.tokenizer, int(self.model.config.vocab_size))

    @cached_property
    def _lengths(self) -> NDArray[np.int64]:
        return np.asarray([len(piece) for piece in self.table.pieces], np.int64)

    @cached_property
    def _vocabulary(self) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
        offsets = np.concatenate([[0], np.cumsum(self._lengths)]).astype(np.int64)
        return np.frombuffer(b"".join(self.table.pieces), np.uint8), offsets

    @cached_property
    def doc_offsets(self) -> NDArray[np.int64]:
        """[D+1]; the prompts are encoded for it, and once more when they are scored."""
        counts = [len(encode(self.tokenizer, self.table, prompt)) + 1 for prompt in self.prompts]
        return np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)

    @cached_property
    def header(self) -> LogitHeader:
        """Of the whole prompt set, all rows shipped."""
        positions = int(self.doc_offsets[-1])
        return LogitHeader(
            codec_version=CODEC_VERSION,
            prompt_set_sha256=self.wanted.prompt_set_sha256,
            tokenizer_sha256=hash_tokenizer(self.tokenizer),
            model_sha256=self.wanted.model_sha256,
            pivot_sha256="",
            sampler=self.wanted.sampler,
            draws=self.wanted.draws if self.wanted.sampler == "samples" else 0,
            vocab_size=int(self.model.config.vocab_size),
            top_k=self.wanted.top_k,
            documents=len(self.prompts),
            positions=positions,
            shipped=positions,
            eos_id=eos_id(self.tokenizer),
            prefix_bytes=len(self.table.prefix),
        )

    def writer(
        self,
        path: Path,
        header: LogitHeader | None = None,
        shipped: NDArray[np.bool_] | None = None,
    ) -> LogitWriter:
        """Open a file for all the documents."""
        raw, offsets = self._vocabulary
        return LogitWriter(
            path,
            header or self.header,
            doc_offsets=self.doc_offsets,
            vocab_bytes=raw,
            vocab_offsets=offsets,
            shipped=shipped,
        )

    def runs(self) -> Iterator[tuple[int, int]]:
        """Cut the documents into shards: (start, stop) of each."""
        return runs(self.doc_offsets, SHARD_POSITIONS)

    def shards(self) -> Iterator[LogitContribution]:
        """Score the documents, a shard at a time."""
        for start, stop in self.runs():
            yield self._shard(start, stop)

    def _shard(self, start: int, stop: int) -> LogitContribution:
        eos, before = self.header.eos_id, int(self.doc_offsets[start])
        offsets = self.doc_offsets[start : stop + 1] - before
        docs = [[*encode(self.tokenizer, self.table, p), eos] for p in self.prompts[start:stop]]
        found = _empty(int(offsets[-1]), self.wanted.top_k)
        done = before
        for scored in score(self.model, [[eos, *ids] for ids in docs]):
            reduced = self._reduce(scored, start)
            for part in scored.parts:
                at = int(offsets[part.stream]) + part.start - part.rows.start
                for name, kept in reduced.items():
                    found[name][at + part.rows.start : at + part.rows.stop] = kept[part.rows]
            done += len(scored.labels)
            if self.wanted.on_progress is not None:
                self.wanted.on_progress(done, self.header.positions)
        vocab_bytes, vocab_offsets = self._vocabulary
        ends = np.concatenate([np.cumsum(self._lengths[ids]) for ids in docs])
        rows = len(ends)
        return LogitContribution(
            header=replace(self.header, documents=stop - start, positions=rows, shipped=rows),
            doc_offsets=offsets,
            token_ids=np.concatenate([np.asarray(ids, np.int32) for ids in docs]),
            byte_ends=np.maximum(ends - len(self.table.prefix), 0).astype(np.int32),
            vocab_bytes=vocab_bytes,
            vocab_offsets=vocab_offsets,
            **found,
        )

    def _reduce(self, scored: Scored, first_document: int) -> dict[str, NDArray[Any]]:
        """Make rows of a contribution out of rows of logits."""
        wanted = self.wanted
        if wanted.sampler == "top_k":
            kept = top_rows(scored.logits, scored.labels, wanted.top_k)
        else:
            numbers = np.empty((len(scored.labels), wanted.draws))
            for part in scored.parts:
                document, rows = first_document + part.stream, part.rows.stop - part.rows.start
                numbers[part.rows] = uniforms(wanted.seed, document, part.start, rows, wanted.draws)
            kept = sampled_rows(scored.logits, scored.labels, numbers, wanted.top_k)
        return {
            "own_logprob": kept.own,
            "topk_ids": kept.ids,
            "topk_logprobs": kept.logprobs,
            "tail_logprob": kept.tail,
        }


def _empty(rows: int, columns: int) -> dict[str, NDArray[Any]]:
    return {
        "own_logprob": np.empty(rows, np.float32),
        "topk_ids": np.empty((rows, columns), np.int32),
        "topk_logprobs": np.empty((rows, columns), np.float32),
        "tail_logprob": np.empty(rows, np.float32),
    }
