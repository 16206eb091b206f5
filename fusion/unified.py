"""Unified fusion: one run in which the pivot learns from the text and from all experts at once.

    L = (1 - lambda) CE + lambda (SpanKL + mu ALM)
Shapes: B = windows of a batch, T = tokens of a window, N = B * T, C = kept ids, S = experts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from fp8.train import Progress, TrainResult, packed_batches, train
from fusion import losses
from fusion.codec import LogitContribution
from fusion.extract import extract_logits
from fusion.models import encode_documents, eos_id
from fusion.routing import posterior_weights, uniform_weights
from fusion.settings import FusionSettings
from fusion.targets import (
    ChunkTargets,
    RankTargets,
    SpanTargets,
    chunk_targets,
    rank_targets,
    span_targets,
)


@dataclass(frozen=True, slots=True)
class FusionData:
    """The pivot's token stream and, row by row, what to learn besides it."""

    stream: Tensor
    """[P + 1] int64: eos, then the documents; row p reads stream[p] and predicts stream[p + 1]."""
    spans: SpanTargets | None = None
    chunks: ChunkTargets | None = None
    ranks: RankTargets | None = None


@dataclass(frozen=True, slots=True)
class Windows:
    """A batch: windows of consecutive rows."""

    rows: Tensor
    """[B, T] int64."""

    @property
    def tokens(self) -> int:
        """Tokens this batch trains on."""
        return self.rows.numel()


def fuse(
    pivot: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    prompts: Sequence[str],
    contributions: Mapping[str, LogitContribution],
    settings: FusionSettings,
    *,
    checkpoint_dir: Path | None = None,
    on_progress: Callable[[Progress], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> TrainResult:
    """Train the pivot in place on the prompts and on what the experts think of them.

    Args: pivot: the base, also when a checkpoint is there to go on from: the routing asks what
        the base thought. contributions: by participant; order does not matter. Empty needs
        loss "none", the control.
    Raises: ValueError when settings and contributions do not fit.
    """
    data = prepare(pivot, tokenizer, prompts, contributions, settings)
    rows = np.arange(len(data.stream))
    batch_at = packed_batches(
        rows,
        batch_size=settings.batch_size,
        seq_len=settings.seq_len,
        seed=settings.train.seed,
    )

    def loss_fn(model: nn.Module, batch: Windows) -> tuple[Tensor, Mapping[str, float]]:
        return fusion_loss(model, batch, data, settings)

    return train(
        pivot,
        lambda step: Windows(batch_at(step)[:, :-1]),
        loss_fn,
        settings.train,
        checkpoint_dir=checkpoint_dir,
        on_progress=on_progress,
        should_stop=should_stop,
    )


def prepare(
    pivot: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    prompts: Sequence[str],
    contributions: Mapping[str, LogitContribution],
    settings: FusionSettings,
) -> FusionData:
    """Align, route and pack everything the run learns from."""
    stream = np.concatenate([[eos_id(tokenizer)], encode_documents(tokenizer, prompts)])
    experts = [contributions[name] for name in sorted(contributions)]
    if settings.loss == "none":
        return FusionData(torch.from_numpy(stream))
    if not experts:
        raise ValueError(f"loss {settings.loss!r} needs contributions; give some or loss 'none'")
    top_k = max(expert.header.top_k for expert in experts)
    base = extract_logits(
        pivot,
        tokenizer,
        prompts,
        top_k=min(top_k, int(pivot.config.vocab_size)),
        prompt_set_sha256=experts[0].header.prompt_set_sha256,
        model_sha256="",
    )
    if settings.loss == "infifusion":
        return FusionData(torch.from_numpy(stream), ranks=rank_targets(base, experts))
    candidates = [base, *experts]
    if settings.routing == "uniform":
        weights_PS = uniform_weights(base.header.positions, len(candidates))
    else:
        weights_PS = posterior_weights(
            base, candidates, decay=settings.decay, temperature=settings.temperature
        )
    return FusionData(
        torch.from_numpy(stream),
        spans=span_targets(base, candidates, weights_PS, tokenizer, kept=settings.kept),
        chunks=chunk_targets(base, experts, weights_PS[:, 1:]) if settings.alm_weight else None,
    )


def fusion_loss(
    model: nn.Module, batch: Windows, data: FusionData, settings: FusionSettings
) -> tuple[Tensor, Mapping[str, float]]:
    """Return the loss of a batch, and its parts for the progress report."""
    rows_BT, device = batch.rows, next(model.parameters()).device
    inputs_BT = data.stream[rows_BT].to(device)
    labels_N = data.stream[rows_BT + 1].flatten().to(device)
    logits_NV = model(input_ids=inputs_BT, use_cache=False).logits.float().flatten(0, 1)
    logprobs_NV = logits_NV.log_softmax(-1)
    own_N = logprobs_NV.gather(-1, labels_N[:, None])[:, 0]
    ce = -own_N.mean()
    metrics = {"ce": float(ce.detach())}
    if settings.loss == "none":
        return ce, metrics
    rows_N = rows_BT.flatten()
    if data.ranks is not None:
        distill = losses.infifusion(
            logits_NV,
            data.ranks.probs[rows_N].to(device),
            data.ranks.mask[rows_N].to(device),
        ).mean()
        metrics["uld"] = float(distill.detach())
    else:
        assert data.spans is not None
        distill = _span_loss(logprobs_NV, data.spans, rows_N)
        metrics["span_kl"] = float(distill.detach())
        if data.chunks is not None:
            matched = _chunk_loss(own_N.view_as(rows_BT), data.chunks, rows_BT)
            distill = distill + settings.alm_weight * matched
            metrics["alm"] = float(matched.detach())
    share = settings.distill_weight
    return (1 - share) * ce + share * distill, metrics


def _span_loss(logprobs_NV: Tensor, spans: SpanTargets, rows_N: Tensor) -> Tensor:
    device = logprobs_NV.device
    kl_N = losses.span_kl(
        logprobs_NV, spans.ids[rows_N].long().to(device), spans.probs[rows_N].to(device)
    )
    return (spans.weight[rows_N].to(device) * kl_N).mean()


def _chunk_loss(own_BT: Tensor, chunks: ChunkTargets, rows_BT: Tensor) -> Tensor:
    """Mean over the batch's tokens of the weighted ALM of chunks that lie whole in a window."""
    device, width = own_BT.device, own_BT.shape[1]
    length_BTS = chunks.length[rows_BT].long()
    first_BTS = torch.arange(width)[:, None] - length_BTS + 1
    window, end, expert = ((length_BTS > 0) & (first_BTS >= 0)).nonzero(as_tuple=True)
    before_BT = nn.functional.pad(own_BT.cumsum(-1), (1, 0))
    first, row = first_BTS[window, end, expert], rows_BT[window, end]
    student_N = before_BT[window, end + 1] - before_BT[window, first]
    matched_N = losses.alm(student_N, chunks.logprob[row, expert].to(device))
    return (chunks.weight[row, expert].to(device) * matched_N).sum() / own_BT.numel()
