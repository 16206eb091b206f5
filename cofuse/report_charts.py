"""The plots of a run's report, each with what a reader needs: heading, caption, and its table.

Pure functions from numbers to drawings; all text is escaped where it is drawn.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from markupsafe import Markup

from cofuse import charts
from cofuse.charts import Bar

PIVOTS: Final = ("unified", "pairwise", "weights")
CONTROLS: Final = ("base", "sft", "infifusion")
EXPERT: Final = "expert:"
MEAN: Final = "mean"
BASE: Final = "base"
ALL: Final = "all"
"""In a table of credit: all prompts, whatever their domain."""
Scores = Mapping[str, Mapping[str, float]]
"""By model and domain."""


@dataclass(frozen=True, slots=True)
class Table:
    """The numbers under a plot. In each row the first cell is its heading."""

    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True, slots=True)
class Chart:
    """A plot with what a reader needs: heading, how to read it, what it says, and its table."""

    name: str
    heading: str
    caption: str
    summary: str
    svg: Markup
    table: Table


@dataclass(frozen=True, slots=True)
class Measure:
    """A score of models as the page shows it."""

    name: str
    heading: str
    caption: str
    words: Callable[[float], str]
    sign: int
    """1 when lower is better, -1 when higher is."""


BITS: Final = Measure(
    "bpb",
    "Mean bits per byte",
    "Mean over domains; the shorter the bar, the better.",
    charts.bits,
    1,
)
ACCURACY: Final = Measure(
    "accuracy",
    "Questions answered rightly",
    "Multiple choice on facts of the private text, in words no model was trained on. Mean over "
    "domains; the longer the bar, the better.",
    charts.percent,
    -1,
)


def ordered_models(models: Iterable[str]) -> list[list[str]]:
    """Models as the reader meets them: pivots, then controls, then experts; no empty group."""
    names = list(models)
    pivots: list[str] = [name for name in PIVOTS if name in names]
    experts = [name for name in names if name.startswith(EXPERT)]
    known: list[str] = [name for name in CONTROLS if name in names]
    others = [name for name in names if name not in {*pivots, *experts, *known}]
    return [group for group in (pivots, known + others, experts) if group]


def means_of(scores: Scores) -> dict[str, float]:
    """Each model's mean over all domains; NaN when it lacks one, as it would not compare."""
    domains = _domains(scores)
    return {model: _with_mean(row, domains)[-1] for model, row in scores.items()}


def quality_charts(bpb: Scores, accuracy: Scores, chance: float) -> list[Chart]:
    """How good the models are, where that was measured. Args: chance: accuracy of a guess."""
    made = []
    if bpb:
        base = means_of(bpb).get("base", math.nan)
        reference = (base, "base") if math.isfinite(base) else None
        made += [_heatmap(bpb), _mean_bars(BITS, bpb, reference)]
    if accuracy:
        guess = (chance, f"chance {charts.percent(chance)}")
        made.append(_mean_bars(ACCURACY, accuracy, guess))
    return made


def _heatmap(bpb: Scores) -> Chart:
    columns = (*_domains(bpb), MEAN)
    cells = {model: _with_mean(scores, columns[:-1]) for model, scores in bpb.items()}
    svg = charts.heatmap("heat", ordered_models(bpb), columns, cells)
    return Chart(
        "heat",
        "Who knows which domain",
        "Bits needed per byte of held-out text: lower is better, and drawn stronger. Each expert "
        "knows its own domain; the pivots, on top, should know them all.",
        "",
        Markup(svg),  # noqa: S704 - our own drawing
        _score_table(bpb, charts.bits),
    )


def _mean_bars(measure: Measure, scores: Scores, reference: tuple[float, str] | None) -> Chart:
    """Each model's mean as a bar, the best first."""
    means = means_of(scores)
    finite = [model for model in means if math.isfinite(means[model])]
    finite.sort(key=lambda model: measure.sign * means[model])
    drawn = [
        Bar(label=m, value=means[m], text=measure.words(means[m]), role=_role(m)) for m in finite
    ]
    return Chart(
        measure.name,
        measure.heading,
        measure.caption,
        f"Best: {drawn[0].label}, {drawn[0].text}." if drawn else "",
        Markup(charts.bars(measure.name, drawn, reference=reference)),  # noqa: S704 - our own drawing
        _score_table(scores, measure.words),
    )


def _score_table(scores: Scores, words: Callable[[float], str]) -> Table:
    domains = _domains(scores)
    rows = [
        (model, *map(words, _with_mean(scores[model], domains)))
        for group in ordered_models(scores)
        for model in group
    ]
    return Table(("model", *domains, MEAN), tuple(rows))


def _domains(scores: Scores) -> tuple[str, ...]:
    return tuple(dict.fromkeys(domain for row in scores.values() for domain in row))


def _role(model: str) -> str:
    if model in PIVOTS:
        return "pivot"
    return "expert" if model.startswith(EXPERT) else "control"


def curve_charts(curves: Mapping[str, Sequence[float]]) -> list[Chart]:
    """One plot per kind of run: losses of different kinds are on different scales."""
    kinds: dict[str, dict[str, Sequence[float]]] = {}
    for name, losses in curves.items():
        if losses:
            kinds.setdefault(_kind_of_run(name), {})[name] = losses
    headings = {"expert": "Training the experts", "fusion": "Fusing, and the controls"}
    made = []
    for at, (kind, lines) in enumerate(kinds.items()):
        labels = {name.removeprefix(f"{kind}:"): losses for name, losses in lines.items()}
        rows = tuple(
            (
                name,
                str(len(x)),
                charts.loss(x[0]),
                charts.loss(min(filter(math.isfinite, x), default=math.nan)),
                charts.loss(x[-1]),
            )
            for name, x in lines.items()
        )
        table = Table(("run", "steps", "first loss", "lowest loss", "last loss"), rows)
        identifier = f"curves-{at}"
        svg = Markup(charts.curves(identifier, labels, ylabel="loss"))  # noqa: S704 - our own drawing
        heading = headings.get(kind, f"Runs of the {kind} round")
        caption = "Training loss by step. Runs with different losses do not compare."
        made.append(Chart(identifier, heading, caption, "", svg, table))
    return made


def credit_charts(credit: Mapping[str, Scores]) -> list[Chart]:
    """Whom the pivot listened to, and what it would lose without each."""
    made = {"share": _taught, "leave_one_out": _lost}
    return [draw(credit[name]) for name, draw in made.items() if credit.get(name)]


def _taught(shares: Scores) -> Chart:
    domains = [d for d in shares if d != ALL]
    drawn = [
        Bar(label=n, value=x, text=charts.percent(x), role="control" if n == BASE else "expert")
        for n, x in shares[ALL].items()
    ]
    rows = tuple(
        (name, *(charts.percent(shares[d][name]) for d in (*domains, ALL))) for name in shares[ALL]
    )
    return Chart(
        "credit",
        "Who taught the pivot",
        "Share of the routing's weight over the public prompts of the unified round, by source; "
        "base is what the old pivot was left to say itself.",
        "",
        Markup(charts.bars("credit", drawn)),  # noqa: S704 - our own drawing
        Table(("source", *domains, "all prompts"), rows),
    )


def _lost(lost: Scores) -> Chart:
    means = {name: sum(row.values()) / len(row) for name, row in lost.items()}
    drawn = [
        Bar(label=n, value=max(x, 0.0), text=charts.percent(x), role="expert")
        for n, x in means.items()
    ]
    domains = list(next(iter(lost.values())))
    rows = tuple(
        (name, *(charts.percent(row[d]) for d in domains), charts.percent(means[name]))
        for name, row in lost.items()
    )
    return Chart(
        "leave-one-out",
        "What is lost without each source",
        "Share of the pivot's gain over its parent that is gone when it is fused without the "
        "source. Below zero it is better without.",
        "",
        Markup(charts.bars("leave-one-out", drawn)),  # noqa: S704 - our own drawing
        Table(("source", *domains, MEAN), rows),
    )


def _kind_of_run(name: str) -> str:
    kind, colon, _ = name.partition(":")
    return kind if colon else "fusion"


def egress_charts(bytes_left: Mapping[str, int]) -> list[Chart]:
    """How much each participant let out."""
    if not bytes_left:
        return []
    drawn = [
        Bar(label=name, value=count, text=charts.bytes_in_words(count), role="expert")
        for name, count in bytes_left.items()
    ]
    rows = tuple((n, f"{c:,}", charts.bytes_in_words(c)) for n, c in bytes_left.items())
    svg = Markup(charts.bars("egress", drawn))  # noqa: S704 - our own drawing
    return [
        Chart(
            "egress",
            "What left each participant",
            "Bytes sent in all rounds: numbers about public text, or differences of weights.",
            "",
            svg,
            Table(("participant", "bytes", "in words"), rows),
        )
    ]


def _with_mean(scores: Mapping[str, float], domains: Sequence[str]) -> list[float]:
    row = [scores.get(domain, math.nan) for domain in domains]
    return [*row, sum(row) / len(row) if row else math.nan]
