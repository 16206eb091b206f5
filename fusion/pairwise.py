"""Pairwise fusion: one fused copy of the pivot per source, then a merge of the copies around it.

Each copy is `fuse` with one contribution; what is here is how the copies become one pivot.
"""

from __future__ import annotations

from collections.abc import Mapping

from transformers import PreTrainedModel

from fusion.contribution import LogitContribution
from fusion.merge import State, merge, subtract
from fusion.models import load_parameter_arrays, parameter_arrays


def one_source(
    contributions: Mapping[str, LogitContribution],
) -> dict[str, dict[str, LogitContribution]]:
    """Return what each of the runs is given: by source, that source's contribution alone."""
    return {name: {name: contributions[name]} for name in sorted(contributions)}


def merge_copies(
    pivot: PreTrainedModel,
    copies: Mapping[str, State],
    method: str = "task_arithmetic",
    *,
    weight: float | None = None,
    density: float | None = None,
) -> None:
    """Put base + merge(copy - base) into the pivot, which must still be the base.

    Args: copies: by source, the parameters of its fused copy (parameter_arrays). method, weight,
        density: as in fusion.merge.merge.
    Raises: ValueError when a copy is not one of this pivot.
    """
    base = parameter_arrays(pivot)
    deltas = [subtract(copies[name], base) for name in sorted(copies)]
    load_parameter_arrays(pivot, merge(base, deltas, method, weight=weight, density=density))
