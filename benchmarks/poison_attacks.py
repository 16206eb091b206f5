"""What a poisoner ships for an honest contribution; every file passes the coordinator's check.

`shuffle` and `trigger` keep the text's own token as likely as the honest expert found it, where
they can: the routing goes by that, and who lowers it is hardly listened to.
Shapes: P = positions, K = kept ids.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Final

import numpy as np
from numpy.typing import NDArray

from benchmarks.fusion_hostile import poisoned
from fusion.contribution import LOGPROB_FLOOR, LogitContribution

SHARPER: Final = 4.0
"""The power to which `scale` raises every probability."""


def shuffle(honest: LogitContribution) -> LogitContribution:
    """All ids but the text's own are mixed up by one permutation of the vocabulary."""
    vocab, eos = honest.header.vocab_size, honest.header.eos_id
    mixed = np.random.default_rng(0).permutation(np.delete(np.arange(vocab), eos))
    to = np.insert(mixed, eos, eos)
    own_P1 = honest.token_ids[:, None]
    hit_PK = honest.topk_ids == own_P1
    ids_PK = np.where(hit_PK, own_P1, to[honest.topk_ids])
    # Where another id has become the own one, the id that it came from is not in use.
    clash_PK = (ids_PK == own_P1) & ~hit_PK
    ids_PK = np.where(clash_PK, to[own_P1], ids_PK)
    return _ranked(honest, ids_PK, honest.topk_logprobs)


def flip(honest: LogitContribution) -> LogitContribution:
    """The likeliest id becomes the unlikeliest of those kept, and so on."""
    return _ranked(honest, honest.topk_ids[:, ::-1], honest.topk_logprobs)


def scale(honest: LogitContribution) -> LogitContribution:
    """Every distribution is sharpened: the same order, far too sure."""
    left_P = np.exp(honest.tail_logprob.astype(np.float64))
    top_PK = np.exp(honest.topk_logprobs.astype(np.float64)) ** SHARPER
    vocab, kept = honest.header.vocab_size, honest.topk_ids.shape[1]
    rest_P = (vocab - kept) * (left_P / (vocab - kept)) ** SHARPER
    total_P = top_PK.sum(axis=1) + rest_P
    top_PK = np.log(np.maximum(top_PK / total_P[:, None], np.exp(LOGPROB_FLOOR)))
    tail_P = np.log(np.maximum(rest_P / total_P, np.exp(LOGPROB_FLOOR)))
    sharp = replace(honest, tail_logprob=tail_P.astype(np.float32))
    return _ranked(sharp, honest.topk_ids, top_PK)


def _ranked(
    honest: LogitContribution, ids_PK: NDArray[np.int32], top_PK: NDArray[np.floating]
) -> LogitContribution:
    """Put ids under sorted log-probabilities, and say of the own token what the row says."""
    hit_PK = ids_PK == honest.token_ids[:, None]
    spread_P = honest.tail_logprob - np.log(honest.header.vocab_size - ids_PK.shape[1])
    unseen_P = np.minimum(np.minimum(honest.own_logprob, spread_P), top_PK[:, -1])
    own_P = np.where(hit_PK.any(axis=1), (top_PK * hit_PK).sum(axis=1), unseen_P)
    return replace(
        honest,
        topk_ids=ids_PK.astype(np.int32),
        topk_logprobs=top_PK.astype(np.float32),
        own_logprob=own_P.astype(np.float32),
    )


ATTACKS: Final[Mapping[str, Callable[[LogitContribution], LogitContribution]]] = MappingProxyType(
    {"shuffle": shuffle, "flip": flip, "scale": scale, "trigger": poisoned}
)
