"""The report of a run: one HTML page that explains itself, for a reader who was not there.

A pure function from numbers to a page. The page fetches nothing and runs nothing; every plot has
its numbers in a table beneath; all text is escaped.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from jinja2 import Environment, PackageLoader, StrictUndefined

from cofuse import charts
from cofuse.report_charts import (
    PIVOTS,
    Scores,
    Table,
    credit_charts,
    curve_charts,
    egress_charts,
    means_of,
    quality_charts,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Participant:
    """Who took part, and with what model."""

    name: str
    department: str
    architecture: str
    parameters: int
    vocabulary: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportData:
    """Everything the report says. Models: unified, pairwise, weights, base, sft, infifusion and
    expert:<participant>; other names are shown with the controls.
    """

    title: str
    created: str
    """ISO 8601, as it is to be read."""
    seconds: float
    ok: bool
    claims: Sequence[tuple[str, bool]]
    """What should hold, in words, and whether it did."""
    bpb: Scores
    """Held-out bits per byte; lower is better."""
    accuracy: Scores
    """Share of multiple-choice questions answered rightly, 0..1."""
    curves: Mapping[str, Sequence[float]]
    """Training loss per step by run: expert:<participant>, unified, pairwise:<participant>, ..."""
    bytes_left: Mapping[str, int]
    """Bytes that left each participant."""
    peak_rss_mb: float
    pivots: Mapping[str, str]
    """Directory of each published pivot, in the order of the rounds."""
    participants: Sequence[Participant]
    attribution: str
    parents: Mapping[str, str] = field(default_factory=dict)
    """The pivot that a pivot was fused from; base where none is named."""
    chance: float = 0.25
    """Accuracy of a guess."""
    credit: Mapping[str, Scores] = field(default_factory=dict)
    """Of the unified round. share: by domain of the prompts and candidate, its share of the
    routing. leave_one_out: by source and domain, the share of the gain that is lost without it."""
    chat: Sequence[tuple[str, str, str, str]] = ()
    """What a pivot was asked: domain, question, its answer, the right one."""


def render_report(result: ReportData) -> str:
    """The page as one string of HTML, self-contained: no script, no font, no address to fetch."""
    environment = Environment(
        loader=PackageLoader("cofuse"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html").render(
        result=result,
        tiles=_tiles(result),
        charts=[
            *quality_charts(result.bpb, result.accuracy, result.chance),
            *credit_charts(result.credit),
            *curve_charts(result.curves),
            *egress_charts(result.bytes_left),
        ],
        participants=_participant_table(result.participants),
        conversation=Table(("domain", "question", "the pivot says", "right"), tuple(result.chat)),
    )


def _tiles(result: ReportData) -> list[tuple[str, str, str]]:
    """Heading, number and explanation of the few numbers to remember."""
    tiles = []
    means = means_of(result.bpb)
    best = next((name for name in PIVOTS if name in means), None)
    if best and "base" in means:
        note = f"bits per byte, mean over domains; base had {charts.bits(means['base'])}"
        tiles.append((f"Pivot ({best})", charts.bits(means[best]), note))
    minutes, seconds = divmod(round(result.seconds), 60)
    tiles.append(("Time", f"{minutes} min {seconds:02d} s", "from start to this report"))
    tiles.append(("Memory", f"{result.peak_rss_mb:,.0f} MB", "peak over all processes together"))
    total = sum(result.bytes_left.values())
    note = f"from {len(result.bytes_left)} participants, in all rounds together"
    tiles.append(("Left the participants", charts.bytes_in_words(total), note))
    return tiles


def _participant_table(participants: Sequence[Participant]) -> Table:
    return Table(
        ("participant", "department", "architecture", "parameters", "vocabulary"),
        tuple(
            (p.name, p.department, p.architecture, f"{p.parameters:,}", f"{p.vocabulary:,}")
            for p in participants
        ),
    )
