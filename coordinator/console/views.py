"""What a page shows, out of what is stored: pure functions from rows to lines of tables."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from coordinator.console.queries import Span
from coordinator.tables import ContributionRow, EventRow, PivotRow
from fusion.intervals import interval_or_none

STEPS: Final = ("SUBMITTED", "APPROVED", "COLLECTING", "FUSING", "EVALUATING", "PUBLISHED")
HEAT_STEPS: Final = 7
MAX_POINTS: Final = 300
"""Of one curve; the rest is left out evenly."""
EXPERT: Final = "expert:"
BASE: Final = "base"
MEAN: Final = "mean"


@dataclass(frozen=True, slots=True)
class Curve:
    """The loss of one training run so far."""

    run: str
    points: Sequence[tuple[int, float]]
    steps: int
    """That the run will take."""

    @property
    def losses(self) -> list[float]:
        """Without the steps."""
        return [loss for _, loss in self.points]


def curves(events: Iterable[EventRow]) -> list[Curve]:
    """The runs of a fusion as its progress events tell them; a worker that follows starts anew."""
    points: dict[str, dict[int, float]] = {}
    steps: dict[str, int] = {}
    for event in events:
        if event.kind == "progress":
            body = json.loads(event.body_json)
            if body.get("phase") == "train":
                points.setdefault(body["run"], {})[body["step"]] = body["loss"]
                steps[body["run"]] = body["steps"]
    return [Curve(run, _thin(sorted(found.items())), steps[run]) for run, found in points.items()]


def _thin(points: Sequence[tuple[int, float]]) -> Sequence[tuple[int, float]]:
    stride = -(-len(points) // MAX_POINTS) or 1
    thin = list(points[::stride])
    return thin if not points or thin[-1] == points[-1] else [*thin, points[-1]]


def story(events: Iterable[EventRow]) -> list[dict[str, Any]]:
    """What happened, in words, newest first; progress is the curves' to show."""
    told = []
    for event in events:
        if event.kind == "progress":
            continue
        body = json.loads(event.body_json)
        who = body.get("participant", "")
        what = body.get("state") or body.get("status") or ""
        told.append(
            {
                "at": event.time_unix_ms,
                "who": who,
                "what": what,
                "detail": body.get("detail", ""),
                "size_bytes": body.get("size_bytes", 0),
            }
        )
    return told[::-1]


def part_spans(
    parts: Sequence[ContributionRow], events: Iterable[EventRow], now_ms: int
) -> dict[str, list[Span]]:
    """From when until when each participant was asked, by name: one span a participant."""
    asked, ended, over = 0, dict[str, tuple[str, int]](), 0
    for event in events:
        body = json.loads(event.body_json) if event.kind in ("state", "contribution") else {}
        state = body.get("state", "")
        if state == "COLLECTING":
            asked = event.time_unix_ms
        elif state and asked and not over:
            over = event.time_unix_ms
        elif event.kind == "contribution":
            ended[body["participant"]] = (body["status"], event.time_unix_ms)
    found = {}
    for part in parts:
        status, at = ended.get(part.participant, ("assigned", over or now_ms))
        if asked:
            found[part.participant] = [(status, asked, max(asked, at))]
    return found


def running_total(released: Iterable[tuple[int, str, int]]) -> list[tuple[int, str, int, int]]:
    """Receipts (when, round, bytes), oldest first, each with the bytes up to it."""
    told, total = [], 0
    for at, round_id, size in released:
        total += size
        told.append((at, round_id, size, total))
    return told


def steps_of(spans: Sequence[Span], state: str) -> list[dict[str, Any]]:
    """The state bar: where the round has been, where it is, and what is to come."""
    been = {name: (start, end) for name, start, end in spans}
    path = [step for step in STEPS if step in been or state in STEPS]
    names = path if state in STEPS else [*path, state]
    return [
        {
            "state": name,
            "when": "now" if name == state else "done" if name in been else "",
            "start": been.get(name, (0, 0))[0],
            "lasted": been[name][1] - been[name][0] if name in been else 0,
        }
        for name in names
    ]


@dataclass(frozen=True, slots=True)
class Heat:
    """A table of models and domains, each cell with its place between best (0) and worst (6)."""

    measure: str
    domains: Sequence[str]
    rows: Sequence[Mapping[str, Any]]
    pivot: str


def heat(evals: Mapping[str, Any], measure: str) -> Heat | None:
    """The evaluations of a pivot under one measure; None when there are none.

    The pivot stands on top, then base and controls, then the experts. Each domain has its own
    scale, so that an easy one does not pale a hard one.
    """
    scores: Mapping[str, Mapping[str, float]] = evals.get(measure) or {}
    pivot = str(evals.get("pivot", ""))
    if not scores:
        return None
    domains = list(dict.fromkeys(d for row in scores.values() for d in row))
    sign = 1 if measure == "bpb" else -1
    full = {
        name: {**row, MEAN: sum(row.values()) / len(row)}
        for name, row in scores.items()
        if set(row) == set(domains)
    }
    groups = [
        [name for name in full if name == pivot],
        [name for name in full if name != pivot and not name.startswith(EXPERT)],
        [name for name in full if name.startswith(EXPERT)],
    ]
    columns = [*domains, MEAN]
    held_out = evals.get("pairs", {}).get("held_out", {})
    asked: Mapping[str, int] = {"bpb": {}, "preference": held_out}.get(
        measure, evals.get("questions", {})
    )
    limits = {c: sorted(sign * row[c] for row in full.values()) for c in columns}
    base = full.get(BASE)
    rows = [
        {
            "name": name,
            "pivot": name == pivot,
            "begins": at == 0 and name != pivot,
            "cells": [
                {
                    "value": full[name][c],
                    "step": _step(sign * full[name][c], limits[c][0], limits[c][-1]),
                    "delta": full[name][c] - base[c] if base and name != BASE else None,
                    "better": bool(base and sign * (full[name][c] - base[c]) < 0),
                    "best": sign * full[name][c] == limits[c][0],
                    "interval": interval_or_none(full[name][c], asked.get(c, 0)),
                }
                for c in columns
            ],
        }
        for group in groups
        for at, name in enumerate(group)
    ]
    return Heat(measure, columns, rows, pivot)


def _step(value: float, low: float, high: float) -> int:
    if high <= low:
        return HEAT_STEPS // 2
    return min(HEAT_STEPS - 1, int((value - low) / (high - low) * HEAT_STEPS))


def verdict(evals: Mapping[str, Any]) -> list[tuple[bool, str]]:
    """What the pivot is, against the base and against the best expert, on the mean."""
    table = heat(evals, "bpb")
    if table is None or not table.rows or not table.rows[0]["pivot"]:
        return []
    means = {row["name"]: row["cells"][-1]["value"] for row in table.rows}
    own = means[table.pivot]
    rivals = {"the pivot before": means.get(BASE)}
    experts = [value for name, value in means.items() if name.startswith(EXPERT)]
    rivals["the best expert"] = min(experts, default=None)
    rivals["the control without experts (sft)"] = means.get("sft")
    return [
        (own < other, f"better than {name}: {own:.3f} against {other:.3f}")
        for name, other in rivals.items()
        if other is not None
    ]


def gates(evals: Mapping[str, Any]) -> list[tuple[bool, str]]:
    """What a round's pivot has to stand: its verdict, each domain for itself, and its sources."""
    found = verdict(evals)
    table = heat(evals, "bpb")
    if found and table is not None:
        own = dict(zip(table.domains, table.rows[0]["cells"], strict=True))
        deltas = {d: cell["delta"] for d, cell in own.items() if d != MEAN and cell["delta"]}
        worse = [f"{domain} is, by {delta:.3f}" for domain, delta in deltas.items() if delta > 0]
        told = f": {', '.join(worse)}" if worse else ""
        found.append((not worse, f"no domain is worse than in the pivot before{told}"))
    signs: Mapping[str, Any] = (evals.get("credit") or {}).get("suspicion") or {}
    out = [n for n, told in signs.items() if isinstance(told, Mapping) and told.get("excluded")]
    if out:
        says = f"every source agrees with the public text: left out {', '.join(out)}, which did not"
        found.append((False, says))
    return found


def lineage(
    pivots: Sequence[PivotRow], inputs: Mapping[str, Sequence[str]]
) -> list[dict[str, Any]]:
    """One line a pivot, oldest first: where it comes from and who went in.

    Args: inputs: the participants of each round whose contribution was fused.
    """
    return [
        {
            "row": pivot,
            "size_bytes": sum(file.size_bytes for file in pivot.files),
            "how": pivot.round_id or ("rolled back" if pivot.parent else "imported"),
            "from": ", ".join(inputs.get(pivot.round_id, ())),
            "bpb": own_mean(pivot),
            "newest": pivot is pivots[-1],
        }
        for pivot in pivots
    ]


def own_mean(pivot: PivotRow) -> float | None:
    """Mean bits per byte of a pivot in its round's evaluation."""
    evals = json.loads(pivot.evals_json)
    own = (evals.get("bpb") or {}).get(evals.get("pivot", ""), {})
    return sum(own.values()) / len(own) if own else None
