"""The report's plots: plain numbers in, one inline SVG out, in colours that the page decides.

matplotlib draws with stand-in colours, and each stand-in becomes a CSS variable (--ink, --series-0,
--heat-0, ...), so one drawing serves light, dark and paper. Text stays text: it can be selected and
read aloud, and takes the page's font.
"""

import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import matplotlib as mpl
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

SERIES: Final = 6
"""Colours for lines; a seventh line starts again, dashed."""
HEAT_STEPS: Final = 7
CURVE_POINTS: Final = 160
"""Points drawn per curve; each is the mean of the steps that it stands for."""
LABEL_CHARACTERS: Final = 26

VARIABLES: Final = (
    *("ink", "muted", "grid", "surface", "pivot", "control", "expert"),
    *(f"series-{n}" for n in range(SERIES)),
    *(f"heat-{n}" for n in range(HEAT_STEPS)),
    *(f"heat-ink-{n}" for n in range(HEAT_STEPS)),
)
# Stand-ins that nothing else is drawn in.
STAND_IN: Final = {name: f"#fe01{at:02x}" for at, name in enumerate(VARIABLES)}
STYLE: Final = {
    "svg.fonttype": "none",
    "svg.hashsalt": "cofuse",
    "text.parse_math": False,
    "font.size": 10.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": STAND_IN["grid"],
    "axes.labelcolor": STAND_IN["muted"],
    "axes.unicode_minus": False,
    "text.color": STAND_IN["ink"],
    "xtick.color": STAND_IN["muted"],
    "ytick.color": STAND_IN["ink"],
    "xtick.major.size": 0.0,
    "ytick.major.size": 0.0,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Bar:
    """One bar: its label, its value (finite, at least 0), the value in words, and its colour."""

    label: str
    value: float
    text: str
    role: str = "pivot"
    """pivot, control or expert."""


def heatmap(
    name: str,
    rows: Sequence[Sequence[str]],
    columns: Sequence[str],
    cells: Mapping[str, Sequence[float]],
) -> str:
    """A table of numbers on colour: the stronger the colour, the lower the number.

    Args: rows in groups, a gap between two groups; cells by row, one number for each column, NaN
        for none. The last column stands apart (it is the mean of the others).
    """
    numbers = [x for row in cells.values() for x in row if math.isfinite(x)]
    labels = [label for group in rows for label in group]
    height = len(labels) + 0.35 * (len(rows) - 1)
    with mpl.rc_context(STYLE):
        figure, axes = _canvas(8.2, 0.36 * height + 0.5)
        axes.set_axis_off()
        lefts = [at + (0.12 if at == len(columns) - 1 else 0.0) for at in range(len(columns))]
        axes.set_xlim(0, len(columns) + 0.12)
        axes.set_ylim(height, 0)
        for left, column in zip(lefts, columns, strict=True):
            axes.text(left + 0.5, -0.25, _short(column), ha="center", color=STAND_IN["muted"])
        top = 0.0
        for group in rows:
            for label in group:
                axes.text(-0.08, top + 0.5, _short(label), ha="right", va="center")
                for left, value in zip(lefts, cells[label], strict=True):
                    _cell(axes, (left, top), value, numbers)
                top += 1.0
            top += 0.35
        return _svg(figure, name)


def bars(name: str, values: Sequence[Bar], *, reference: tuple[float, str] | None = None) -> str:
    """Bars from zero, each with its value at its end; reference is a dashed line and its name."""
    with mpl.rc_context(STYLE):
        figure, axes = _canvas(8.2, 0.32 * len(values) + 0.75)
        widest = max([bar.value for bar in values] + [reference[0] if reference else 0.0]) or 1.0
        for row, bar in enumerate(values):
            axes.barh(row, bar.value, height=0.62, color=STAND_IN[bar.role], linewidth=0)
            # On a patch of the surface: the reference line must not strike a number through.
            patch = {"facecolor": STAND_IN["surface"], "linewidth": 0, "pad": 1.5}
            axes.text(bar.value + widest * 0.01, row, bar.text, va="center", bbox=patch)
        axes.set_yticks(range(len(values)), [_short(bar.label) for bar in values])
        axes.set_ylim(len(values) - 0.4, -0.6)
        axes.set_xlim(0, widest * 1.12)
        axes.spines["bottom"].set_visible(False)
        axes.set_xticks([])
        if reference:
            axes.axvline(reference[0], color=STAND_IN["ink"], linewidth=1, linestyle=(0, (3, 3)))
            axes.text(
                reference[0], len(values) - 0.35, reference[1], ha="center", va="top",
                color=STAND_IN["muted"],
            )  # fmt: skip
        return _svg(figure, name)


def curves(name: str, lines: Mapping[str, Sequence[float]], *, ylabel: str) -> str:
    """One line per run over its steps, named at its end. What is not finite leaves a gap."""
    with mpl.rc_context(STYLE):
        figure, axes = _canvas(8.2, 3.0)
        ends: list[tuple[float, str, str]] = []
        for at, (label, losses) in enumerate(lines.items()):
            steps, means = _thinned(losses)
            color = STAND_IN[f"series-{at % SERIES}"]
            dashes = "solid" if at < SERIES else "dashed"
            axes.plot(steps, means, color=color, linewidth=1.8, linestyle=dashes)
            last = next((y for y in reversed(means) if math.isfinite(y)), math.nan)
            ends.append((last, _short(label), color))
        axes.grid(axis="y", color=STAND_IN["grid"], linewidth=0.8)
        axes.set_axisbelow(True)
        axes.tick_params(axis="y", labelcolor=STAND_IN["muted"])
        axes.spines["left"].set_visible(False)
        axes.set_xlabel("step")
        axes.set_ylabel(ylabel)
        axes.margins(x=0.01)
        _name_ends(axes, ends)
        return _svg(figure, name)


def heat_step(value: float, numbers: Sequence[float]) -> int:
    """The step of a value: 0 for the lowest number, HEAT_STEPS - 1 for the highest."""
    low, high = min(numbers), max(numbers)
    share = (value - low) / (high - low) if high > low else 0.0
    return min(HEAT_STEPS - 1, int(share * HEAT_STEPS))


def bits(value: float) -> str:
    """Bits per byte, or a word for what was not measured."""
    return f"{value:.3f}" if math.isfinite(value) else "none"


def percent(value: float) -> str:
    """A share, 0..1, in percent."""
    return f"{value:.1%}" if math.isfinite(value) else "none"


def loss(value: float) -> str:
    """A training loss, to four digits."""
    return f"{value:.4g}"


def bytes_in_words(count: int) -> str:
    """A size as people read it, in units of 1000 with three digits: 1.23 MB."""
    size, units = float(count), ["B", "kB", "MB", "GB", "TB"]
    while size >= 999.5 and len(units) > 1:
        size, units = size / 1000, units[1:]
    return f"{count} B" if units[0] == "B" else f"{size:.3g} {units[0]}"


def _cell(axes: Any, corner: tuple[float, float], value: float, numbers: Sequence[float]) -> None:
    step = heat_step(value, numbers) if math.isfinite(value) else HEAT_STEPS - 1
    axes.add_patch(
        Rectangle(
            (corner[0] + 0.01, corner[1] + 0.03), 0.98, 0.94,
            facecolor=STAND_IN[f"heat-{step}"], linewidth=0,
        )
    )  # fmt: skip
    axes.text(
        corner[0] + 0.5, corner[1] + 0.52, bits(value), ha="center", va="center",
        color=STAND_IN[f"heat-ink-{step}"],
    )  # fmt: skip


def _thinned(losses: Sequence[float]) -> tuple[list[float], list[float]]:
    """At most CURVE_POINTS steps and means, none of which hides a number that is not finite."""
    width = max(1, math.ceil(len(losses) / CURVE_POINTS))
    blocks = [losses[at : at + width] for at in range(0, len(losses), width)]
    steps = [at * width + (len(block) - 1) / 2 for at, block in enumerate(blocks)]
    return steps, [_mean(block) for block in blocks]


def _mean(block: Sequence[float]) -> float:
    return sum(block) / len(block) if all(map(math.isfinite, block)) else math.nan


def _name_ends(axes: Any, ends: Sequence[tuple[float, str, str]]) -> None:
    """The names of the lines at the right, in the order of their ends, none over another."""
    bottom, top = axes.get_ylim()
    least, lowest = 0.085 * (top - bottom), bottom
    for y, label, color in sorted((end for end in ends if math.isfinite(end[0])), key=_height):
        lowest = max(y, lowest)
        place = (1.02, (lowest - bottom) / (top - bottom))
        axes.text(
            *place, "\u2014", color=color, va="center", weight="bold", transform=axes.transAxes
        )
        axes.text(place[0] + 0.035, place[1], label, va="center", transform=axes.transAxes)
        lowest += least


def _height(end: tuple[float, str, str]) -> float:
    return end[0]


def _canvas(width: float, height: float) -> tuple[Any, Any]:
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasSVG(figure)
    return figure, figure.add_subplot()


def _short(label: str) -> str:
    """A label that fits; the table beneath has the whole one."""
    plain = " ".join(label.split())
    return plain if len(plain) <= LABEL_CHARACTERS else f"{plain[: LABEL_CHARACTERS - 1]}\u2026"


def _svg(figure: Any, name: str) -> str:
    """The drawing as an element: no header, no metadata, ids of its own, variables for colours."""
    out = io.StringIO()
    metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(out, format="svg", metadata=metadata, bbox_inches="tight", pad_inches=0.04)
    svg = out.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r'\b(id="|href="#|url\(#)', rf"\g<1>{name}-", svg)
    svg = re.sub(r" font-family: [^;\"]*;?", "", svg)
    svg = re.sub(r' (width|height)="[\d.]+pt"', "", svg, count=2)
    for variable, color in STAND_IN.items():
        svg = svg.replace(color, f"var(--{variable})")
    return svg
