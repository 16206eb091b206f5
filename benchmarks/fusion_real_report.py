"""What benchmarks/fusion_real.py found, as a table with intervals."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from typing import Any, Final

from benchmarks.fusion_real_data import KINDS
from benchmarks.fusion_real_jobs import Scores
from fusion.intervals import share_interval

Results = dict[int, dict[str, Scores]]
"""Scores by seed and model."""
ORDER: Final = (
    "base",
    *(f"expert:{kind}" for kind in KINDS),
    "sft",
    "pivot",
    *(f"{name}_other_tokenizer" for name in ("base", "sft", "pivot")),
)


def summarise(results: Results) -> dict[str, dict[str, dict[str, float]]]:
    """Return the means over the seeds of accuracy and bits per byte, in the order of the table.

    seconds: the sum over the seeds.
    """
    models = [name for name in ORDER if all(name in found for found in results.values())]

    def over_seeds(what: str, model: str) -> dict[str, float]:
        of_seeds = [found[model][what] for found in results.values()]
        reduce = math.fsum if what == "seconds" else statistics.fmean
        return {key: reduce(scores[key] for scores in of_seeds) for key in of_seeds[0]}

    return {
        what: {model: over_seeds(what, model) for model in models}
        for what in ("accuracy", "bpb", "seconds")
    }


def table(summary: Mapping[str, Any], count: int) -> str:
    """Lay out the summary as a Markdown table. Args: count: questions of a kind, all seeds."""
    both = len(KINDS) * count
    head = ["model", *(f"{kind} (n = {count})" for kind in KINDS), f"both (n = {both})"]
    head += ["of the experts'", "wikipedia, bits per byte", "change", "CPU s"]
    rows = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    for model, accuracy in summary["accuracy"].items():
        cells = [model, *(_share(accuracy[kind], count) for kind in KINDS)]
        cells += [_share(statistics.fmean(accuracy.values()), both), *_compared(summary, model)]
        cells += [f"{summary['seconds'][model]['cpu']:.0f}"]
        rows.append("| " + " | ".join(cells) + " |")
    return "\n".join(rows)


def _share(share: float, count: int) -> str:
    low, high = share_interval(share, count)
    return f"{share:.2f} ({low:.2f}-{high:.2f})"


def _compared(summary: Mapping[str, Any], model: str) -> list[str]:
    """Accuracy as shares of each expert's own, and general text against the unfused pivot."""
    experts = [f"expert:{kind}" for kind in KINDS]
    found, share = summary["accuracy"], ""
    # An expert that knows nothing is no measure.
    if model not in experts and all(e in found and found[e][e[7:]] for e in experts):
        share = ", ".join(f"{found[model][k] / found[f'expert:{k}'][k]:.2f}" for k in KINDS)
    bpb = summary["bpb"][model]["wikipedia"]
    base = "base_other_tokenizer" if model.endswith("_other_tokenizer") else "base"
    if model == base or base not in summary["bpb"]:
        return [share, f"{bpb:.4f}", ""]
    return [share, f"{bpb:.4f}", f"{100 * (bpb / summary['bpb'][base]['wikipedia'] - 1):+.2f} %"]
