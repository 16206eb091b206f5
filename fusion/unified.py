"""Unified fusion: one run in which the pivot learns from the text and from all experts at once.

    L = (1 - lambda) CE + lambda D,    D the distillation loss of the method (fusion.objective)
Everything but the training is done before it: fusion.prepare lays the targets down on disk, and a
step reads its rows. Shapes: B = windows of a batch, T = tokens of a window.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from fp8.convert import convert_to_float8_training, revert_to_float
from fp8.distributed import join
from fp8.recipe import BlockScaling
from fp8.train import Progress, TrainResult, packed_batches, train
from fusion.contribution import LogitSource
from fusion.credit import Routing
from fusion.objective import FusionBatch, fusion_loss
from fusion.prepare import prepare
from fusion.settings import FusionSettings
from fusion.target_store import TargetStore
from fusion.windows import document_windows


@dataclass(frozen=True, slots=True)
class FuseResult:
    """What a fusion did."""

    train: TrainResult
    routing: Routing | None
    """Whom the run listened to; None for methods that do not route."""


def fuse(  # noqa: PLR0913 - inputs of a run, then how it is run, by keyword
    pivot: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    prompts: Sequence[str],
    contributions: Mapping[str, LogitSource],
    settings: FusionSettings,
    *,
    written: Sequence[bool] | None = None,
    checkpoint_dir: Path | None = None,
    on_progress: Callable[[Progress], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> FuseResult:
    """Train the pivot in place on the prompts and on what the experts think of them.

    Under torchrun the model comes out sharded, as from fp8.train.

    Args: pivot: the base, also when a checkpoint is there to go on from: the routing asks what
        the base thought. contributions: by participant; order does not matter. Empty needs
        loss "none", the control. written: as in fusion.prepare. checkpoint_dir: holds the targets
        too; all ranks must see it.
    Raises: ValueError when settings and contributions do not fit.
    """
    ranks = join()
    if ranks.size > 1 and checkpoint_dir is None:
        raise ValueError(
            f"{ranks.size} processes share one fusion: give checkpoint_dir, a folder that all see"
        )
    with tempfile.TemporaryDirectory() as temporary:
        targets = Path(temporary) if checkpoint_dir is None else checkpoint_dir / "targets"
        if ranks.first:
            prepare(pivot, tokenizer, prompts, contributions, settings, targets, written=written)
        ranks.wait()
        prepared = prepare(
            pivot, tokenizer, prompts, contributions, settings, targets, written=written
        )
        if settings.fp8:
            convert_to_float8_training(pivot, BlockScaling())
        batch_at = _batches(prepared.store, settings)

        def loss_fn(model: nn.Module, batch: FusionBatch) -> tuple[Tensor, Mapping[str, float]]:
            return fusion_loss(model, batch, settings)

        result = train(
            pivot,
            batch_at,
            loss_fn,
            settings.train,
            checkpoint_dir=checkpoint_dir,
            on_progress=on_progress,
            should_stop=should_stop,
        )
        if settings.fp8 and ranks.size == 1:
            revert_to_float(pivot)
    return FuseResult(result, prepared.routing)


def _batches(store: TargetStore, settings: FusionSettings) -> Callable[[int], FusionBatch]:
    """Return what a step learns from, as a pure function of the step."""
    size = {"batch_size": settings.batch_size, "seq_len": settings.seq_len}
    if settings.apart:
        rows_at = document_windows(store.offsets, **size, seed=settings.train.seed)
        return lambda step: store.batch_apart(rows_at(step))
    windows = packed_batches(np.arange(len(store.stream)), **size, seed=settings.train.seed)
    return lambda step: store.batch(windows(step)[:, :-1])
