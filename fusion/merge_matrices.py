"""Merges that look at a matrix as a map: what it does to its inputs. Vectors are averaged.

Shapes: O, I = outputs and inputs of a linear layer, S = sources. In float64, and not a stretch at
a time: wudi holds about eight matrices [O, I] and one [I, I] beside the deltas.
"""

from __future__ import annotations

import numpy as np

from fusion.merge_methods import Float64, Stack, linear


def wudi(stack: Stack) -> Float64:
    """Find the change that disturbs each source least on that source's own inputs.

    min over x of sum_i |(x - d_i) d_i^T|^2 / |d_i|^2 (Frobenius): the rows of d_i span what the
    layer's inputs were in training. By Adam for `iterations` steps of `learning_rate`; the paper's
    300 steps of 1e-5 from the deltas' sum. Two deviations: the start is the mean where its
    objective is lower, and the best point on the way is returned, so that the result is never
    worse than sum or mean. The gradient 2 (x A - B) takes two matrices made once.
    Every matrix is taken for a linear layer's, embeddings too; others get the mean.

    Source: WUDI-Merging (arXiv 2503.08099).
    """
    deltas = [d.astype(np.float64) for d in stack.deltas if d.ndim == 2 and d.any()]
    if not deltas:
        return _mean(stack)
    a_II, b_OI = np.zeros((deltas[0].shape[1],) * 2), np.zeros(deltas[0].shape)
    for d_OI in deltas:
        gram_II = d_OI.T @ d_OI / np.square(d_OI).sum()
        a_II += gram_II
        b_OI += d_OI @ gram_II

    def half_slope(x_OI: Float64) -> tuple[Float64, float]:
        """Return half the gradient, and the objective but for a constant."""
        slope_OI = x_OI @ a_II - b_OI
        return slope_OI, float(((slope_OI - b_OI) * x_OI).sum())

    total = np.asarray(sum(deltas))
    starts = (total, total / len(stack.deltas))
    x_OI = min(starts, key=lambda start: half_slope(start)[1]).copy()
    first, second = np.zeros_like(x_OI), np.zeros_like(x_OI)
    slope_OI, least = half_slope(x_OI)
    best = x_OI.copy()
    for step in range(1, int(stack.parameters["iterations"]) + 1):
        first += (1 - _BETA_1) * (2 * slope_OI - first)
        second += (1 - _BETA_2) * (np.square(2 * slope_OI) - second)
        size = np.sqrt(second / (1 - _BETA_2**step)) + _EPSILON
        x_OI -= stack.parameters["learning_rate"] * first / (1 - _BETA_1**step) / size
        slope_OI, value = half_slope(x_OI)
        if value < least:
            best[:], least = x_OI, value
    return best


_BETA_1, _BETA_2, _EPSILON = 0.9, 0.999, 1e-8


def iso_c(stack: Stack) -> Float64:
    """Sum the deltas and make all singular values of the sum their mean; others: the mean.

    No direction that the sources share drowns those that one has alone.
    Source: Iso-C (arXiv 2502.04959).
    """
    total = np.asarray(sum(d.astype(np.float64) for d in stack.deltas))
    if total.ndim != 2 or not total.any():
        return _mean(stack)
    u, s, vt = np.linalg.svd(total, full_matrices=False)
    return np.asarray(s.mean() * (u @ vt))


def tsv(stack: Stack) -> Float64:
    """Sum the deltas' leading singular parts after making them orthogonal to each other.

    Of each delta the first rank / S singular triples stay; the left (and the right) vectors of all
    sources are replaced by the nearest orthonormal set. Others: the mean.
    Source: TSV-Merge (arXiv 2412.00081).
    """
    # A delta of zero has directions all the same, which would push the others aside.
    deltas = [d.astype(np.float64) for d in stack.deltas if d.ndim == 2 and d.any()]
    if not deltas:
        return _mean(stack)
    kept = max(1, min(deltas[0].shape) // len(deltas))
    parts = [np.linalg.svd(d, full_matrices=False) for d in deltas]
    # More sources than rank: the sets cannot be orthogonal, only as near as they come.
    left = _nearest_orthonormal(np.concatenate([u[:, :kept] for u, _, _ in parts], axis=1))
    right = _nearest_orthonormal(np.concatenate([vt[:kept].T for _, _, vt in parts], axis=1))
    sizes = np.concatenate([s[:kept] for _, s, _ in parts])
    return np.asarray((left * sizes) @ right.T)


def _nearest_orthonormal(columns: Float64) -> Float64:
    u, _, vt = np.linalg.svd(columns, full_matrices=False)
    return np.asarray(u @ vt)


def _mean(stack: Stack) -> Float64:
    count = len(stack.deltas)
    return linear(Stack(stack.deltas, np.full(count, 1 / count)))
