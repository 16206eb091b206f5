"""What a merge of directories did, or would do: by tensor, by source, and the weights it used.

Shapes: S = sources, n = entries of a stretch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fusion.merge_methods import STRETCH, Array
from fusion.merge_settings import MergeSettings


@dataclass(frozen=True, slots=True)
class Agreement:
    """Of one source's delta with the merged delta, over one tensor or several."""

    square: float = 0.0
    """Of the delta's L2 norm."""
    merged_square: float = 0.0
    product: float = 0.0
    """Inner product with the merged delta."""
    signed: int = 0
    """Entries that the source changed."""
    agreeing: int = 0
    """Of them, those that the merge changed in the same direction."""

    def __add__(self, other: Agreement) -> Agreement:
        return Agreement(*(a + b for a, b in zip(_values(self), _values(other), strict=True)))

    @property
    def norm(self) -> float:
        """L2 norm of the source's delta."""
        return math.sqrt(self.square)

    @property
    def cosine(self) -> float:
        """Cosine between the source's delta and the merged one; 0 where one of them is zero."""
        lengths = math.sqrt(self.square * self.merged_square)
        return self.product / lengths if lengths > 0 else 0.0

    @property
    def sign_share(self) -> float:
        """Share of the entries changed by the source that the merge changes the same way."""
        return self.agreeing / self.signed if self.signed else 0.0

    def told(self) -> dict[str, float]:
        """Return what people read."""
        return {"norm": self.norm, "cosine": self.cosine, "sign_share": self.sign_share}


def _values(agreement: Agreement) -> tuple[Any, ...]:
    return tuple(asdict(agreement).values())


def agreements(deltas: Mapping[str, Array], merged: Array) -> dict[str, Agreement]:
    """Compare each source's delta with the merged one, a stretch at a time."""
    found = {name: Agreement() for name in deltas}
    flat = merged.reshape(-1)
    for start in range(0, flat.size, STRETCH):
        merged_n = flat[start : start + STRETCH].astype(np.float64)
        for name, delta in deltas.items():
            delta_n = delta.reshape(-1)[start : start + STRETCH].astype(np.float64)
            signs_n = np.sign(delta_n)
            found[name] += Agreement(
                square=float(delta_n @ delta_n),
                merged_square=float(merged_n @ merged_n),
                product=float(delta_n @ merged_n),
                signed=int(np.count_nonzero(signs_n)),
                agreeing=int(np.count_nonzero((signs_n == np.sign(merged_n)) & (signs_n != 0))),
            )
    return found


@dataclass(frozen=True, slots=True)
class TensorReport:
    """One tensor of the result."""

    name: str
    dtype: str
    """As written."""
    shape: tuple[int, ...]
    merged: bool
    """False: copied from the base, as integers are."""
    sources: Mapping[str, Agreement] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class MergeReport:
    """Everything that a merge did."""

    path: Path | None
    """The directory written; None for a dry run."""
    settings: MergeSettings
    weights: Mapping[str, float]
    """What each source's delta was multiplied by (MergeSettings.effective_weights)."""
    tensors: Sequence[TensorReport]
    notes: Sequence[str]
    """What a person should know: what was left out, or is not as it seems."""

    def sources(self) -> dict[str, Agreement]:
        """Return each source's agreement over all tensors."""
        return {
            name: sum((t.sources[name] for t in self.tensors if t.merged), Agreement())
            for name in self.weights
        }

    def described(self) -> dict[str, Any]:
        """Return all of it in JSON's types."""
        given = self.settings
        return {
            "method": given.method,
            "weight": given.factor(),
            "parameters": given.parameters(),
            "normalize": given.normalize,
            "around": given.around,
            "sources": {
                name: {"effective_weight": self.weights[name], **found.told()}
                for name, found in self.sources().items()
            },
            "notes": list(self.notes),
            "tensors": [
                {
                    "name": tensor.name,
                    "dtype": tensor.dtype,
                    "shape": list(tensor.shape),
                    "merged": tensor.merged,
                    "sources": {name: found.told() for name, found in tensor.sources.items()},
                }
                for tensor in self.tensors
            ],
        }
