"""The demo's result as people read it: a table on the terminal and an HTML page."""

from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path

from rich.console import Console
from rich.table import Table

from cofuse.demo.corpora import ATTRIBUTION
from cofuse.demo.result import DemoPlan, DemoResult
from cofuse.report import Participant, ReportData, render_report


def show_result(result: DemoResult, report: Path, *, to_stderr: bool) -> None:
    """Print tables, claims and where things lie."""
    console = Console(stderr=to_stderr, highlight=False)
    if not console.is_terminal:
        console = Console(stderr=to_stderr, highlight=False, width=110)
    console.print(_table("bits per byte, held-out text (lower is better)", result.bpb))
    if result.accuracy:
        title = "accuracy on the hospitals' own facts (chance 0.25)"
        console.print(_table(title, result.accuracy))
    for text, held in result.claims:
        console.print(f"{'holds' if held else 'FAILS'}  {text}", markup=False)
    if shares := result.credit.get("share", {}).get("all"):
        told = ", ".join(f"{name} {share:.0%}" for name, share in shares.items())
        console.print(f"who taught the unified pivot: {told}", markup=False)
    _show_chat(result, console)
    left = ", ".join(f"{name} {size / 1e6:.2f} MB" for name, size in result.bytes_left.items())
    console.print(f"left each hospital: {left}; no text", markup=False)
    for name, folder in result.pivots.items():
        console.print(f"pivot {name}: {folder}", markup=False, soft_wrap=True)
    console.print(f"report: {report}", markup=False, soft_wrap=True)
    console.print(
        f"{result.seconds:.0f} s, at most {result.peak_rss_mb / 1000:.1f} GB over all processes",
        markup=False,
    )
    if not result.ok:
        console.print("NOT AS CLAIMED: see the lines marked FAILS", markup=False)


def _show_chat(result: DemoResult, console: Console) -> None:
    """Print what the pivot said to a question of each hospital, and what is right."""
    for one in result.chat:
        console.print(f"{one.domain}: {one.question}", markup=False)
        console.print(f"    the pivot says: {one.answer}", markup=False)
        console.print(f"    the right answer: {one.right}", markup=False)


def write_report(plan: DemoPlan, result: DemoResult) -> Path:
    """Write report.html beside the pivots; return its path."""
    path = plan.out / "report.html"
    data = ReportData(
        title="cofuse demo",
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        seconds=result.seconds,
        ok=result.ok,
        claims=result.claims,
        bpb=result.bpb,
        accuracy=result.accuracy,
        curves={
            name.replace("pairwise-", "pairwise:"): losses for name, losses in result.curves.items()
        },
        bytes_left=result.bytes_left,
        peak_rss_mb=result.peak_rss_mb,
        pivots=result.pivots,
        participants=[Participant(**row) for row in result.participants],
        attribution="\n".join(f"{name}: {text}" for name, text in ATTRIBUTION.items()),
        credit=result.credit,
        chat=[(one.domain, one.question, one.answer, one.right) for one in result.chat],
        parents=dict.fromkeys(result.pivots, "pivot-0"),
    )
    path.write_text(render_report(data), encoding="utf-8")
    return path


def _table(title: str, scores: Mapping[str, Mapping[str, float]]) -> Table:
    domains = list(next(iter(scores.values())))
    table = Table(title=title, title_justify="left")
    table.add_column("model")
    for domain in [*domains, "mean"]:
        table.add_column(domain, justify="right")
    for model, by_domain in scores.items():
        values = [by_domain[domain] for domain in domains]
        cells = [f"{value:.3f}" for value in [*values, sum(values) / len(values)]]
        style = "bold" if model in ("unified", "pairwise", "weights") else None
        table.add_row(model, *cells, style=style)
    return table
