"""What benchmarks/fusion.py found, as numbers, a table and a picture. Pure but for the picture."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from benchmarks.fusion_hospitals import GENERAL, SIX, THREE
from fusion.evaluate import recovery

Results = dict[int, dict[str, dict[str, float]]]
"""Bits per byte by seed, job and domain."""

METHODS: Final[Mapping[str, str]] = {
    "sft": "sft",
    "sft_short": "sft_short",
    "infifusion": "infifusion",
    "minced": "minced",
    "gold": "gold",
    "minced_doc": "minced_doc",
    "uniform": "uniform",
    "posterior": "unified",
    "unified": "unified",
    "unified_2rounds": "rounds:2",
    "unified_3rounds": "rounds:3",
    "fedavg_8": "fedavg",
    "diloco_8": "diloco",
    "pooled": "pooled",
    "pooled_public": "pooled_public",
}
"""Names in the table and the jobs they are. posterior and unified are one: the routing names it.
pooled_public: pooled that reads the prompts too, for as many steps."""
FIRST_SEED: Final[Mapping[str, str]] = {
    "sft_3x": "sft_3x",
    "unified_3x": "unified_3x",
    "uld": "uld",
    "pairwise": "merge:pairwise",
    "pairwise_equal": "merge:pairwise_equal",
    "weights": "merge:weights",
    "diloco_8_alone": "diloco:alone",
}
"""Methods that cost much or settle little, on the first seed only. pairwise_equal: pairwise at
unified's compute, a third of the steps a source. sft_3x, unified_3x: three rounds' steps in one.
diloco_8_alone: hospitals read their own text only."""
ABLATIONS: Final = (
    *("unified", "no_alm", "no_other", "uniform", "minced_doc", "gated", "p_kl", "infigfusion"),
    *("samples", "fp8"),
)
CURVES: Final[Mapping[str, Mapping[str, str]]] = {
    "k": {"1": "k1", "4": "k4", "16": "unified", "64": "k64"},
    "budget": {"0.05": "budget05", "0.2": "budget20", "0.5": "budget50", "1": "unified"},
    "experts": {"2": "experts:2", "3": "unified", "6": "experts:6"},
    "rounds": {"1": "unified", "2": "rounds:2", "3": "rounds:3"},
}
BOUND: Final[Mapping[str, str]] = {"experts:2": "pooled:2", "experts:6": "pooled:6"}
"""The pooled model of the hospitals that a job is about; else `pooled`."""
Spread = dict[str, Any]


def summarise(results: Results, shipped: Mapping[str, float]) -> dict[str, Any]:
    """Return everything that is printed: means over seeds, spreads, curves.

    Args: shipped: bytes per source of the jobs that vary them.
    """
    offered = {**METHODS, **FIRST_SEED}
    methods = {name: job for name, job in offered.items() if _having(results, job)}
    first = results[min(results)]
    return {
        "recovery": {m: _spread(results, job, _recovery) for m, job in methods.items()},
        "transfer": {
            m: _spread(results, job, _transfer)["mean"]
            for m, job in methods.items()
            if m != "pooled"
        },
        "general_pct": {
            m: statistics.fmean(
                100 * (r[job][GENERAL] / r["base"][GENERAL] - 1) for r in _having(results, job)
            )
            for m, job in methods.items()
        },
        "bpb": {
            model: {
                d: statistics.fmean(r[job][d] for r in _having(results, job))
                for d in (*THREE, GENERAL)
            }
            for model, job in _models(methods).items()
        },
        "ablations": {job: _mean(first, job, _recovery) for job in ABLATIONS if job in first},
        "curves": _curves(first, shipped),
        "domain_margin": _margins(results, methods, statistics.fmean),
        "worst_seed_margin": _margins(results, methods, min),
    }


def _models(methods: Mapping[str, str]) -> dict[str, str]:
    named = ("base", *(f"expert:{name}" for name in THREE))
    return {name: name for name in named} | {m: j for m, j in methods.items() if m != "posterior"}


def _having(results: Results, job: str) -> list[dict[str, dict[str, float]]]:
    """The seeds in which the job was done."""
    return [found for found in results.values() if job in found]


def _recovery(found: Mapping[str, Mapping[str, float]], job: str, domain: str) -> float:
    pooled = found[BOUND.get(job, "pooled")][domain]
    return recovery(found["base"][domain], found[job][domain], pooled)


def _transfer(found: Mapping[str, Mapping[str, float]], job: str, domain: str) -> float:
    best = min(found[f"expert:{name}"][domain] for name in THREE)
    return recovery(found["base"][domain], found[job][domain], best)


def _mean(found: Mapping[str, Mapping[str, float]], job: str, measure: Any) -> float:
    hospitals = SIX[: int(job.partition(":")[2])] if job.startswith("experts:") else THREE
    return statistics.fmean(measure(found, job, domain) for domain in hospitals)


def _spread(results: Results, job: str, measure: Any) -> Spread:
    having = _having(results, job)
    by_seed = [_mean(found, job, measure) for found in having]
    return {
        "mean": statistics.fmean(by_seed),
        "seeds": len(having),
        "sd": statistics.stdev(by_seed) if len(by_seed) > 1 else 0.0,
        "domains": {d: statistics.fmean(measure(found, job, d) for found in having) for d in THREE},
    }


def _curves(
    found: Mapping[str, Mapping[str, float]], shipped: Mapping[str, float]
) -> dict[str, dict[str, float]]:
    curves = {
        name: {x: _mean(found, job, _recovery) for x, job in points.items() if job in found}
        for name, points in CURVES.items()
    }
    sizes = {job: size for job, size in shipped.items() if job in found}
    by_bytes = sorted(sizes.items(), key=lambda item: item[1])
    curves["bytes"] = {f"{size:.0f}": _mean(found, job, _recovery) for job, size in by_bytes}
    return curves


RIVALS: Final = ("infifusion", "minced", "gold", "uniform", "sft", "sft_short")


def _margins(results: Results, methods: Mapping[str, str], fold: Any) -> dict[str, float]:
    """By how many bits per byte unified is better than each rival, on its worst domain.

    Args: fold: of a domain's margins over the seeds: their mean, or the smallest.
    """
    if "unified" not in methods:
        return {}
    return {
        rival: min(
            fold(
                found[methods[rival]][d] - found["unified"][d]
                for found in _having(results, methods[rival])
            )
            for d in THREE
        )
        for rival in RIVALS
        if rival in methods
    }


def table(summary: Mapping[str, Any]) -> str:
    """Lay out the summary as Markdown."""
    head = ["model", *THREE, "mean", "recovery", "sd", "seeds", "transfer", "general text"]
    rows = ["| " + " | ".join(head) + " |", "|---|" + "---:|" * (len(head) - 1)]
    for model, by_domain in summary["bpb"].items():
        found = summary["recovery"].get(model)
        cells = [model, *(f"{by_domain[d]:.3f}" for d in THREE)]
        cells.append(f"{statistics.fmean(by_domain[d] for d in THREE):.3f}")
        told = [f"{found['mean']:.2f}", f"{found['sd']:.2f}", str(found["seeds"])] if found else []
        cells += told or ["", "", ""]
        transfer = summary["transfer"].get(model)
        cells.append("" if transfer is None else f"{transfer:.2f}")
        general = summary["general_pct"].get(model)
        cells.append("" if general is None else f"{general:+.1f} %")
        rows.append("| " + " | ".join(cells) + " |")
    lines = ["\n".join(rows)]
    for title, points in {"ablation": summary["ablations"], **summary["curves"]}.items():
        if points:
            shown = ", ".join(f"{x}: {y:.2f}" for x, y in points.items())
            lines.append(f"{title} (first seed): {shown}")
    worst = {"mean over seeds": "domain_margin", "worst seed": "worst_seed_margin"}
    for title, key in worst.items():
        shown = ", ".join(f"{x}: {y:+.3f}" for x, y in summary[key].items())
        lines.append(f"unified is better by bits per byte, worst domain, {title}: {shown}")
    return "\n\n".join(lines)


def plot(summary: Mapping[str, Any], path: Path) -> None:
    """Draw recovery by method with its spread, and the curves."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplot_mosaic(
        [["methods"] * 3, ["bytes", "rounds", "ablations"]], figsize=(10, 7), layout="constrained"
    )
    methods = [m for m in summary["recovery"] if m not in ("pooled", "posterior")]
    found = [summary["recovery"][m] for m in methods]
    ours = ("unified", "unified_2rounds", "unified_3rounds", "fedavg_8", "diloco_8")
    colours = ["#2a6f97" if m in ours else "#a9b4c2" for m in methods]
    top = axes["methods"]
    top.bar(methods, [f["mean"] for f in found], yerr=[f["sd"] for f in found], color=colours)
    top.tick_params("x", rotation=35)
    top.set_ylabel("recovery (1 = pooled text)")
    by_mb = {float(x) / 1e6: y for x, y in summary["curves"]["bytes"].items()}
    _curve(axes["bytes"], by_mb, "MB shipped by a source")
    by_round = {float(x): y for x, y in summary["curves"]["rounds"].items()}
    _curve(axes["rounds"], by_round, "rounds")
    axes["rounds"].set_xticks(list(by_round))
    side = axes["ablations"]
    side.barh(list(summary["ablations"]), list(summary["ablations"].values()), color="#a9b4c2")
    side.set_xlabel("recovery")
    for axis in axes.values():
        axis.spines[["top", "right"]].set_visible(False)
    for axis in (top, axes["bytes"], axes["rounds"]):
        axis.axhline(0, color="black", linewidth=0.8)
        axis.axhline(1, color="black", linewidth=0.8, linestyle="--")
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def _curve(axis: Any, points: Mapping[float, float], label: str) -> None:
    axis.plot(list(points), list(points.values()), marker="o", color="#2a6f97")
    axis.set_xlabel(label)
    axis.set_ylabel("recovery")
