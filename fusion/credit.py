"""Who contributed what: how much of the routing's weight each source had, document by document.

Shapes: D = documents, S = candidates (base pivot first).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from fusion.routing import Weights
from fusion.suspicion import Signs

BASE: Final = "base"
ALL: Final = "all"


@dataclass(frozen=True, slots=True)
class Routing:
    """What the routing gave each candidate over a prompt set."""

    names: tuple[str, ...]
    """The base pivot, then the sources by name."""
    tokens: NDArray[np.int64]
    """[D] pivot tokens of each document."""
    weights: NDArray[np.float64]
    """[D, S] mean weight over the document's tokens."""
    signs: Mapping[str, Signs] = field(default_factory=dict)
    """What tells against each source, those that were left out too."""
    excluded: tuple[str, ...] = ()
    """Sources that were left out, the first one first."""

    def shares(self, domains: Sequence[str] | None = None) -> dict[str, dict[str, float]]:
        """Return by domain, and for all together, each candidate's share of the posterior mass.

        Args: domains: of each document; None where the prompt set does not say.
        Raises: ValueError when there are not as many domains as documents.
        """
        if domains is not None and len(domains) != len(self.tokens):
            raise ValueError(f"{len(domains)} domains for {len(self.tokens)} documents")
        labels = np.asarray(domains if domains is not None else [ALL] * len(self.tokens))
        groups = {d: labels == d for d in sorted(set(labels.tolist()) - {ALL})}
        groups[ALL] = np.ones(len(labels), bool)
        return {name: self._share(inside) for name, inside in groups.items()}

    def judged(self) -> dict[str, dict[str, float]]:
        """Return by source what tells against it, and whether it was left out (1) or not (0)."""
        return {
            name: {**asdict(one), "excluded": float(name in self.excluded)}
            for name, one in sorted(self.signs.items())
        }

    def _share(self, inside_D: NDArray[np.bool_]) -> dict[str, float]:
        tokens_D = self.tokens[inside_D]
        mass_S = (self.weights[inside_D] * tokens_D[:, None]).sum(axis=0) / tokens_D.sum()
        return dict(zip(self.names, (float(m) for m in mass_S), strict=True))

    def save(self, path: Path) -> None:
        """Write as .npz."""
        told = {name: asdict(one) for name, one in self.signs.items()}
        np.savez(
            path,
            names=self.names,
            tokens=self.tokens,
            weights=self.weights,
            judged=json.dumps({"signs": told, "excluded": self.excluded}),
        )

    @classmethod
    def load(cls, path: Path) -> Routing:
        """Read what save wrote."""
        with np.load(path) as file:
            judged = json.loads(str(file["judged"])) if "judged" in file else {}
            return cls(
                tuple(file["names"].tolist()),
                file["tokens"],
                file["weights"],
                {name: Signs(**one) for name, one in judged.get("signs", {}).items()},
                tuple(judged.get("excluded", ())),
            )


def summed(weights_PS: Weights, doc_offsets: NDArray[Any]) -> NDArray[np.float64]:
    """Return [D, S] the mean weight over each document's rows."""
    counts_D = np.diff(doc_offsets)
    sums_DS = np.add.reduceat(weights_PS.astype(np.float64), doc_offsets[:-1], axis=0)
    return np.asarray(sums_DS / counts_D[:, None])


def leave_one_out(
    whole: Mapping[str, float],
    without: Mapping[str, Mapping[str, float]],
    base: Mapping[str, float],
) -> dict[str, dict[str, float]]:
    """Return by source and domain what the pivot loses, in bits per byte, when it is left out.

    Args: whole, base: bits per byte by domain of the fused pivot and of the pivot it came from;
        without: by source, of the pivot fused without it.
    Returns: the loss as a share of the whole gain (base - whole), where there is a gain; else the
        plain loss in bits per byte is meaningless as a share, and 0 is given.
    """
    return {
        source: {
            domain: (scores[domain] - whole[domain]) / (base[domain] - whole[domain])
            if base[domain] > whole[domain]
            else 0.0
            for domain in whole
        }
        for source, scores in sorted(without.items())
    }
