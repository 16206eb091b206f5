"""The one training loop: experts, pivots, fusion and controls are all trained by `train`.

AdamW and a warm-up, stable, decay schedule; it resumes by itself, bit for bit, from a checkpoint.
The position in the data is the step and nothing else: `batch_at(step)` is a pure function, so a
checkpoint holds no sampler and no state of a random generator. A batch is the whole step's: it is
cut into pieces for the ranks, when torchrun started several, and for gradient accumulation.
Shapes: B = rows of a batch, T = predicted positions per row, T1 = T + 1, V = vocabulary.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Protocol

import torch
from torch import Tensor, nn

from fp8.batches import count_tokens, packed_batches, part_of
from fp8.checkpoint import Position, save
from fp8.checkpoint_files import CheckpointError
from fp8.distributed import Ranks, join, shard, whole
from fp8.losses import causal_lm_loss
from fp8.nonfinite import report_skip
from fp8.optim import Float8AdamW
from fp8.resume import Resume, described, resume
from fp8.schedule import TrainConfig, decay_begins, learning_rate

MAX_SKIPPED_IN_A_ROW: Final = 10


class TrainingDivergedError(RuntimeError):
    """Loss or gradient was not finite for MAX_SKIPPED_IN_A_ROW steps in a row."""


@dataclass(frozen=True, slots=True)
class Progress:
    """One finished step, as told to on_progress. `step` counts the steps done: 1 to `steps`."""

    step: int
    steps: int
    loss: float
    lr: float
    tokens_per_s: float
    metrics: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class TrainResult:
    """What `train` did. `losses` has one entry per step since step 0; NaN where it was skipped."""

    step: int
    losses: list[float] = field(repr=False)
    finished: bool
    skipped_steps: int


class Loss(Protocol):
    """Model and batch in, scalar loss in nats out, with numbers to report if there are any.

    The loss is a mean over the batch's tokens, as `count_tokens` counts them: only then is the
    mean over the pieces of a batch, weighted by their tokens, the loss of the whole batch.
    """

    def __call__(
        self, model: nn.Module, batch: Any, /
    ) -> Tensor | tuple[Tensor, Mapping[str, float]]:
        """Return the loss of the batch, alone or with numbers to report."""
        ...


def train(
    model: nn.Module,
    batch_at: Callable[[int], Any],
    loss_fn: Loss,
    config: TrainConfig,
    *,
    checkpoint_dir: Path | None = None,
    on_progress: Callable[[Progress], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
    resume_with: Resume | None = None,
) -> TrainResult:
    """Train `model` in place up to `config.steps`, from the checkpoint if there is one.

    Called again with more steps it goes on where it ended: training is continual. A run that is
    resumed gives bit for bit what a run without a break gives, on the same machine and threads.
    Started by torchrun on several ranks, it shards the model with FSDP2 and leaves it sharded
    (`fp8.distributed.full_state_dict` gathers it); the result is the same but for the order of
    sums, and so checkpoints may move between numbers of ranks.

    Args:
        model: trained in place; only parameters with requires_grad move.
        batch_at: the batch of a step; pure, so that step is the only position there is.
        loss_fn: the loss of a batch; a step whose loss or gradient is not finite is skipped.
        config: schedule and optimizer; what may differ on resume is in `fp8.resume`.
        checkpoint_dir: where checkpoints are looked for and written; None keeps none. All ranks
            must see it.
        on_progress: told of every step, on the first rank.
        should_stop: asked before every step; True, on any rank, writes a checkpoint and returns.
        resume_with: how to go on from a checkpoint: from before the decay, with another schedule.

    Returns:
        The result; finished is False when should_stop ended the run.

    Raises:
        CheckpointError: the checkpoint is damaged or of another run; the message says what to do.
        TrainingDivergedError: ten steps in a row were not finite; lower lr or check the data.
    """
    ranks = join()
    shard(model, ranks)
    optimizer = make_optimizer(model, config)
    at = resume(checkpoint_dir, model, optimizer, config, resume_with, ranks) or Position()
    told = described(model, config)
    saved_step, was_training, meter = at.step, model.training, _Meter()
    model.train()

    def write(*, stable: bool = False) -> None:
        if checkpoint_dir is not None:
            save(checkpoint_dir, model, optimizer, at, told, stable=stable, ranks=ranks)

    try:
        while at.step < config.steps and not ranks.any(should_stop is not None and should_stop()):
            if _decays_from_here(at, config) and not _has_stable(checkpoint_dir, at, ranks):
                write(stable=True)
            lr = learning_rate(at.step, config)
            batch = batch_at(at.step)
            loss, metrics = train_step(model, optimizer, batch, loss_fn, config, at, ranks)
            if on_progress is not None and ranks.first:
                rate = meter.tokens_per_s(count_tokens(batch))
                on_progress(Progress(at.step, config.steps, loss, lr, rate, metrics))
            if at.step % config.checkpoint_every == 0:
                write()
                saved_step = at.step
        if at.step != saved_step:
            write()
    finally:
        model.train(was_training)
    return TrainResult(at.step, list(at.losses), at.step >= config.steps, at.skipped_steps)


def train_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batch: Any,
    loss_fn: Loss,
    config: TrainConfig,
    at: Position,
    ranks: Ranks | None = None,
) -> tuple[float, dict[str, float]]:
    """Do one step and move `at` by one. Returns the loss (NaN if it was not finite) and metrics."""
    ranks = ranks or Ranks()
    pieces = pieces_of(batch, config.accumulate, ranks)
    # Within torch.autocast, copies made by the last step or while the batch was made (a rollout,
    # without gradients) would be read again: weights that no longer are, or get no gradient.
    torch.clear_autocast_cache()
    with _seeded(model, config.seed * 1_000_003 + at.step, ranks):
        optimizer.zero_grad(set_to_none=True)
        loss, metrics = accumulate(model, pieces, loss_fn, ranks)
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        norm = whole(torch.nn.utils.get_total_norm(grads))
        loss_value, norm_value = float(loss), float(norm)
        finite = not ranks.any(not (math.isfinite(loss_value) and math.isfinite(norm_value)))
        if finite:  # only then: clipping by a norm of NaN would spread it over all layers
            torch.nn.utils.clip_grads_with_norm_(model.parameters(), config.grad_clip, norm)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(at.step, config)
            optimizer.step()
            torch.clear_autocast_cache()  # of weights that are no more
    if not finite:
        report_skip(model, pieces, loss_fn, loss_value, at, ranks)
    at.advance(loss_value if math.isfinite(loss_value) else math.nan, skipped=not finite)
    if at.skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW:
        raise TrainingDivergedError(
            f"loss or gradient was not finite in {at.skipped_in_a_row} steps in a row, the last "
            f"one step {at.step - 1}; lower lr (now {config.lr:g}), lengthen warmup_steps or "
            "look at the batches of these steps"
        )
    return at.losses[-1], metrics | {"grad_norm": norm_value}


def pieces_of(batch: Any, accumulate: int, ranks: Ranks) -> list[tuple[Any, float]]:
    """Cut a step's batch into this rank's pieces, each with its share of all the tokens."""
    parts = accumulate * ranks.size
    if parts == 1:
        return [(batch, 1.0)]
    everything = [part_of(batch, index, parts) for index in range(parts)]
    tokens = [count_tokens(piece) for piece in everything]
    if sum(tokens) == 0:
        raise ValueError(
            f"a batch of type {type(batch).__name__} cut into {parts} pieces tells of no tokens to "
            "weigh them by; give labels that count, or objects with an attribute `tokens`"
        )
    mine = range(ranks.rank * accumulate, (ranks.rank + 1) * accumulate)
    return [(everything[index], tokens[index] / sum(tokens)) for index in mine]


def accumulate(
    model: nn.Module, pieces: list[tuple[Any, float]], loss_fn: Loss, ranks: Ranks
) -> tuple[Tensor, dict[str, float]]:
    """Add up the gradients of the pieces; returns loss and metrics of the whole batch."""
    total = torch.zeros((), dtype=torch.float64)
    metrics: dict[str, float] = {}
    for piece, share in pieces:
        value = loss_fn(model, piece)
        loss, numbers = value if isinstance(value, tuple) else (value, {})
        # FSDP2 takes the mean over the ranks, and shares want the sum.
        scale = share * ranks.size
        (loss if scale == 1 else loss * scale).backward()  # type: ignore[no-untyped-call]
        total = total.to(loss.device) + share * loss.detach().double()
        for name, number in numbers.items():
            metrics[name] = metrics.get(name, 0.0) + share * float(number)
    if ranks.size == 1:
        return total, metrics
    names = sorted(metrics)
    row = torch.tensor([float(total), *(metrics[name] for name in names)], dtype=torch.float64)
    summed = ranks.sum(row).cpu()
    return summed[0], dict(zip(names, summed[1:].tolist(), strict=True))


def make_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """AdamW in the parameters' own precision, or with moments of 8 bits; decays matrices only.

    The fused kernel is the fastest of torch's three on a CPU and the same arithmetic.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    if not trained:
        raise ValueError("the model has no parameter with requires_grad; unfreeze some of it")
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if config.optimizer == "float8_adamw":
        # The loop steps only where the norm is finite; a second look would cost a pass.
        return Float8AdamW(groups, lr=config.lr, betas=config.betas, check_finite=False)
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, fused=True)


def _decays_from_here(at: Position, config: TrainConfig) -> bool:
    return config.keep_stable and 0 < at.step == decay_begins(config)


def _has_stable(checkpoint_dir: Path | None, at: Position, ranks: Ranks) -> bool:
    return checkpoint_dir is None or ranks.any((checkpoint_dir / f"stable-{at.step}").is_dir())


@contextmanager
def _seeded(model: nn.Module, seed: int, ranks: Ranks) -> Iterator[None]:
    """Seed whatever a step draws by (seed, step, rank) alone: a resumed run draws the same."""
    device = next(model.parameters()).device
    accelerators = [] if device.type == "cpu" else [device]
    with torch.random.fork_rng(accelerators, device_type="cuda"):
        torch.manual_seed(seed + (ranks.rank << 53))
        yield


class _Meter:
    """Tokens per second since the run began, checkpoints and callbacks included."""

    def __init__(self) -> None:
        self._began_s, self._tokens = time.perf_counter(), 0

    def tokens_per_s(self, tokens: int) -> float:
        self._tokens += tokens
        return self._tokens / max(1e-9, time.perf_counter() - self._began_s)


__all__ = [
    "CheckpointError",
    "Loss",
    "Progress",
    "Resume",
    "TrainConfig",
    "TrainResult",
    "TrainingDivergedError",
    "causal_lm_loss",
    "learning_rate",
    "packed_batches",
    "train",
]
