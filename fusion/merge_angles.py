"""Merges by the deltas' lengths and the angles between them.

All of them give a combination of the deltas whose factors follow from their inner products, so
a tensor is read twice and nothing of its size is held beside the deltas and the result.
Shapes: S = sources, n = entries of a stretch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np

from fusion.merge_methods import STRETCH, Array, Float64, Stack, weighted_sum

_PARALLEL: Final = 1e-7
"""Sines below this are those of parallel deltas."""
_KARCHER_STEPS: Final = 200
_KARCHER_END: Final = 1e-10


def model_stock(stack: Stack) -> Float64:
    """Shrink the mean towards the base by how far apart the deltas point.

    t = S c / (1 + (S - 1) c), c the mean cosine of two deltas, taken as 0 where it is negative:
    models that point apart tell nothing of a common centre. One source stays as it is.
    Source: Model Stock (arXiv 2403.19522), with one ratio a tensor, as the paper's layers.
    """
    count = len(stack.deltas)
    cosines = _cosines(_gram(stack.deltas))
    pairs = cosines[np.triu_indices(count, 1)]
    cosine = max(0.0, float(pairs.mean())) if count > 1 else 1.0
    ratio = count * cosine / (1 + (count - 1) * cosine)
    return _combined(stack, np.full(count, ratio / count))


def slerp(stack: Stack) -> Float64:
    """Go along the arc from one delta to the other, by the second's part of the shares.

    In a straight line where the deltas are (nearly) parallel or opposite, or one is zero.
    """
    gram = _gram(stack.deltas)
    t = float(stack.shares[1] / stack.shares.sum())
    angle = float(np.arccos(np.clip(_cosines(gram)[0, 1], -1, 1)))
    if not gram.diagonal().all() or np.sin(angle) < _PARALLEL:
        return _combined(stack, np.asarray([1 - t, t]))
    parts = np.sin(np.asarray([(1 - t) * angle, t * angle])) / np.sin(angle)
    return _combined(stack, parts)


def karcher(stack: Stack) -> Float64:
    """Return the centre of the deltas' directions on the sphere, as long as they are on average.

    The point whose weighted mean tangent vanishes (Karcher's mean), found by going along that
    tangent until it is shorter than 1e-10; with two sources of one length it is their slerp.
    It lies in the deltas' span, so all of it is done with their S x S products. A source that is
    zero has no direction and counts for the length only.
    """
    gram = _gram(stack.deltas)
    lengths = np.sqrt(gram.diagonal())
    shares = stack.shares / stack.shares.sum()
    moving = (lengths > 0) * shares
    if not moving.sum() > 0:
        return np.zeros(stack.deltas[0].shape)
    moving = moving / moving.sum()
    cosines = _cosines(gram)
    centre = moving / max(np.sqrt(moving @ cosines @ moving), _PARALLEL)
    for _ in range(_KARCHER_STEPS):
        toward = np.clip(cosines @ centre, -1, 1)
        angles = np.arccos(toward)
        # An angle over its sine is 1 at 0; a source right opposite has no one way to it.
        rate = moving * np.divide(
            angles, np.sin(angles), out=np.ones_like(angles), where=np.sin(angles) > _PARALLEL
        )
        tangent = rate - (rate @ toward) * centre
        size = float(np.sqrt(max(tangent @ cosines @ tangent, 0.0)))
        if size < _KARCHER_END:
            break
        centre = np.cos(size) * centre + np.sin(size) / size * tangent
        centre = centre / np.sqrt(centre @ cosines @ centre)
    safe = np.where(lengths > 0, lengths, 1.0)
    return _combined(stack, centre / safe * float(shares @ lengths))


def _gram(deltas: Sequence[Array]) -> Float64:
    """Return the inner products [S, S] of the deltas."""
    flat = [delta.reshape(-1) for delta in deltas]
    total: Float64 = np.zeros((len(flat), len(flat)))
    for start in range(0, flat[0].size, STRETCH):
        part = np.stack([f[start : start + STRETCH] for f in flat]).astype(np.float64)
        total = total + part @ part.T
    return total


def _cosines(gram: Float64) -> Float64:
    """Return the cosines [S, S] from inner products; 0 to a delta of zero, 1 to itself."""
    lengths = np.sqrt(gram.diagonal())
    products = np.outer(lengths, lengths)
    cosines: Float64 = np.divide(gram, products, out=np.zeros_like(gram), where=products > 0)
    np.fill_diagonal(cosines, 1.0)
    return cosines


def _combined(stack: Stack, factors_S: Float64) -> Float64:
    return stack.by_stretch(lambda deltas: weighted_sum(deltas, factors_S))
