"""The files of a training checkpoint: written to the disk for sure, and read only when whole."""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

STATE_FILE: Final = "state.json"
FORMAT: Final = 2
_REQUIRED: Final = frozenset(
    ("format", "step", "losses", "skipped_steps", "skipped_in_a_row", "config", "ranks", "sha256")
)


class CheckpointError(ValueError):
    """A checkpoint is damaged or belongs to another run; the message says what to do."""


def read_state(path: Path) -> dict[str, Any]:
    """Read a checkpoint's small file. Raises: CheckpointError when it is damaged or older."""
    try:
        state = json.loads(path.read_text(encoding="ascii"))
        missing = _REQUIRED - state.keys()
    except (OSError, ValueError, AttributeError) as error:
        raise damaged(path, str(error)) from error
    if state.get("format") == 1 and missing <= {"ranks"}:
        raise CheckpointError(
            f"checkpoint {path.parent} has format 1, of an older cofuse; finish that run with the "
            "version it was begun with, or give another checkpoint directory to start anew"
        )
    if missing or state["format"] != FORMAT:
        raise damaged(path, f"format {state.get('format')!r}, missing {sorted(missing)}")
    return dict(state)


def read_tensors(path: Path, sha256: Mapping[str, str]) -> dict[str, Tensor]:
    """Read a file of tensors if it has its digest. Args: sha256: by name of file.

    Raises: CheckpointError.
    """
    try:
        if sha256_of(path) != sha256[path.name]:
            raise damaged(path, "its sha256 is not the one in state.json")
        return dict(load_file(path))
    except (OSError, KeyError, SafetensorError) as error:
        raise damaged(path, str(error)) from error


def damaged(path: Path, why: str) -> CheckpointError:
    """Say what to do about a file that cannot be used."""
    return CheckpointError(
        f"checkpoint file {path} cannot be used: {why}; restore it from a copy, or delete "
        f"{path.parent} to train again from the checkpoint before it, or from the start"
    )


def check_model(path: Path, found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    """Raise CheckpointError unless a file's tensors have the model's names and shapes."""
    shapes = {name: tuple(tensor.shape) for name, tensor in found.items()}
    differing = sorted(
        name
        for name in shapes.keys() | wanted.keys()
        if name not in wanted or shapes.get(name) != tuple(wanted[name].shape)
    )
    if differing:
        raise of_another_model(path, len(differing), differing[0])


def of_another_model(path: Path, differing: int, first: str) -> CheckpointError:
    """Say how many tensors differ from the model's, and the name of the first."""
    return CheckpointError(
        f"checkpoint {path} is of another model: {differing} tensors differ in name or "
        f"shape, the first is {first}; give the model it was made with, or another "
        "checkpoint directory to start anew"
    )


def sha256_of(path: Path) -> str:
    """The digest of a file, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def flush(paths: Iterable[Path]) -> None:
    """Have the disk hold what was written to files and folders."""
    for path in paths:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
