"""How to merge: the table of methods, and settings that are checked against it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Final, Literal

from fusion import merge_angles, merge_matrices, merge_methods
from fusion.merge_methods import Float64, Stack

Around = Literal["base", "origin"]


class MergeError(ValueError):
    """Models cannot be merged as asked; the message says why and what to do."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """A row of MERGES."""

    merge: Callable[[Stack], Float64]
    weight: float = 1.0
    """Default factor on the merged delta."""
    shares: Literal["mean", "sum", "ratio", "none"] = "ratio"
    """What source weights are: factors that default to 1/S (mean) or 1 (sum); factors of which
    only the ratio counts (ratio); or nothing that the method reads (none)."""
    defaults: Mapping[str, float] = field(default_factory=dict)
    """Parameters it reads, with their defaults."""
    sources: int | None = None
    """How many it takes; None: any number."""
    around: bool = False
    """Whether it makes a difference what the deltas are measured from."""


_SEED: Final = {"seed": 0.0}
MERGES: Final[Mapping[str, Method]] = MappingProxyType(
    {
        "linear": Method(merge=merge_methods.linear, shares="mean"),
        "task_arithmetic": Method(merge=merge_methods.linear, shares="sum", weight=0.5),
        "ties": Method(merge=merge_methods.ties, defaults={"density": 0.5}),
        "dare_linear": Method(
            merge=merge_methods.dare_linear, shares="mean", defaults={"density": 0.5, **_SEED}
        ),
        "dare_ties": Method(merge=merge_methods.dare_ties, defaults={"density": 0.5, **_SEED}),
        "della": Method(
            merge=merge_methods.della, defaults={"density": 0.5, "epsilon": 0.1, **_SEED}
        ),
        "breadcrumbs": Method(
            merge=merge_methods.breadcrumbs,
            shares="sum",
            weight=0.5,
            defaults={"density": 0.15, "gamma": 0.01},
        ),
        "sce": Method(merge=merge_methods.sce, shares="none", defaults={"density": 0.1}),
        "model_stock": Method(merge=merge_angles.model_stock, shares="none"),
        "slerp": Method(merge=merge_angles.slerp, sources=2, around=True),
        "karcher": Method(merge=merge_angles.karcher, around=True),
        "fisher": Method(merge=merge_methods.fisher),
        "wudi": Method(
            merge=merge_matrices.wudi,
            shares="none",
            defaults={"iterations": 300.0, "learning_rate": 1e-5},
        ),
        "iso_c": Method(merge=merge_matrices.iso_c, shares="none"),
        "tsv": Method(merge=merge_matrices.tsv, shares="none"),
    }
)
"""Task arithmetic's 0.5 is measured on three sources of benchmarks/fusion.py: it falls below the
base at 1.0, because what the sources share is then added three times. Breadcrumbs, the same."""

_RANGES: Final[Mapping[str, tuple[Callable[[float], bool], str]]] = MappingProxyType(
    {
        "density": (lambda x: 0 < x <= 1, "above 0 and at most 1"),
        "epsilon": (lambda x: 0 <= x < 1, "at least 0 and below 1"),
        "gamma": (lambda x: 0 <= x < 1, "at least 0 and below 1"),
        "seed": (lambda x: x >= 0 and x == int(x), "a whole number, at least 0"),
        "iterations": (lambda x: x >= 0 and x == int(x), "a whole number, at least 0"),
        "learning_rate": (lambda x: 0 < x < math.inf, "above 0"),
    }
)


@dataclass(frozen=True, slots=True, kw_only=True)
class MergeSettings:
    """How to merge. What is None is the method's own; what the method does not read is refused.

    Raises: MergeError that names the parameter, and those that the method reads.
    """

    method: str
    """A key of MERGES."""
    weight: float | None = None
    """Factor on the merged delta."""
    weights: Mapping[str, float] | None = None
    """Factors by source. They are taken as given: 0.1 and 1.0 are not made 0.09 and 0.91."""
    normalize: bool = False
    """Divide `weights` by their sum first."""
    density: float | None = None
    """Share of a delta's entries kept, in (0, 1]."""
    epsilon: float | None = None
    """DELLA: keep probabilities go from density - epsilon to density + epsilon."""
    gamma: float | None = None
    """Breadcrumbs: share of a delta's entries dropped for being largest."""
    seed: int | None = None
    """Of what is dropped at random."""
    iterations: int | None = None
    """WUDI: steps of Adam."""
    learning_rate: float | None = None
    """WUDI: size of a step, in units of the weights."""
    around: Around = "base"
    """Slerp and Karcher: the centre of the sphere. base: changes are turned; origin: models."""

    def __post_init__(self) -> None:
        if self.method not in MERGES:
            known = ", ".join(sorted(MERGES))
            raise MergeError(f"unknown merge {self.method!r}; choose one of {known}")
        self._check_used()
        for name, value in self.parameters().items():
            holds, wanted = _RANGES[name]
            if not holds(value):
                raise MergeError(f"{name} is {value:g}; wanted {wanted}")
        found = self.parameters()
        spare = found.get("epsilon", found.get("gamma", 0.0))
        if found.get("density", 0.0) + spare > 1 or found.get("density", 1.0) <= found.get(
            "epsilon", 0.0
        ):
            raise MergeError(
                f"{self.method} has density {found['density']:g} and {spare:g} beside it; wanted "
                "density + epsilon (or gamma) at most 1, and density above epsilon"
            )
        for factor in (self.weight, *(self.weights or {}).values()):
            if factor is not None and not math.isfinite(factor):
                raise MergeError(f"a weight is {factor}; wanted a finite number")

    def _check_used(self) -> None:
        row = MERGES[self.method]
        given = [name for name in _RANGES if getattr(self, name) is not None]
        given += ["weights"] if self.weights is not None else []
        given += ["normalize"] if self.normalize else []
        given += ["around"] if self.around != "base" else []
        used = ["weight", *row.defaults, *(["weights"] if row.shares != "none" else [])]
        used += ["normalize"] if row.shares in ("mean", "sum") else []
        used += ["around"] if row.around else []
        if unused := [name for name in given if name not in used]:
            raise MergeError(
                f"{self.method} does not read {', '.join(unused)}; it reads {', '.join(used)}"
            )

    def parameters(self) -> dict[str, float]:
        """Return what the method reads, given or default."""
        defaults = MERGES[self.method].defaults
        given = {name: getattr(self, name) for name in defaults}
        return {n: float(defaults[n] if given[n] is None else given[n]) for n in defaults}

    def factor(self) -> float:
        """Return the factor on the merged delta."""
        return MERGES[self.method].weight if self.weight is None else self.weight

    def shares(self, sources: Sequence[str]) -> dict[str, float]:
        """Return the factor of each source, before `weight`.

        Raises: MergeError when `weights` names other sources, or cannot be divided by their sum.
        """
        row = MERGES[self.method]
        if row.sources not in (None, len(sources)) or not sources:
            wanted = row.sources or "at least 1"
            raise MergeError(
                f"{self.method} got {len(sources)} deltas; wanted {wanted}"
                f"{': take karcher' if self.method == 'slerp' else ''}"
            )
        if self.weights is None:
            each = 1.0 if row.shares == "sum" and not self.normalize else 1 / len(sources)
            return dict.fromkeys(sources, each)
        if set(self.weights) != set(sources):
            odd = sorted(set(self.weights) ^ set(sources))
            raise MergeError(f"weights and sources differ in {odd}; name each source once")
        total, given = sum(self.weights[name] for name in sorted(sources)), self.weights
        if row.shares == "ratio" and (min(given.values()) < 0 or total <= 0):
            raise MergeError(f"{self.method} takes weights of at least 0 and not all 0")
        if self.normalize and total == 0:
            raise MergeError("weights sum to 0 and cannot be normalized; set normalize to false")
        divided = self.normalize or row.shares == "ratio"
        return {name: given[name] / (total if divided else 1.0) for name in sources}

    def effective_weights(self, sources: Sequence[str]) -> dict[str, float]:
        """Return what each source's delta is multiplied by, before a method's own choices.

        Exact for linear, task_arithmetic, dare_linear and breadcrumbs; elections and Fisher
        information divide it anew at each entry, and methods without weights by the data.
        """
        return {name: self.factor() * share for name, share in self.shares(sources).items()}
