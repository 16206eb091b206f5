"""The file of a weights contribution: how a pivot's parameters differ after private training.

Whatever arrives is hostile until check_delta has read all of it, one tensor at a time.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fusion.contribution import CODEC_VERSION, ContributionError
from fusion.tensor_file import Entry, TensorFile, TensorWriter


@dataclass(frozen=True, slots=True, kw_only=True)
class DeltaHeader:
    """What a weights contribution says of itself."""

    codec_version: int
    pivot_sha256: str
    steps: int
    tokens: int


def write_delta(
    path: Path,
    delta: Mapping[str, NDArray[np.float32]],
    *,
    pivot_sha256: str,
    steps: int,
    tokens: int,
) -> None:
    """Write the difference of a trained pivot's parameters from the pivot's own.

    Args: steps, tokens: how long it was trained on private text.
    """
    header = DeltaHeader(
        codec_version=CODEC_VERSION, pivot_sha256=pivot_sha256, steps=steps, tokens=tokens
    )
    arrays = {name: Entry(str(values.dtype), values.shape) for name, values in delta.items()}
    with TensorWriter(path, arrays, header) as writer:
        for name, values in delta.items():
            writer.put(name, values)


def read_delta(path: Path) -> tuple[DeltaHeader, dict[str, NDArray[np.float32]]]:
    """Read a delta that check_delta has accepted. Raises ContributionError."""
    file = TensorFile(path, DeltaHeader)
    return file.header, {name: file.rows(name) for name in file.arrays}


def check_delta(
    path: Path, *, pivot_sha256: str, shapes: Mapping[str, tuple[int, ...]]
) -> DeltaHeader:
    """Read a delta to the last value and refuse what does not fit the pivot.

    Args: shapes: the pivot's parameters by name.
    Raises: ContributionError, whose code says what is wrong and whose text says what to do.
    """
    file = TensorFile(path, DeltaHeader)
    if file.header.pivot_sha256 != pivot_sha256:
        raise ContributionError(
            "wrong_pivot",
            f"trained from pivot {file.header.pivot_sha256[:12]}, this round's is "
            f"{pivot_sha256[:12]}: pull the round's pivot and train again",
        )
    if missing := sorted(shapes.keys() - file.arrays.keys()):
        raise ContributionError(
            "missing_tensor", f"{missing[:3]} are missing: ship every parameter of the pivot"
        )
    if unknown := sorted(file.arrays.keys() - shapes.keys()):
        raise ContributionError(
            "unknown_tensor", f"{unknown[:3]} are no parameters of the pivot: leave them out"
        )
    for name, entry in file.arrays.items():
        if entry.dtype != "float32" or entry.shape != tuple(shapes[name]):
            raise ContributionError(
                "wrong_shape",
                f"{name} is {entry.dtype} {entry.shape}, wanted float32 {tuple(shapes[name])}: "
                "train the round's pivot, not another model",
            )
    for name in file.arrays:
        if not np.isfinite(file.rows(name)).all():
            raise ContributionError(
                "not_finite", f"{name} holds NaN or infinity: the model diverged; train it again"
            )
    return file.header


def rewrite_delta(
    path: Path, out: Path, *, pivot_sha256: str, shapes: Mapping[str, tuple[int, ...]]
) -> DeltaHeader:
    """Check as check_delta does, and write the values that were read as a file of our own.

    Args: out: appears whole, or not at all. Its tensors have the order of `shapes`.
    Raises: ContributionError.
    """
    header = check_delta(path, pivot_sha256=pivot_sha256, shapes=shapes)
    file = TensorFile(path, DeltaHeader)
    arrays = {name: Entry("float32", tuple(shape)) for name, shape in shapes.items()}
    with TensorWriter(out, arrays, header) as writer:
        for name in arrays:
            writer.put(name, file.rows(name))
    return header
