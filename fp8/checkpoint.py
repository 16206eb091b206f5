"""Training checkpoints: safetensors and JSON, whole or absent, and never pickle.

A checkpoint is a directory `step-N` (N = steps done) with model.safetensors,
optimizer.safetensors and state.json. It is written under another name, flushed to disk and then
renamed, and only after that the older one goes: a kill at any moment leaves one that is whole.
`stable-N` is the same, made when the learning rate is about to decay, and stays until the next.

Of a sharded model whole tensors are written, so that any number of ranks can go on from them, by
the first rank, into a folder that all ranks see. Moments in 8 bits are coded shard by shard and
written so: only as many ranks can go on from those.
"""

import json
import math
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from fp8.checkpoint_files import (
    FORMAT,
    STATE_FILE,
    CheckpointError,
    check_model,
    damaged,
    flush,
    of_another_model,
    read_state,
    read_tensors,
    sha256_of,
)
from fp8.distributed import Ranks, like, settle, whole
from fp8.epoch import invalidate_weight_caches
from fp8.linear import float8_state, load_float8_state
from fp8.optim_state import check_state, local_tensor

MODEL_FILE: Final = "model.safetensors"
OPTIMIZER_FILE: Final = "optimizer.safetensors"
FLOAT8_FILE: Final = "fp8.safetensors"


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


@dataclass(frozen=True, slots=True)
class Saved:
    """A checkpoint on disk, its small file read."""

    path: Path
    state: Mapping[str, Any]

    @property
    def config(self) -> dict[str, Any]:
        """What `save` was told of the run."""
        return dict(self.state["config"])


def save(
    folder: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    at: Position,
    config: Mapping[str, Any],
    *,
    stable: bool = False,
    ranks: Ranks | None = None,
) -> Path:
    """Write checkpoint step-N, or stable-N, durably, then remove the older ones of its kind.

    Every rank must call it. Returns its directory.
    """
    ranks = ranks or Ranks()
    settle(model)
    kind = "stable" if stable else "step"
    target, draft = folder / f"{kind}-{at.step}", folder / f"draft-{at.step}"
    if ranks.first:
        for left_by_a_kill in folder.glob("draft-*"):
            shutil.rmtree(left_by_a_kill, ignore_errors=True)
        draft.mkdir(parents=True)
    ranks.wait()
    _write_tensors(draft, model, optimizer, ranks)
    ranks.wait()
    if ranks.first:
        names = sorted(p.name for p in draft.iterdir())
        state = {
            "format": FORMAT,
            "step": at.step,
            "losses": [None if math.isnan(loss) else loss for loss in at.losses],
            "skipped_steps": at.skipped_steps,
            "skipped_in_a_row": at.skipped_in_a_row,
            "config": config,
            "ranks": ranks.size,
            "sha256": {name: sha256_of(draft / name) for name in names},
        }
        (draft / STATE_FILE).write_text(json.dumps(state), encoding="ascii")
        flush([*(draft / name for name in names), draft / STATE_FILE, draft])
        _put_in_place(folder, draft, target, kind)
    ranks.wait()
    return target


def load(
    saved: Saved,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    other_recipe: bool = False,
    ranks: Ranks | None = None,
) -> Position:
    """Load a checkpoint in place; with `other_recipe` but for what FP8 layers remember.

    Raises: CheckpointError when a file is damaged, or of another model, or holds the shards of
        another number of ranks. Model and optimizer are then as they were.
    """
    state, sha256, ranks = saved.state, saved.state["sha256"], ranks or Ranks()
    settle(model)
    weights = read_tensors(saved.path / MODEL_FILE, sha256)
    moments = read_tensors(saved.path / OPTIMIZER_FILE, sha256)
    shards = {}
    if any(name.startswith("optimizer-rank-") for name in sha256):
        shards = read_tensors(saved.path / _shard_file(saved, ranks), sha256)
    float8 = {}
    if FLOAT8_FILE in sha256 and not other_recipe:
        float8 = read_tensors(saved.path / FLOAT8_FILE, sha256)
        check_model(saved.path / FLOAT8_FILE, float8, float8_state(model))
    check_model(saved.path / MODEL_FILE, weights, model_state(model))
    placed = _place_moments(saved.path / OPTIMIZER_FILE, model, optimizer, moments, shards)
    with torch.no_grad():
        for name, tensor in model_state(model).items():
            tensor.copy_(like(weights[name], tensor))
    optimizer.state.clear()
    optimizer.state.update(placed)
    invalidate_weight_caches()
    if float8:  # after the caches: delayed scaling counts in the same epochs
        load_float8_state(model, float8)
    losses = [math.nan if loss is None else loss for loss in state["losses"]]
    return Position(state["step"], losses, state["skipped_steps"], state["skipped_in_a_row"])


def checkpoints(folder: Path, kind: str = "step") -> list[Path]:
    """List the checkpoint directories of a kind in `folder`, oldest first; drafts do not count."""
    if not folder.is_dir():
        return []
    named = [p for p in folder.iterdir() if re.fullmatch(rf"{kind}-\d+", p.name) and p.is_dir()]
    return sorted(named, key=steps_of)


def steps_of(path: Path) -> int:
    """Read the steps done off a checkpoint's name."""
    return int(path.name.rpartition("-")[2])


def opened(path: Path) -> Saved:
    """Read the small file of a checkpoint. Raises: CheckpointError when it is damaged."""
    return Saved(path, read_state(path / STATE_FILE))


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


def _write_tensors(
    draft: Path, model: nn.Module, optimizer: torch.optim.Optimizer, ranks: Ranks
) -> None:
    parameters = dict(model.named_parameters())
    moments = optimizer_state(model, optimizer)
    shards = {
        name: value
        for name, value in moments.items()
        if isinstance(parameters[name.rpartition(".")[0]], DTensor)
        and not isinstance(value, DTensor)
        and value.ndim > 0
    }
    histories: dict[str, Tensor] = {}
    for part in reversed(ranks.gather(float8_state(model))):
        histories |= {name: _larger(histories.get(name), value) for name, value in part.items()}
    files = {
        MODEL_FILE: model_state(model),
        OPTIMIZER_FILE: {k: v for k, v in moments.items() if k not in shards},
        FLOAT8_FILE: histories,
    }
    for name, tensors in files.items():
        kept = _gathered(tensors, keep=ranks.first)
        if ranks.first and (tensors or name != FLOAT8_FILE):
            save_file(kept, draft / name)
    if ranks.gather(len(shards)) != [0] * ranks.size:
        save_file(_gathered(shards, keep=True), draft / f"optimizer-rank-{ranks.rank}.safetensors")


def _larger(one: Tensor | None, other: Tensor) -> Tensor:
    # Each rank has scaled by the largest values it saw; the whole run has seen the largest of all.
    other = other.cpu()
    return other if one is None else torch.maximum(one, other)


def _gathered(tensors: Mapping[str, Tensor], *, keep: bool) -> dict[str, Tensor]:
    kept = {}
    for name, tensor in tensors.items():
        full = whole(tensor.detach())  # one at a time: a GPU need not hold the whole model
        if keep:
            kept[name] = full.cpu().contiguous()
    return kept


def _put_in_place(folder: Path, draft: Path, target: Path, kind: str) -> None:
    # Newer ones are of a branch that was left (a decay begun anew), and would be taken for the
    # newest after a kill: they go first. The one this run came from is older, or is `stable`.
    others = [p for p in checkpoints(folder, kind) if p != target]
    for left in (p for p in others if steps_of(p) > steps_of(target)):
        shutil.rmtree(left, ignore_errors=True)
    shutil.rmtree(target, ignore_errors=True)  # a damaged one, which its owner chose to redo
    draft.rename(target)
    flush([folder])
    for old in others:
        shutil.rmtree(old, ignore_errors=True)


def _shard_file(saved: Saved, ranks: Ranks) -> str:
    if saved.state["ranks"] != ranks.size:
        raise CheckpointError(
            f"checkpoint {saved.path} holds 8-bit moments coded in the shards of "
            f"{saved.state['ranks']} ranks, and this run has {ranks.size}; start as many "
            f"(torchrun --nproc-per-node {saved.state['ranks']}), or train with "
            'TrainConfig.optimizer "adamw", whose checkpoints fit any number'
        )
    return f"optimizer-rank-{ranks.rank}.safetensors"


def _place_moments(
    path: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    moments: Mapping[str, Tensor],
    shards: Mapping[str, Tensor],
) -> dict[Tensor, dict[str, Tensor]]:
    """Put moments where their parameters are, sharded as they are (shards: already), as copies."""
    parameters = dict(model.named_parameters())
    placed: dict[Tensor, dict[str, Tensor]] = {}
    fused = any(group.get("fused") for group in optimizer.param_groups)
    for full_name, value in (*moments.items(), *shards.items()):
        name, _, key = full_name.rpartition(".")
        if name not in parameters:
            raise of_another_model(path, 1, full_name)
        p = parameters[name]
        if value.ndim == 0:  # the step counter stays where the optimizer wants it
            value = value.to(p.device) if fused else value
        else:
            as_it_is = full_name in shards or value.shape != p.shape
            value = value.to(p.device) if as_it_is else like(value, p)
        placed.setdefault(p, {})[key] = value.clone()
    for owner, state in placed.items():
        try:
            check_state(owner, {key: local_tensor(value) for key, value in state.items()})
        except ValueError as error:
            raise damaged(path, str(error)) from error
    return placed
