"""Training checkpoints: safetensors and JSON, whole or absent, and never pickle.

A checkpoint is a directory `step-N` (N = steps done) with model.safetensors,
optimizer.safetensors and state.json. It is written under another name, flushed to disk and then
renamed, and only after that the older one goes: a kill at any moment leaves one that is whole.
"""

import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

MODEL_FILE: Final = "model.safetensors"
OPTIMIZER_FILE: Final = "optimizer.safetensors"
STATE_FILE: Final = "state.json"
FORMAT: Final = 1


class CheckpointError(ValueError):
    """A checkpoint is damaged or belongs to another run; the message says what to do."""


@dataclass(slots=True)
class Position:
    """Where a run stands; `train` moves it step by step."""

    step: int = 0
    losses: list[float] = field(default_factory=list)
    skipped_steps: int = 0
    skipped_in_a_row: int = 0

    def advance(self, loss: float, *, skipped: bool) -> None:
        """Count one step, done or skipped."""
        self.step += 1
        self.losses.append(loss)
        self.skipped_steps += skipped
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if skipped else 0


def save(
    folder: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    at: Position,
    config: Mapping[str, Any],
) -> Path:
    """Write checkpoint step-N durably, then remove the older ones. Returns its directory."""
    target, draft = folder / f"step-{at.step}", folder / f"draft-{at.step}"
    for left_by_a_kill in folder.glob("draft-*"):
        shutil.rmtree(left_by_a_kill, ignore_errors=True)
    draft.mkdir(parents=True)
    save_file(_detached(model_state(model)), draft / MODEL_FILE)
    save_file(_detached(optimizer_state(model, optimizer)), draft / OPTIMIZER_FILE)
    state = {
        "format": FORMAT,
        "step": at.step,
        "losses": [None if math.isnan(loss) else loss for loss in at.losses],
        "skipped_steps": at.skipped_steps,
        "skipped_in_a_row": at.skipped_in_a_row,
        "config": config,
        "sha256": {name: _sha256(draft / name) for name in (MODEL_FILE, OPTIMIZER_FILE)},
    }
    (draft / STATE_FILE).write_text(json.dumps(state), encoding="ascii")
    _flush([draft / MODEL_FILE, draft / OPTIMIZER_FILE, draft / STATE_FILE, draft])
    shutil.rmtree(target, ignore_errors=True)  # a damaged one, which its owner chose to redo
    draft.rename(target)
    _flush([folder])
    for old in checkpoints(folder):
        if old != target:
            shutil.rmtree(old, ignore_errors=True)
    return target


def load_latest(
    folder: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    wanted_config: Mapping[str, Any],
) -> Position | None:
    """Load the newest checkpoint of `folder` in place; None when there is none.

    Args: wanted_config: the settings that must equal those the checkpoint was made with.
    Raises: CheckpointError when a file is damaged, or of another model or other settings.
        Model and optimizer are then as they were.
    """
    found = checkpoints(folder)
    if not found:
        return None
    newest = found[-1]
    state = _read_state(newest / STATE_FILE)
    _check_config(newest, state["config"], wanted_config)
    weights = _read_tensors(newest / MODEL_FILE, state["sha256"])
    moments = _read_tensors(newest / OPTIMIZER_FILE, state["sha256"])
    _check_model(newest / MODEL_FILE, weights, model_state(model))
    _put_weights(model, weights)
    _put_moments(model, optimizer, moments)
    losses = [math.nan if loss is None else loss for loss in state["losses"]]
    return Position(state["step"], losses, state["skipped_steps"], state["skipped_in_a_row"])


def checkpoints(folder: Path) -> list[Path]:
    """List the checkpoint directories in `folder`, oldest first; drafts do not count."""
    if not folder.is_dir():
        return []
    named = [p for p in folder.iterdir() if re.fullmatch(r"step-\d+", p.name) and p.is_dir()]
    return sorted(named, key=lambda p: int(p.name.removeprefix("step-")))


def model_state(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and saved buffers by name, each once: tied weights go under their first name."""
    kept = model.state_dict().keys()
    buffers = {name: b for name, b in model.named_buffers() if name in kept}
    return dict(model.named_parameters()) | buffers


def optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Name the optimizer's tensors '<parameter>.<moment>'."""
    return {
        f"{name}.{key}": value
        for name, p in model.named_parameters()
        for key, value in optimizer.state.get(p, {}).items()
    }


def _put_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    with torch.no_grad():
        for name, tensor in model_state(model).items():
            tensor.copy_(weights[name])


def _put_moments(
    model: nn.Module, optimizer: torch.optim.Optimizer, moments: Mapping[str, Tensor]
) -> None:
    parameters = dict(model.named_parameters())
    optimizer.state.clear()
    for full_name, value in moments.items():
        name, _, key = full_name.rpartition(".")
        p = parameters[name]
        # The step counter stays where the optimizer wants it; moments go where the weights are.
        optimizer.state[p][key] = value.clone() if value.ndim == 0 else value.to(p.device).clone()


def _detached(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def _read_state(path: Path) -> dict[str, Any]:
    required = {"format", "step", "losses", "skipped_steps", "skipped_in_a_row", "config", "sha256"}
    try:
        state = json.loads(path.read_text(encoding="ascii"))
        missing = required - state.keys()
    except (OSError, ValueError, AttributeError) as error:
        raise _damaged(path, str(error)) from error
    if missing or state["format"] != FORMAT:
        raise _damaged(path, f"format {state.get('format')!r}, missing {sorted(missing)}")
    return dict(state)


def _read_tensors(path: Path, sha256: Mapping[str, str]) -> dict[str, Tensor]:
    try:
        if _sha256(path) != sha256[path.name]:
            raise _damaged(path, "its sha256 is not the one in state.json")
        return dict(load_file(path))
    except (OSError, KeyError, SafetensorError) as error:
        raise _damaged(path, str(error)) from error


def _damaged(path: Path, why: str) -> CheckpointError:
    return CheckpointError(
        f"checkpoint file {path} cannot be used: {why}; restore it from a copy, or delete "
        f"{path.parent} to train again from the checkpoint before it, or from the start"
    )


def _check_config(path: Path, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    made_with = json.loads(json.dumps(wanted))  # tuples become lists, as in the file
    differing = [
        f"{key} {found.get(key)!r} (now {value!r})"
        for key, value in made_with.items()
        if found.get(key) != value
    ]
    if differing:
        raise CheckpointError(
            f"checkpoint {path} was made with {', '.join(differing)}; "
            "give the same settings to go on, or another checkpoint directory to start anew"
        )


def _check_model(path: Path, found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    shapes = {name: tuple(tensor.shape) for name, tensor in found.items()}
    differing = sorted(
        name
        for name in shapes.keys() | wanted.keys()
        if name not in wanted or shapes.get(name) != tuple(wanted[name].shape)
    )
    if differing:
        raise CheckpointError(
            f"checkpoint {path} is of another model: {len(differing)} tensors differ in name or "
            f"shape, the first is {differing[0]}; give the model it was made with, or another "
            "checkpoint directory to start anew"
        )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush(paths: Iterable[Path]) -> None:
    for path in paths:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
