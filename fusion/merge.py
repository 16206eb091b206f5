"""Merges: several changes of one model become one change. A merge is a function and a row.

A delta is the difference of a trained model from the base, by parameter name. Every merge is
pure, works tensor by tensor in float64, and does not depend on the order of the deltas.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Final, Protocol

import numpy as np
from numpy.typing import NDArray

Float32 = NDArray[np.float32]
State = Mapping[str, Float32]


class Merge(Protocol):
    """Deltas of one tensor in, one merged delta out."""

    def __call__(
        self, deltas: NDArray[np.float64], *, weight: float, density: float
    ) -> NDArray[np.float64]:
        """Merge [S, ...] deltas into one [...]."""
        ...


def linear(deltas: NDArray[np.float64], *, weight: float, density: float) -> NDArray[np.float64]:
    """Scale the mean of the deltas: at weight 1 the mean of the models (arXiv 2203.05482)."""
    return np.asarray(weight * _total(deltas) / len(deltas))


def task_arithmetic(
    deltas: NDArray[np.float64], *, weight: float, density: float
) -> NDArray[np.float64]:
    """Scale the sum of the deltas (arXiv 2212.04089)."""
    return np.asarray(weight * _total(deltas))


def ties(deltas: NDArray[np.float64], *, weight: float, density: float) -> NDArray[np.float64]:
    """Trim each delta to its largest entries, elect signs, weight the mean of those that agree.

    Trim: keep the share `density` of each delta, by magnitude. Elect: the sign of the trimmed
    deltas' sum. Mean: over the trimmed entries of that sign only (arXiv 2306.01708).
    """
    flat = deltas.reshape(len(deltas), -1)
    kept = max(1, round(density * flat.shape[1]))
    threshold = np.partition(np.abs(flat), flat.shape[1] - kept, axis=1)[:, -kept, None]
    trimmed = np.where(np.abs(flat) >= threshold, flat, 0.0)
    agrees = (np.sign(trimmed) == np.sign(_total(trimmed))) & (trimmed != 0)
    total = _total(np.where(agrees, trimmed, 0.0))
    merged = weight * total / np.maximum(agrees.sum(axis=0), 1)
    return np.asarray(merged.reshape(deltas.shape[1:]))


def _total(deltas: NDArray[np.float64]) -> NDArray[np.float64]:
    """Sum over sources in order of value: the same bits in whatever order the sources come."""
    return np.asarray(np.sort(deltas, axis=0).sum(axis=0))


MERGES: Final[Mapping[str, Merge]] = MappingProxyType(
    {"linear": linear, "task_arithmetic": task_arithmetic, "ties": ties}
)
DEFAULT_WEIGHT: Final[Mapping[str, float]] = MappingProxyType(
    {"linear": 1.0, "task_arithmetic": 0.5, "ties": 1.0}
)
"""Measured on three sources of benchmarks/fusion.py: task arithmetic is best near 0.5 and falls
below the base at 1.0, because what the sources share is then added three times."""


def merge(
    base: State,
    deltas: Sequence[State],
    method: str,
    *,
    weight: float | None = None,
    density: float = 0.5,
) -> dict[str, Float32]:
    """Return base plus the merged deltas, in fp32; the inputs stay as they are.

    Args:
        base: the pivot's parameters.
        deltas: one per source, each with exactly the pivot's names and shapes.
        method: a key of MERGES.
        weight: factor on the merged delta; None: the method's own (DEFAULT_WEIGHT).
        density: share of entries kept, in (0, 1]; ties only.
    Raises: ValueError for an unknown method, no delta, or a delta that is not the base's.
    """
    if method not in MERGES:
        raise ValueError(f"unknown merge {method!r}; choose one of {', '.join(sorted(MERGES))}")
    if not deltas or not 0 < density <= 1:
        raise ValueError(f"{len(deltas)} deltas and density {density}: want some, and (0, 1]")
    for index, delta in enumerate(deltas):
        _require_same(base, delta, index)
    factor = DEFAULT_WEIGHT[method] if weight is None else weight
    merged: dict[str, Float32] = {}
    for name, value in base.items():
        stacked = np.stack([delta[name] for delta in deltas]).astype(np.float64)
        change = MERGES[method](stacked, weight=factor, density=density)
        merged[name] = (value.astype(np.float64) + change).astype(np.float32)
    return merged


def subtract(tuned: State, base: State) -> dict[str, Float32]:
    """Return the delta tuned - base. Raises ValueError when they are not of one model."""
    _require_same(base, tuned, 0)
    return {name: tuned[name] - value for name, value in base.items()}


def _require_same(base: State, delta: State, index: int) -> None:
    if base.keys() != delta.keys():
        odd = sorted(base.keys() ^ delta.keys())[:3]
        raise ValueError(f"delta {index} and the base do not share {odd}; train this base")
    for name, value in base.items():
        if delta[name].shape != value.shape:
            raise ValueError(
                f"{name} of delta {index} has shape {delta[name].shape}, the base {value.shape}; "
                "train this base"
            )
