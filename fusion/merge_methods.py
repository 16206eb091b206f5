"""The rules by which several changes of one tensor become one. Each is a pure function of a Stack.

Large tensors are worked on a stretch at a time in float64, so beside the deltas and the result
nothing of a tensor's size is made, but for one copy where a rule ranks entries (two in sce).
Sources come in the order of their names, and so the order in which they are given changes no bit.
Shapes: S = sources, N = entries of the tensor, n = entries of a stretch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Float64 = NDArray[np.float64]
Thin = Callable[[Float64], Float64]
"""Takes the stretches of [S, n] in turn, each once, and sets entries of them to zero."""

STRETCH: Final = 1 << 15
"""Entries of a stretch: 256 KiB a source in float64, which caches hold; 2 MiB are slower."""


@dataclass(frozen=True, slots=True)
class Stack:
    """The deltas of one tensor, a row a source, with what the rules need to know of them."""

    deltas: Sequence[Array]
    """One float array a source, all of one shape."""
    shares: Float64
    """[S], the factor of each source."""
    sources: tuple[str, ...] = ()
    tensor: str = ""
    parameters: Mapping[str, float] = field(default_factory=dict)
    fisher: Sequence[Array] = ()
    """The second stack that `fisher` reads: at least 0, shaped as the deltas."""

    def by_stretch(self, rule: Callable[[Float64], Float64]) -> Float64:
        """Apply a rule [S, n] -> [n] to stretches of whole rows, in order."""
        return _by_stretch(rule, self.deltas)


def _by_stretch(rule: Callable[..., Float64], *stacks: Sequence[Array]) -> Float64:
    """Apply rule([S, n], ...) -> [n] along the stacks' entries, and shape it as one of them."""
    shape = stacks[0][0].shape
    flat = [[array.reshape(-1) for array in stack] for stack in stacks]
    size, row = flat[0][0].size, _row_length(shape)
    step = max(1, STRETCH // row) * row
    merged = np.empty(size)
    for start in range(0, size, step):
        parts = [np.stack([a[start : start + step] for a in s]) for s in flat]
        merged[start : start + step] = rule(*(part.astype(np.float64) for part in parts))
    return merged.reshape(shape)


def _row_length(shape: tuple[int, ...]) -> int:
    """Entries that DELLA ranks together: a matrix's row, a vector whole."""
    return max(1, shape[-1] if shape else 1)


# ------------------------------------------------------------------ what becomes of the sources
def weighted_sum(deltas_Sn: Float64, shares_S: Float64) -> Float64:
    """Sum the deltas, each with its share."""
    return np.asarray((shares_S[:, None] * deltas_Sn).sum(axis=0))


def elected_mean(deltas_Sn: Float64, shares_S: Float64) -> Float64:
    """Return the weighted mean over the sources whose sign is that of the weighted sum.

    Zeros have no vote and are not averaged in. Source: TIES (arXiv 2306.01708), steps 2 and 3.
    """
    voices = shares_S[:, None] * deltas_Sn
    agrees = np.sign(voices) == np.sign(voices.sum(axis=0))
    counted = np.where(agrees, np.abs(shares_S)[:, None], 0.0).sum(axis=0)
    total = np.where(agrees, voices, 0.0).sum(axis=0)
    return np.asarray(np.divide(total, counted, out=np.zeros_like(total), where=counted > 0))


# ------------------------------------------------------------------------ what is left of each
def _trimmed(stack: Stack) -> Thin:
    """Keep the share `density` of each delta that is largest by magnitude; of equals, all."""
    edges = [_edges(delta, stack.parameters["density"], 0.0) for delta in stack.deltas]
    return _between(edges)


def _band(stack: Stack) -> Thin:
    """Drop the share `gamma` that is largest, and keep the share `density` below it."""
    density, gamma = stack.parameters["density"], stack.parameters["gamma"]
    return _between([_edges(delta, density, gamma) for delta in stack.deltas])


def _edges(delta: Array, density: float, gamma: float) -> tuple[float, float]:
    """Return the smallest and the largest magnitude that stay."""
    if delta.size == 0:
        return 0.0, 0.0
    size = np.abs(delta).reshape(-1)
    highest = len(size) - 1 - min(int(gamma * len(size)), len(size) - 1)
    lowest = max(0, highest + 1 - max(1, round(density * len(size))))
    size.partition([lowest, highest])
    return float(size[lowest]), float(size[highest])


def _between(edges: Sequence[tuple[float, float]]) -> Thin:
    low, high = (np.asarray(side)[:, None] for side in zip(*edges, strict=True))

    def thin(deltas_Sn: Float64) -> Float64:
        size = np.abs(deltas_Sn)
        return np.where((size >= low) & (size <= high), deltas_Sn, 0.0)

    return thin


def _dropped(stack: Stack) -> Thin:
    """Keep entries with probability `density`, divided by it (DARE, arXiv 2311.03099)."""
    density, draws = stack.parameters["density"], _draws(stack)

    def thin(deltas_Sn: Float64) -> Float64:
        drawn = np.stack([draw.random(deltas_Sn.shape[1]) for draw in draws])
        return np.where(drawn < density, deltas_Sn / density, 0.0)

    return thin


def _dropped_by_rank(stack: Stack) -> Thin:
    """Keep entries with a probability that grows with their rank in the row, divided by it.

    From density - epsilon for the smallest to density + epsilon for the largest, in even steps.
    Source: DELLA (arXiv 2406.11617), MagPrune.
    """
    density, epsilon = stack.parameters["density"], stack.parameters["epsilon"]
    draws, shape = _draws(stack), stack.deltas[0].shape
    row = _row_length(shape)
    kept = np.linspace(density - epsilon, density + epsilon, row) if row > 1 else density

    def thin(deltas_Sn: Float64) -> Float64:
        rows = np.abs(deltas_Sn).reshape(len(deltas_Sn), -1, row)
        ranks = np.argsort(np.argsort(rows, axis=-1, kind="stable"), axis=-1, kind="stable")
        p_Sn = np.broadcast_to(kept, (row,))[ranks].reshape(deltas_Sn.shape)
        drawn = np.stack([draw.random(deltas_Sn.shape[1]) for draw in draws])
        return np.where(drawn < p_Sn, deltas_Sn / p_Sn, 0.0)

    return thin


def _draws(stack: Stack) -> list[np.random.Generator]:
    """One stream a source, which depends on the seed, the tensor and the source, and no more."""
    keys = (f"{int(stack.parameters['seed'])}\0{stack.tensor}\0{name}" for name in stack.sources)
    digests = (hashlib.sha256(key.encode()).digest()[:16] for key in keys)
    return [np.random.Generator(np.random.Philox(key=int.from_bytes(d, "big"))) for d in digests]


# ------------------------------------------------------------------------------- entry by entry
def linear(stack: Stack) -> Float64:
    """Sum the deltas by their shares: the mean (soup, arXiv 2203.05482) or task arithmetic.

    Source of task arithmetic: arXiv 2212.04089.
    """
    return stack.by_stretch(lambda deltas: weighted_sum(deltas, stack.shares))


def ties(stack: Stack) -> Float64:
    """Trim each delta to its largest entries, elect signs, average those that agree.

    Source: TIES (arXiv 2306.01708), which keeps a share of 0.2.
    """
    thin = _trimmed(stack)
    return stack.by_stretch(lambda deltas: elected_mean(thin(deltas), stack.shares))


def dare_linear(stack: Stack) -> Float64:
    """Drop entries at random, rescale the rest, and sum: unbiased (arXiv 2311.03099)."""
    thin = _dropped(stack)
    return stack.by_stretch(lambda deltas: weighted_sum(thin(deltas), stack.shares))


def dare_ties(stack: Stack) -> Float64:
    """Drop entries at random, rescale the rest, elect signs and average (arXiv 2311.03099)."""
    thin = _dropped(stack)
    return stack.by_stretch(lambda deltas: elected_mean(thin(deltas), stack.shares))


def della(stack: Stack) -> Float64:
    """Drop small entries more often than large ones, elect signs and average (2406.11617)."""
    thin = _dropped_by_rank(stack)
    return stack.by_stretch(lambda deltas: elected_mean(thin(deltas), stack.shares))


def breadcrumbs(stack: Stack) -> Float64:
    """Drop the largest outliers and the small rest of each delta, and sum (arXiv 2312.06795)."""
    thin = _band(stack)
    return stack.by_stretch(lambda deltas: weighted_sum(thin(deltas), stack.shares))


def sce(stack: Stack) -> Float64:
    """Select entries by their variance over sources, weigh sources by energy, erase minorities.

    Select: the share `density` of entries whose variance over the sources is largest. Calculate:
    a source counts in the measure of its mean square over those entries. Erase: at each entry the
    sources whose sign is not that of the sum; the others' weighted mean is the result.
    Source: FuseChat (arXiv 2408.07990), which selects 0.1.
    """
    spread = stack.by_stretch(lambda deltas: np.asarray(deltas.var(axis=0)))
    least, _ = _edges(spread, stack.parameters["density"], 0.0)
    selected = spread.reshape(-1) >= least
    energy = np.asarray(
        [np.square(d.reshape(-1)[selected], dtype=np.float64).sum() for d in stack.deltas]
    )
    if not energy.sum() > 0:
        return np.zeros(stack.deltas[0].shape)

    def erased(deltas_Sn: Float64, keep_1n: Float64) -> Float64:
        agrees = np.sign(deltas_Sn) == np.sign(deltas_Sn.sum(axis=0))
        counted = np.where(agrees, energy[:, None], 0.0).sum(axis=0)
        total = (np.where(agrees, energy[:, None], 0.0) * deltas_Sn).sum(axis=0)
        mean = np.divide(total, counted, out=np.zeros_like(total), where=counted > 0)
        return np.asarray(mean * keep_1n[0])

    return _by_stretch(erased, stack.deltas, [selected.reshape(stack.deltas[0].shape)])


def fisher(stack: Stack) -> Float64:
    """Average entries by how sharply each source's loss depends on them.

    sum F_i d_i / sum F_i with the shares as further factors; the plain weighted mean where no
    source has any Fisher information. Source: arXiv 2111.09832.
    """

    def rule(deltas_Sn: Float64, fisher_Sn: Float64) -> Float64:
        factors = stack.shares[:, None] * fisher_Sn
        counted = factors.sum(axis=0)
        total = (factors * deltas_Sn).sum(axis=0)
        plain = weighted_sum(deltas_Sn, stack.shares) / stack.shares.sum()
        return np.asarray(np.divide(total, counted, out=plain, where=counted > 0))

    return _by_stretch(rule, stack.deltas, stack.fisher)
