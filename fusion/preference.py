"""Preference fusion: the pivot learns to prefer what the experts do, from four numbers a pair.

    L = -log sigmoid(beta * (r(chosen) - r(rejected)) - offset),   r(y) = log P(y|x) - log M(y|x)
DPO whose reference M is fused of the experts' log-probabilities of whole responses. These know no
tokenizer, and are all that an expert ships. P is the pivot in training; all logs may be divided
by a length.
Source: InfiFPO (arXiv 2505.13878).
Shapes: N = pairs, S = sources, R = rows of a batch (chosen, then rejected), T = tokens of a row.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from fp8.batches import IGNORED
from fp8.convert import convert_to_float8_training, revert_to_float
from fp8.recipe import BlockScaling
from fp8.train import Progress, TrainConfig, TrainResult, train
from fusion.models import context_length
from fusion.pair_file import PreferenceError, PreferencePair
from fusion.pair_reference import Fusion, fused_reference, move
from fusion.pair_scores import PairScores
from fusion.pair_scoring import Length, lengths, score_pairs
from fusion.pair_tokens import encoded


@dataclass(frozen=True, kw_only=True)
class PreferenceSettings:
    """How to fuse preferences; the defaults are InfiFPO's, but for `length`."""

    train: TrainConfig
    """InfiFPO: lr 1e-7 for models of billions of weights, one epoch."""
    batch_size: int
    """Pairs per step; InfiFPO: 128."""
    beta: float = 2.5
    """Above 0. InfiFPO: 2.5 with a length, 0.1 without."""
    offset: float = 0.0
    """At least 0: by how much the chosen must win. InfiFPO's scripts: 5 with a length."""
    fusion: Fusion = "max_margin"
    clip: bool = True
    length: Length = "pivot"
    judge: Literal["given", "experts"] = "given"
    """Who says which response is chosen: the pairs, or the mean of the experts' own margins."""
    fp8: bool = False
    """Train the linear layers in FP8."""

    def __post_init__(self) -> None:
        """Refuse numbers that cannot be meant."""
        if not (0 < self.beta < float("inf") and 0 <= self.offset < float("inf")) or (
            self.batch_size < 1
        ):
            raise ValueError(
                f"beta {self.beta} must be above 0, offset {self.offset} at least 0, and "
                f"batch_size {self.batch_size} at least 1"
            )


@dataclass(frozen=True, slots=True)
class Pairs:
    """A batch: which pairs."""

    index: Tensor
    """[N] int64."""

    @property
    def tokens(self) -> int:
        """What the loss is a mean over, which here are pairs."""
        return len(self.index)

    def part(self, index: int, parts: int) -> Pairs:
        """One of `parts` pieces: consecutive pairs. Raises ValueError when there are too few."""
        if len(self.index) < parts:
            raise ValueError(
                f"{len(self.index)} pairs cannot be cut into {parts} pieces; raise batch_size"
            )
        return Pairs(self.index.tensor_split(parts)[index])


@dataclass(frozen=True, slots=True)
class _Data:
    """Everything the run learns from, by pair."""

    rows: list[tuple[list[int], list[int]]]
    """Ids of chosen and rejected: eos, prompt, response, eos."""
    prompt: list[int]
    """Tokens of a row before its response."""
    length: Tensor
    """[2, N] float64: what the pivot's logs are divided by; chosen, then rejected."""
    reference: Tensor
    """[2, N] float64: log M, divided by its length."""


def preference_loss(
    policy_chosen_logp: Tensor,
    policy_rejected_logp: Tensor,
    chosen_len: Tensor,
    rejected_len: Tensor,
    fused_chosen: Tensor,
    fused_rejected: Tensor,
    beta: float,
    offset: float = 0.0,
) -> Tensor:
    """Return the loss of each pair in nats, [N]; log 2 where the policy is the reference.

    Args: policy_*_logp: [N] log P(response | prompt). *_len: [N] what to divide these by; 1 leaves
        them. fused_*: [N] log M(response | prompt), divided already; no gradient goes there.
    Source: InfiFPO (arXiv 2505.13878); the offset: ODPO (arXiv 2402.10571).
    """
    chosen_N = policy_chosen_logp / chosen_len - fused_chosen.detach()
    rejected_N = policy_rejected_logp / rejected_len - fused_rejected.detach()
    return -nn.functional.logsigmoid(beta * (chosen_N - rejected_N) - offset)


def fuse_preferences(  # noqa: PLR0913 - inputs of a run, then how it is run, by keyword
    pivot: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    pairs: Sequence[PreferencePair],
    scores: Mapping[str, PairScores],
    settings: PreferenceSettings,
    *,
    base: PairScores | None = None,
    checkpoint_dir: Path | None = None,
    on_progress: Callable[[Progress], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> TrainResult:
    """Train the pivot in place to prefer the chosen responses, as far as the experts do.

    Args: pivot: the base, also when a checkpoint is there to go on from: its scores are the
        reference. scores: by participant, of these pairs in this order; empty is plain DPO.
        base: the pivot's own, where they are known.
    Raises: PreferenceError when scores and pairs do not fit, or a pair does not fit the context.
    """
    data = _prepare(pivot, tokenizer, pairs, scores, settings, base)
    seed, size = settings.train.seed, settings.batch_size

    def batch_at(step: int) -> Pairs:
        places = np.arange(step * size, (step + 1) * size)
        orders = {
            int(epoch): np.random.default_rng([seed, epoch]).permutation(len(pairs))
            for epoch in np.unique(places // len(pairs))
        }
        picked = [orders[int(p) // len(pairs)][p % len(pairs)] for p in places]
        return Pairs(torch.tensor(np.asarray(picked, np.int64)))

    def loss_fn(model: nn.Module, batch: Pairs) -> tuple[Tensor, Mapping[str, float]]:
        return _loss(model, batch, data, settings)

    if settings.fp8:
        convert_to_float8_training(pivot, BlockScaling())
    result = train(
        pivot,
        batch_at,
        loss_fn,
        settings.train,
        checkpoint_dir=checkpoint_dir,
        on_progress=on_progress,
        should_stop=should_stop,
    )
    if settings.fp8:
        revert_to_float(pivot)
    return result


def _prepare(
    pivot: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    pairs: Sequence[PreferencePair],
    scores: Mapping[str, PairScores],
    settings: PreferenceSettings,
    base: PairScores | None = None,
) -> _Data:
    rows, prompts = encoded(tokenizer, pairs)
    context = context_length(pivot)
    for index, longest in enumerate(max(map(len, pair)) for pair in rows):
        if longest - 1 > context:
            raise PreferenceError(
                f"pair {index} has {longest - 1} tokens with its eos; wanted at most {context}, "
                "the pivot's context: cut its prompt, or leave it out"
            )
    for name, source in scores.items():
        if len(source.chosen_logp) != len(pairs):
            raise PreferenceError(
                f"{name} scored {len(source.chosen_logp)} pairs; wanted {len(pairs)}: score the "
                "pairs of this round, in their order"
            )
    base = base or score_pairs(pivot, tokenizer, pairs)
    moved = move(base, scores, length=settings.length, judge=settings.judge)
    tokens_2N = lengths(base, settings.length)
    tokens_2N = torch.where(moved.swapped, tokens_2N.flip(0), tokens_2N)
    rows = [
        (no, yes) if swap else (yes, no)
        for (yes, no), swap in zip(rows, moved.swapped.tolist(), strict=True)
    ]
    reference_2N = fused_reference(
        moved.pivot, moved.gap, fusion=settings.fusion, clip=settings.clip
    )
    return _Data(rows, prompts, tokens_2N, reference_2N)


def _loss(
    model: nn.Module, batch: Pairs, data: _Data, settings: PreferenceSettings
) -> tuple[Tensor, Mapping[str, float]]:
    """Return the mean loss of a batch of pairs, and its parts for the progress report."""
    device, picked = next(model.parameters()).device, batch.index.tolist()
    rows = [data.rows[i][side] for side in (0, 1) for i in picked]
    width = max(map(len, rows))
    ids_RT = torch.tensor([ids + [0] * (width - len(ids)) for ids in rows])
    starts = [data.prompt[i] for i in picked] * 2
    labels_RT = ids_RT[:, 1:].clone()
    for row, (ids, start) in enumerate(zip(rows, starts, strict=True)):
        labels_RT[row, : start - 1] = IGNORED
        labels_RT[row, len(ids) - 1 :] = IGNORED
    # Causal attention: padding on the right is seen by no token before it.
    logits_RTV = model(input_ids=ids_RT[:, :-1].to(device), use_cache=False).logits
    surprise_RT = nn.functional.cross_entropy(
        logits_RTV.float().flatten(0, 1),
        labels_RT.flatten().to(device),
        ignore_index=IGNORED,
        reduction="none",
    ).view_as(labels_RT)
    chosen_N, rejected_N = (-surprise_RT.sum(-1)).chunk(2)
    length_2N = data.length[:, batch.index].to(device)
    fused_2N = data.reference[:, batch.index].to(device)
    losses_N = preference_loss(
        chosen_N,
        rejected_N,
        length_2N[0],
        length_2N[1],
        fused_2N[0],
        fused_2N[1],
        settings.beta,
        settings.offset,
    )
    with torch.no_grad():
        margin_N = chosen_N / length_2N[0] - rejected_N / length_2N[1]
    metrics = {
        "margin": float(margin_N.mean()),
        "prefers_chosen": float((margin_N > 0).double().mean()),
    }
    return losses_N.mean(), metrics
