"""Where a run begins: which checkpoint it takes up, and what may have changed since then."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Final, Literal

import torch
from torch import nn

from fp8.checkpoint import Position, Saved, checkpoints, load, opened, steps_of
from fp8.checkpoint_files import CheckpointError
from fp8.distributed import Ranks
from fp8.recipe import Recipe
from fp8.schedule import TrainConfig, decay_begins, learning_rate

FREE: Final = frozenset({"checkpoint_every", "accumulate", "keep_stable"})
"""Settings that change no result."""
LENGTH: Final = frozenset({"steps", "decay_steps"})
"""Settings that may change as long as the checkpoint's own decay had not begun, or was over."""
SCHEDULE: Final = frozenset({"lr", "warmup_steps", "min_lr_ratio"})
"""Settings that may change by Resume(override_schedule=True)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Resume:
    """How to take up a run. The default is to go on from its newest checkpoint, unchanged."""

    start: Literal["latest", "stable"] = "latest"
    """stable: if the newest checkpoint was decaying, or had decayed, under another schedule, go
    back to the one kept when that decay began. Repeating the same call goes on, as always."""
    override_schedule: bool = False
    """Take lr, warmup_steps, min_lr_ratio from the new settings, and decay anew in mid-decay."""
    other_recipe: bool = False
    """Go on with weights and moments though the layers' recipes are not the checkpoint's."""


def resume(
    checkpoint_dir: Path | None,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    config: TrainConfig,
    how: Resume | None = None,
    ranks: Ranks | None = None,
) -> Position | None:
    """Load a checkpoint into model and optimizer; None when there is none.

    Raises: CheckpointError when it is damaged or of another run; nothing was changed then.
    """
    how = how or Resume()
    saved = None if checkpoint_dir is None else chosen(checkpoint_dir, config, how)
    if saved is None:
        return None
    check(saved, config, how)
    check_recipes(saved, recipes(model), how)
    return load(saved, model, optimizer, other_recipe=how.other_recipe, ranks=ranks)


def described(model: nn.Module, config: TrainConfig) -> dict[str, Any]:
    """Return what a checkpoint must know of the run to be resumed by the same one."""
    return {**asdict(config), "recipes": recipes(model)}


def recipes(model: nn.Module) -> dict[str, list[str]]:
    """Name the layers of each recipe, which is told as JSON.

    What a GEMM rounds to, and where it runs, is the machine's affair and left out.
    """
    found: dict[str, list[str]] = {}
    for name, module in model.named_modules():
        if isinstance(recipe := getattr(module, "recipe", None), Recipe):
            told = {key: v for key, v in asdict(recipe).items() if key not in ("gemm", "backend")}
            found.setdefault(json.dumps(told, default=str), []).append(name)
    return found


def chosen(folder: Path, config: TrainConfig, how: Resume) -> Saved | None:
    """Choose the checkpoint to take up; None when there is none.

    Raises: CheckpointError when its small file is damaged, or a stable one is wanted and missing.
    """
    stable, steps = checkpoints(folder, "stable"), checkpoints(folder)
    everything = sorted(stable + steps, key=steps_of)  # of two with the same steps, a step-N
    if not everything:
        return None
    newest = opened(everything[-1])
    before = _settings(newest)
    wanted = _same_schedule(before, config)
    if how.start == "latest" or wanted or newest.state["step"] <= decay_begins(before):
        return newest
    if not stable:
        raise CheckpointError(
            f"there is no stable checkpoint in {folder} to begin the decay anew from: the run in "
            f"{newest.path.name} was told keep_stable=False, or to decay from its first step; "
            "resume with start='latest' and override_schedule=True"
        )
    return opened(stable[-1])


def check(saved: Saved, config: TrainConfig, how: Resume) -> None:
    """Refuse settings under which the run would not go on as it was.

    Raises: CheckpointError that names them and says what to do.
    """
    allowed = FREE | LENGTH | (SCHEDULE if how.override_schedule else frozenset())
    made_with = json.loads(json.dumps(asdict(config)))  # tuples become lists, as in the file
    differing = [
        f"{key} {saved.config.get(key)!r} (now {value!r})"
        for key, value in made_with.items()
        if key not in allowed and saved.config.get(key) != value
    ]
    if differing:
        raise CheckpointError(
            f"checkpoint {saved.path} was made with {', '.join(differing)}; "
            "give the same settings to go on, or another checkpoint directory to start anew"
        )
    before, step = _settings(saved), saved.state["step"]
    decaying = decay_begins(before) < step < before.steps
    if how.override_schedule or not decaying or step >= config.steps:
        return
    was, now = learning_rate(step, before), learning_rate(step, config)
    if was != now:
        raise CheckpointError(
            f"checkpoint {saved.path} is in the decay that its run began at step "
            f"{decay_begins(before)} of {before.steps}, and the new steps and decay_steps would "
            f"change its learning rate from {was:g} to {now:g}; give the same to finish it, or "
            "resume with start='stable' to go back to before the decay, or with "
            "override_schedule=True to go on from here"
        )


def check_recipes(saved: Saved, now: Mapping[str, list[str]], how: Resume) -> None:
    """Refuse a model whose layers have other recipes than the checkpoint's had.

    Raises: CheckpointError that names a layer and both recipes.
    """
    before = {name: recipe for recipe, names in saved.config["recipes"].items() for name in names}
    after = {name: recipe for recipe, names in now.items() for name in names}
    differing = [n for n in sorted({*before, *after}) if before.get(n) != after.get(n)]
    if differing and not how.other_recipe:
        name = differing[0]
        change = _change(before.get(name, "{}"), after.get(name, "{}"))
        raise CheckpointError(
            f"checkpoint {saved.path} was trained with another recipe in {len(differing)} layers, "
            f"the first is {name}: {change}; convert the model as it was, resume with "
            "other_recipe=True to go on with this one, or give another checkpoint directory"
        )


def _change(before: str, after: str) -> str:
    was, now = json.loads(before), json.loads(after)
    differing = [key for key in was | now if was.get(key) != now.get(key)]
    return ", ".join(f"{key} {was.get(key)} (now {now.get(key)})" for key in differing[:2])


def _settings(saved: Saved) -> TrainConfig:
    known = {f.name for f in fields(TrainConfig)}
    told = {key: value for key, value in saved.config.items() if key in known}
    return TrainConfig(**{**told, "betas": tuple(told["betas"])})


def _same_schedule(one: TrainConfig, other: TrainConfig) -> bool:
    names = LENGTH | SCHEDULE
    return all(getattr(one, name) == getattr(other, name) for name in names)
