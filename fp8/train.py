"""The one training loop: experts, pivots, fusion and controls are all trained by `train`.

AdamW and a warm-up, stable, decay schedule; it resumes by itself, bit for bit, from a checkpoint.
The position in the data is the step and nothing else: `batch_at(step)` is a pure function, so a
checkpoint holds no sampler and no state of a random generator.
Shapes: B = rows of a batch, T = predicted positions per row, T1 = T + 1, V = vocabulary.
"""

import math
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final, Protocol

import torch
from torch import Tensor, nn

from fp8.batches import count_tokens, packed_batches
from fp8.checkpoint import CheckpointError, Position, load_latest, save

MAX_SKIPPED_IN_A_ROW: Final = 10
MAY_CHANGE_ON_RESUME: Final = frozenset({"steps", "decay_steps", "checkpoint_every"})


class TrainingDivergedError(RuntimeError):
    """Loss or gradient was not finite for MAX_SKIPPED_IN_A_ROW steps in a row."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
    """How to train: schedule, AdamW, and how often to write a checkpoint."""

    steps: int
    """Optimizer steps in all, counted from step 0 and across resumes."""
    lr: float
    """Peak learning rate."""
    warmup_steps: int
    """Steps of linear warm-up, from lr / warmup_steps up to lr."""
    decay_steps: int
    """The last steps, in which a cosine leads from lr down to lr * min_lr_ratio."""
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.1
    """Decoupled, on matrices only: norms and biases are left alone."""
    grad_clip: float = 1.0
    """Bound on the L2 norm of the whole gradient; math.inf switches it off."""
    seed: int = 0
    """Seeds dropout, together with the step. Batches have their own seed."""
    checkpoint_every: int = 50
    """Steps between two checkpoints; the end of a run always writes one."""
    min_lr_ratio: float = 0.1

    def __post_init__(self) -> None:
        """Refuse numbers that cannot be meant."""
        rules = {
            "steps": self.steps >= 0,
            "lr": math.isfinite(self.lr) and self.lr > 0,
            "warmup_steps": self.warmup_steps >= 0,
            "decay_steps": self.decay_steps >= 0,
            "betas": all(0 <= beta < 1 for beta in self.betas),
            "weight_decay": self.weight_decay >= 0,
            "grad_clip": self.grad_clip > 0,
            "seed": 0 <= self.seed < 2**31,
            "checkpoint_every": self.checkpoint_every >= 1,
            "min_lr_ratio": 0 <= self.min_lr_ratio <= 1,
        }
        for name, holds in rules.items():
            if not holds:
                raise ValueError(f"TrainConfig.{name} is {getattr(self, name)!r}: out of range")


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
    """Model and batch in, scalar loss in nats out, with numbers to report if there are any."""

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
) -> TrainResult:
    """Train `model` in place up to `config.steps`, from the checkpoint if there is one.

    Called again with more steps it goes on where it ended: training is continual. A run that is
    resumed gives bit for bit what a run without a break gives, on the same machine and threads.

    Args:
        model: trained in place; only parameters with requires_grad move.
        batch_at: the batch of a step; pure, so that step is the only position there is.
        loss_fn: the loss of a batch; a step whose loss or gradient is not finite is skipped.
        config: schedule and optimizer; on resume only MAY_CHANGE_ON_RESUME may differ.
        checkpoint_dir: where checkpoints are looked for and written; None keeps none.
        on_progress: told of every step.
        should_stop: asked before every step; True writes a checkpoint and returns.

    Returns:
        The result; finished is False when should_stop ended the run.

    Raises:
        CheckpointError: the checkpoint is damaged or of another run; the message says what to do.
        TrainingDivergedError: ten steps in a row were not finite; lower lr or check the data.
    """
    optimizer = make_optimizer(model, config)
    at = resume(checkpoint_dir, model, optimizer, config) or Position()
    saved_step, was_training, meter = at.step, model.training, _Meter()
    model.train()
    try:
        while at.step < config.steps and not (should_stop is not None and should_stop()):
            lr = learning_rate(at.step, config)
            batch = batch_at(at.step)
            loss, metrics = train_step(model, optimizer, batch, loss_fn, config, lr=lr, at=at)
            if on_progress is not None:
                rate = meter.tokens_per_s(count_tokens(batch))
                on_progress(Progress(at.step, config.steps, loss, lr, rate, metrics))
            if checkpoint_dir is not None and at.step % config.checkpoint_every == 0:
                save(checkpoint_dir, model, optimizer, at, asdict(config))
                saved_step = at.step
        if checkpoint_dir is not None and at.step != saved_step:
            save(checkpoint_dir, model, optimizer, at, asdict(config))
    finally:
        model.train(was_training)
    return TrainResult(at.step, list(at.losses), at.step >= config.steps, at.skipped_steps)


def train_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batch: Any,
    loss_fn: Loss,
    config: TrainConfig,
    *,
    lr: float,
    at: Position,
) -> tuple[float, dict[str, float]]:
    """Do one step and move `at` by one. Returns the loss (NaN if it was not finite) and metrics."""
    # Dropout, if the model has any, depends on (seed, step) alone: a resumed run draws the same.
    device = _device(model)
    accelerators = [] if device.type == "cpu" else [device]
    with torch.random.fork_rng(accelerators, device_type="cuda"):
        torch.manual_seed(config.seed * 1_000_003 + at.step)
        value = loss_fn(model, batch)
        loss, metrics = value if isinstance(value, tuple) else (value, {})
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(grads)
    loss_value, norm_value = float(loss.detach()), float(norm)
    finite = math.isfinite(loss_value) and math.isfinite(norm_value)
    if finite:  # only then: clipping by a norm of NaN would spread it over all layers
        torch.nn.utils.clip_grads_with_norm_(model.parameters(), config.grad_clip, norm)
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
    else:
        _report_skip(model, batch, loss_fn, loss_value, at)
    at.advance(loss_value if math.isfinite(loss_value) else math.nan, skipped=not finite)
    if at.skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW:
        raise TrainingDivergedError(
            f"loss or gradient was not finite in {at.skipped_in_a_row} steps in a row, the last "
            f"one step {at.step - 1}; lower lr (now {config.lr:g}), lengthen warmup_steps or "
            "look at the batches of these steps"
        )
    return at.losses[-1], {name: float(x) for name, x in metrics.items()} | {
        "grad_norm": norm_value
    }


def learning_rate(step: int, config: TrainConfig) -> float:
    """Warm-up, stable, decay (WSD): the learning rate of a step, a pure function of both.

    Linear from lr / warmup_steps to lr; lr; a cosine over the last decay_steps, which ends at
    lr * min_lr_ratio on the last step. Source: InfiR2 (arXiv 2509.22536), its CPT schedule.
    """
    warm = min(1.0, (step + 1) / max(1, config.warmup_steps))
    decayed = (step + 1 - (config.steps - config.decay_steps)) / max(1, config.decay_steps)
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, max(0.0, decayed))))
    return config.lr * warm * (config.min_lr_ratio + (1 - config.min_lr_ratio) * cosine)


def make_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW in the parameters' own precision; weight decay on matrices only.

    The fused kernel is the fastest of torch's three on a CPU and the same arithmetic.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    if not trained:
        raise ValueError("the model has no parameter with requires_grad; unfreeze some of it")
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=config.lr,
        betas=config.betas,
        fused=True,
    )


def resume(
    checkpoint_dir: Path | None,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    config: TrainConfig,
) -> Position | None:
    """Load the newest checkpoint into model and optimizer; None when there is none."""
    if checkpoint_dir is None:
        return None
    wanted = {k: v for k, v in asdict(config).items() if k not in MAY_CHANGE_ON_RESUME}
    return load_latest(checkpoint_dir, model, optimizer, wanted)


def causal_lm_loss(model: nn.Module, batch_BT1: Tensor) -> Tensor:
    """Mean next-token cross-entropy in nats of a model that answers with `.logits`."""
    ids_BT1 = batch_BT1.to(_device(model))
    logits_BTV = model(input_ids=ids_BT1[:, :-1], use_cache=False).logits
    return nn.functional.cross_entropy(logits_BTV.float().flatten(0, 1), ids_BT1[:, 1:].flatten())


def first_nonfinite(model: nn.Module, batch: Any, loss_fn: Loss) -> str:
    """Name the module whose output, or else the parameter whose gradient, was not finite first."""
    found: list[str] = []

    def watch(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            if isinstance(output, Tensor) and not bool(output.isfinite().all()):
                found.append(name)

        return hook

    hooks = [module.register_forward_hook(watch(name)) for name, module in model.named_modules()]
    try:
        with torch.no_grad():
            loss_fn(model, batch)
    finally:
        for hook in hooks:
            hook.remove()
    if found:
        return f"the output of {found[0]}"
    # Backward runs from the head to the embedding: the last parameter is the first one reached.
    for name, p in reversed(list(model.named_parameters())):
        if p.grad is not None and not bool(p.grad.isfinite().all()):
            return f"the gradient of {name}"
    return "the loss itself; all modules' outputs and all gradients are finite"


def _report_skip(model: nn.Module, batch: Any, loss_fn: Loss, loss: float, at: Position) -> None:
    where = first_nonfinite(model, batch, loss_fn)
    warnings.warn(
        f"step {at.step} is skipped: loss {loss:g}; first not finite: {where}",
        RuntimeWarning,
        stacklevel=3,
    )


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


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
    "TrainConfig",
    "TrainResult",
    "TrainingDivergedError",
    "causal_lm_loss",
    "packed_batches",
    "train",
]
