"""Contributions made by hand: any cut of any bytes, with random distributions."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import numpy as np
from hypothesis import strategies as st
from numpy.typing import NDArray

from fusion.budget import keep
from fusion.contribution import CODEC_VERSION, LogitContribution, LogitHeader
from fusion.samples import tally

SHA = "a" * 64


def build(
    cuts: Sequence[Sequence[bytes]],
    vocab: Sequence[bytes],
    *,
    top_k: int = 3,
    seed: int = 0,
    eos: int = 0,
    sharpness: float = 2.0,
    prefix: int = 0,
) -> tuple[LogitContribution, NDArray[np.float64]]:
    """A contribution whose documents are cut as told, and its dense log-probabilities [P, V].

    vocab[eos] must be empty; every other piece must occur in vocab once.
    Args: prefix: bytes of each document's first piece that are no text (one space).
    """
    ids = [[*(vocab.index(piece) for piece in cut), eos] for cut in cuts]
    flat = np.asarray([i for doc in ids for i in doc], np.int32)
    offsets = np.concatenate([[0], np.cumsum([len(doc) for doc in ids])]).astype(np.int64)
    raw = np.random.default_rng(seed).normal(size=(len(flat), len(vocab))) * sharpness
    dense = raw - np.log(np.exp(raw).sum(-1, keepdims=True))
    order = np.argsort(-dense, axis=-1, kind="stable")
    top = np.take_along_axis(dense, order[:, :top_k], -1)
    tail = np.take_along_axis(dense, order[:, top_k:], -1)
    rest = np.log(np.maximum(np.exp(tail).sum(-1), np.exp(-60.0)))
    lengths = np.asarray([len(piece) for piece in vocab])
    ends = np.concatenate([np.cumsum(lengths[doc]) for doc in ids])
    contribution = LogitContribution(
        header=LogitHeader(
            codec_version=CODEC_VERSION,
            prompt_set_sha256=SHA,
            tokenizer_sha256="b" * 64,
            model_sha256="c" * 64,
            pivot_sha256="",
            sampler="top_k",
            draws=0,
            vocab_size=len(vocab),
            top_k=top_k,
            documents=len(cuts),
            positions=len(flat),
            shipped=len(flat),
            eos_id=eos,
            prefix_bytes=prefix,
        ),
        doc_offsets=offsets,
        token_ids=flat,
        byte_ends=np.maximum(ends - prefix, 0).astype(np.int32),
        own_logprob=dense[np.arange(len(flat)), flat].astype(np.float32),
        topk_ids=order[:, :top_k].astype(np.int32),
        topk_logprobs=np.minimum(top, 0).astype(np.float32),
        tail_logprob=np.minimum(rest, 0).astype(np.float32),
        vocab_bytes=np.frombuffer(b"".join(vocab), np.uint8),
        vocab_offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
    )
    return contribution, dense


def sampled(
    contribution: LogitContribution, dense: NDArray[np.float64], draws: int, seed: int = 0
) -> LogitContribution:
    """The same, with ids drawn from the dense distributions in place of the likeliest."""
    rng, vocab = np.random.default_rng(seed), dense.shape[1]
    drawn = np.stack([rng.choice(vocab, draws, p=np.exp(row)) for row in dense])
    ids, logprobs = tally(drawn, contribution.header.top_k)
    return replace(
        contribution,
        header=replace(contribution.header, sampler="samples", draws=draws),
        topk_ids=ids,
        topk_logprobs=logprobs,
        tail_logprob=np.full(len(ids), -60, np.float32),
    )


@st.composite
def contributions(draw: st.DrawFn) -> tuple[LogitContribution, list[bytes]]:
    """Any contribution, whole or budgeted, top-K or sampled, with or without a prefix; its text."""
    texts = draw(st.lists(st.binary(max_size=12), min_size=1, max_size=5), label="texts")
    prefix = draw(st.integers(0, 1))
    padded = [b" " * prefix + text if text else b"" for text in texts]
    places = st.sets(st.integers(1, 12))
    cuts = [cut_at(text, draw(places)) for text in padded]
    vocab = [*vocabulary_of(cuts), b"more", b"and more", b"", b""]
    seed, sharpness = draw(st.integers(0, 99)), draw(st.sampled_from([0.1, 2.0, 30.0]))
    top_k = draw(st.integers(1, len(vocab)))
    whole, dense = build(cuts, vocab, top_k=top_k, seed=seed, sharpness=sharpness, prefix=prefix)
    if draw(st.booleans()):
        whole = sampled(whole, dense, draw(st.integers(1, 255)), seed)
    if draw(st.booleans()):
        rows = whole.header.positions
        chosen = draw(st.lists(st.booleans(), min_size=rows, max_size=rows))
        whole = keep(whole, np.asarray(chosen), "d" * 64)
    return whole, texts


def vocabulary_of(*cuts: Sequence[Sequence[bytes]]) -> list[bytes]:
    """Eos, then every piece that some cut uses."""
    return [b"", *sorted({piece for docs in cuts for doc in docs for piece in doc})]


def cut_at(doc: bytes, places: set[int]) -> list[bytes]:
    """The pieces of doc when it is cut at the places that lie inside it."""
    edges = [0, *sorted(p for p in places if 0 < p < len(doc)), len(doc)]
    return [doc[a:b] for a, b in pairwise(edges) if b > a]
