"""Contributions made by hand: any cut of any bytes, with random distributions."""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from fusion.codec import CODEC_VERSION, LogitContribution, LogitHeader

SHA = "a" * 64


def build(
    cuts: Sequence[Sequence[bytes]],
    vocab: Sequence[bytes],
    *,
    top_k: int = 3,
    seed: int = 0,
    eos: int = 0,
    sharpness: float = 2.0,
) -> tuple[LogitContribution, NDArray[np.float64]]:
    """A contribution whose documents are cut as told, and its dense log-probabilities [P, V].

    vocab[eos] must be empty; every other piece must occur in vocab once.
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
    contribution = LogitContribution(
        header=LogitHeader(
            codec_version=CODEC_VERSION,
            prompt_set_sha256=SHA,
            tokenizer_sha256="b" * 64,
            model_sha256="c" * 64,
            vocab_size=len(vocab),
            top_k=top_k,
            documents=len(cuts),
            positions=len(flat),
        ),
        doc_offsets=offsets,
        token_ids=flat,
        byte_ends=np.concatenate([np.cumsum(lengths[doc]) for doc in ids]).astype(np.int32),
        own_logprob=dense[np.arange(len(flat)), flat].astype(np.float16),
        topk_ids=order[:, :top_k].astype(np.int32),
        topk_logprobs=np.minimum(top, 0).astype(np.float16),
        tail_logprob=np.minimum(rest, 0).astype(np.float16),
        vocab_bytes=np.frombuffer(b"".join(vocab), np.uint8),
        vocab_offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
    )
    return contribution, dense


def vocabulary_of(*cuts: Sequence[Sequence[bytes]]) -> list[bytes]:
    """Eos, then every piece that some cut uses."""
    return [b"", *sorted({piece for docs in cuts for doc in docs for piece in doc})]


def cut_at(doc: bytes, places: set[int]) -> list[bytes]:
    """The pieces of doc when it is cut at the places that lie inside it."""
    edges = [0, *sorted(p for p in places if 0 < p < len(doc)), len(doc)]
    return [doc[a:b] for a, b in pairwise(edges) if b > a]
