"""The loss of a batch: the text's own cross-entropy and what a method asks of the experts.

    L = (1 - lambda) CE + lambda D,    for span_kl D = SpanKL + mu ALM
Both are means over the batch's tokens, so the mean of a batch's parts, weighted by their tokens,
is the loss of the whole: accumulation and more processes change nothing.
What each method's D is: fusion.methods.
Shapes: B = windows of a batch, T = tokens of a window, N = B * T, t = positions of a chunk,
V = vocabulary, H = hidden size, M = terms of the loss.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from types import MappingProxyType
from typing import Final

import torch
from torch import Tensor, nn

from fp8.batches import IGNORED, part_of
from fp8.chunked import chunked_terms
from fp8.distributed import call_inside
from fp8.losses import LARGE_VOCABULARY, head_vocabulary, keep_apart
from fusion.fused import cut_between
from fusion.methods import OBJECTIVES, OPTIONAL, Chunk, Objective
from fusion.settings import FusionSettings

DISTILL_WEIGHT: Final[Mapping[str, float | None]] = MappingProxyType(
    {
        "span_kl": None,
        "p_kl": None,
        "none": 0.0,
        "infifusion": 0.5,  # kd_rate of the code base it was forked from
        "infigfusion": 0.5,
        "uld": 0.6,  # CE + 1.5 D, up to a factor
        "minced": 0.1,
        "gold": 0.5,  # CE and D at equal weight, up to a factor
    }
)
"""The distill_weight that a published method was run with; None: the settings' own."""


@dataclass(frozen=True, slots=True)
class FusionBatch:
    """Windows of the pivot's token stream and what the experts say about their tokens."""

    inputs: Tensor
    """[B, T] int64."""
    labels: Tensor
    """[B, T] int64: what each position predicts; IGNORED does not count, in no term."""
    targets: Mapping[str, Tensor] = field(default_factory=dict)
    """Each [B, T, ...]: what the objective asks for, by name."""
    shared: Mapping[str, Tensor] = field(default_factory=dict)
    """What belongs to no position, such as a map between vocabularies."""
    positions: Tensor | None = None
    """[B, T] int64, from 0 in each document, where none may read another; None: all read on."""

    @property
    def tokens(self) -> int:
        """Tokens this batch trains on."""
        return int((self.labels != IGNORED).sum())

    def part(self, index: int, parts: int) -> FusionBatch:
        """Return one of `parts` pieces: consecutive windows, as even as they go."""
        cut = partial(part_of, index=index, parts=parts)
        targets = {name: cut(value) for name, value in self.targets.items()}
        positions = None if self.positions is None else cut(self.positions)
        return FusionBatch(cut(self.inputs), cut(self.labels), targets, self.shared, positions)


def fusion_loss(
    model: nn.Module,
    batch: FusionBatch,
    settings: FusionSettings,
    *,
    chunk_from_vocab: int = LARGE_VOCABULARY,
    chunk_tokens: int = 1024,
) -> tuple[Tensor, Mapping[str, float]]:
    """Return the loss of a batch, and its terms for the progress report.

    Args: chunk_from_vocab: vocabulary from which the logits of only about chunk_tokens positions
        exist at a time, for model types in fp8.losses.PLAIN_HEADS; the others keep them whole.
    Raises: ValueError when the batch lacks a target that the method reads.
    """
    objective = OBJECTIVES[settings.loss]
    given = {**batch.targets, **batch.shared}
    if missing := [name for name in (*objective.needs, *objective.shares) if name not in given]:
        raise ValueError(
            f"loss {settings.loss!r} reads {', '.join(missing)}, and the batch has "
            f"{', '.join(sorted(given)) or 'no targets'}; build it for this loss"
        )
    weights = objective.weights(settings)
    share = settings.distill_weight if weights else 0.0
    mix = {"ce": 1 - share} | {name: share * weight for name, weight in weights.items()}
    device = next(model.parameters()).device
    cuts = [0, batch.inputs.numel()]
    large = head_vocabulary(model) >= chunk_from_vocab
    if large:
        inside = (
            objective.inside(batch.targets)
            if objective.inside
            else torch.zeros_like(batch.labels, dtype=torch.bool)
        )
        inside[:, 0] = False  # no term reaches over a window's edge
        cuts = cut_between(inside.flatten(), chunk_tokens)
    terms_of = _terms_of(objective, batch, settings, tuple(mix), device)
    inputs = {"input_ids": batch.inputs.to(device)}
    if batch.positions is not None:
        inputs = keep_apart(model, inputs | {"position_ids": batch.positions.to(device)})
    if large:
        loss, terms_M = call_inside(model, _chunked, inputs, terms_of, list(mix.values()), cuts)
    else:
        logits_NV = model(**inputs, use_cache=False).logits.flatten(0, 1)
        terms_M = terms_of(logits_NV, 0, len(logits_NV))
        loss = (terms_M.new_tensor(list(mix.values())) * terms_M).sum()
    return loss, dict(zip(mix, terms_M.tolist(), strict=True))


def faithful_weight(settings: FusionSettings) -> float:
    """Return the distill_weight that the method was published with, or the settings' own."""
    published = DISTILL_WEIGHT[settings.loss]
    return settings.distill_weight if published is None else published


def _terms_of(
    objective: Objective,
    batch: FusionBatch,
    settings: FusionSettings,
    names: tuple[str, ...],
    device: torch.device,
) -> Callable[[Tensor, int, int], Tensor]:
    """Return a chunk's part of the mean over the batch's tokens of each named term."""
    tokens, width = max(1, batch.tokens), batch.inputs.shape[1]
    labels_N = batch.labels.flatten().to(device)
    targets = {
        name: value.flatten(0, 1).to(device)
        for name, value in batch.targets.items()
        if name in objective.needs or name in OPTIONAL
    }
    shared = {name: value.to(device) for name, value in batch.shared.items()}

    def terms_of(logits_tV: Tensor, start: int, stop: int) -> Tensor:
        here = {name: value[start:stop] for name, value in targets.items()}
        labels_t = labels_N[start:stop]
        counted_t = labels_t != IGNORED
        chunk = Chunk(logits_tV, labels_t.clamp_min(0), counted_t, here, shared, start, width)
        terms = objective.terms(chunk, settings)
        return torch.stack([terms[name] for name in names]) / tokens

    return terms_of


def _chunked(
    model: nn.Module,
    inputs: Mapping[str, Tensor],
    terms_of: Callable[[Tensor, int, int], Tensor],
    mix: list[float],
    cuts: list[int],
) -> tuple[Tensor, Tensor]:
    hidden_BTH = model.base_model(**inputs, use_cache=False).last_hidden_state  # type: ignore[operator]
    head = model.get_output_embeddings()  # type: ignore[operator]
    wide = torch.promote_types(hidden_BTH.dtype, torch.float32)
    mix_M = torch.tensor(mix, dtype=wide, device=hidden_BTH.device)
    return chunked_terms(hidden_BTH.flatten(0, 1), head, terms_of, mix_M, cuts)
