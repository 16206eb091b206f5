"""Merges: several changes of one model become one change. A merge is a function and a row.

A delta is the difference of a trained model from the base, by parameter name. Every merge is
pure, works tensor by tensor in float64, and does not depend on the order of the deltas. The
functions are in merge_methods and merge_matrices, the rows in merge_settings; whole model
directories are merged by merge_files.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fusion.merge_methods import Array, Float64, Stack
from fusion.merge_settings import MERGES, MergeError, MergeSettings

Float32 = NDArray[np.float32]
State = Mapping[str, Float32]


def merge_tensor(
    tensor: str,
    deltas: Mapping[str, Array],
    settings: MergeSettings,
    *,
    fisher: Mapping[str, Array] | None = None,
    base: Array | None = None,
) -> Float64:
    """Merge the deltas of one tensor; the result is the merged delta, with `weight` in it.

    Args:
        tensor: its name, which random drops depend on.
        deltas: by source, of one shape.
        settings: how to merge them.
        fisher: by source, at least 0; for method fisher, and only for it.
        base: the tensor that the deltas are measured from; for around="origin".
    Raises: MergeError for values that are not finite, or a missing fisher or base.
    """
    sources = tuple(sorted(deltas))
    shares = settings.shares(sources)
    for name in sources:
        if not np.isfinite(deltas[name]).all():
            raise MergeError(f"{tensor} of {name} holds NaN or infinity; train or export it anew")
    rows = [deltas[name] for name in sources]
    origin = None
    if settings.around == "origin":
        if base is None:
            raise MergeError("around='origin' merges whole models; give the base too")
        origin = base.astype(np.float64)
        rows = [row + origin for row in rows]
    stack = Stack(
        deltas=rows,
        shares=np.asarray([shares[name] for name in sources]),
        sources=sources,
        tensor=tensor,
        parameters=settings.parameters(),
        fisher=_fisher_of(tensor, sources, settings, fisher, rows[0].shape),
    )
    merged = MERGES[settings.method].merge(stack)
    if origin is not None:
        np.subtract(merged, origin, out=merged)
    np.multiply(merged, settings.factor(), out=merged)  # in place: a tensor's size less
    return merged


def _fisher_of(
    tensor: str,
    sources: Sequence[str],
    settings: MergeSettings,
    fisher: Mapping[str, Array] | None,
    shape: tuple[int, ...],
) -> list[Array]:
    if (settings.method == "fisher") != (fisher is not None):
        raise MergeError(
            f"{settings.method} got {'Fisher' if fisher else 'no Fisher'} information; "
            "give it to method fisher, and only to it (fusion.fisher makes it)"
        )
    found = [] if fisher is None else [fisher[name] for name in sources]
    for name, values in zip(sources, found, strict=False):
        if values.shape != shape or not bool((np.isfinite(values) & (values >= 0)).all()):
            raise MergeError(
                f"Fisher information of {tensor} of {name} has shape {values.shape}, or values "
                f"below 0 or not finite; wanted {shape}: make it anew"
            )
    return found


def merge(
    base: State,
    deltas: Mapping[str, State] | Sequence[State],
    method: str | MergeSettings,
    *,
    weight: float | None = None,
    density: float | None = None,
    fisher: Mapping[str, State] | None = None,
) -> dict[str, Float32]:
    """Return base plus the merged deltas, in fp32; the inputs stay as they are.

    Args:
        base: the pivot's parameters.
        deltas: by source, or just one per source, each with exactly the pivot's names and shapes.
            What is dropped at random depends on a source's name, or without one on its values.
        method: settings, or a key of MERGES.
        weight: as in MergeSettings, where method is a key.
        density: as weight.
        fisher: by source, for method fisher.
    Raises: MergeError for settings that do not fit, no delta, or one that is not the base's.
    """
    if isinstance(method, str):
        settings = MergeSettings(method=method, weight=weight, density=density)
    elif weight is None and density is None:
        settings = method
    else:
        raise MergeError("weight and density are given beside settings; put them into these")
    named = isinstance(deltas, Mapping)
    if fisher is not None and not named:
        raise MergeError("Fisher information is by source; give the deltas by source too")
    rows: Mapping[str, State] = (
        deltas if isinstance(deltas, Mapping) else {str(i): d for i, d in enumerate(deltas)}
    )
    settings.shares(sorted(rows))
    for name, delta in rows.items():
        require_same(base, delta, name)
    merged: dict[str, Float32] = {}
    for tensor, value in base.items():
        of = {name: row[tensor] for name, row in rows.items()}
        information = None if fisher is None else {n: f[tensor] for n, f in fisher.items()}
        if not named:
            of = _named_by_content(of)
        change = merge_tensor(tensor, of, settings, fisher=information, base=value)
        merged[tensor] = (value.astype(np.float64) + change).astype(np.float32)
    return merged


def _named_by_content(arrays: Mapping[str, Array]) -> dict[str, Array]:
    """Name arrays by their bytes, so that the order in which they came is forgotten."""
    digests = sorted(
        ((hashlib.sha256(np.ascontiguousarray(a).data).hexdigest(), a) for a in arrays.values()),
        key=lambda pair: pair[0],
    )
    return {f"{digest}.{place}": array for place, (digest, array) in enumerate(digests)}


def subtract(tuned: State, base: State) -> dict[str, Float32]:
    """Return the delta tuned - base. Raises MergeError when they are not of one model."""
    require_same(base, tuned, 0)
    return {name: tuned[name] - value for name, value in base.items()}


def require_same(base: State, delta: Mapping[str, NDArray[Any]], index: object) -> None:
    """Raise MergeError when names or shapes are not the base's."""
    if base.keys() != delta.keys():
        odd = sorted(base.keys() ^ delta.keys())[:3]
        raise MergeError(f"delta {index} and the base do not share {odd}; train this base")
    for name, value in base.items():
        if delta[name].shape != value.shape:
            raise MergeError(
                f"{name} of delta {index} has shape {delta[name].shape}, the base {value.shape}; "
                "train this base"
            )


__all__ = [
    "MERGES",
    "MergeError",
    "MergeSettings",
    "State",
    "merge",
    "merge_tensor",
    "require_same",
    "subtract",
]
