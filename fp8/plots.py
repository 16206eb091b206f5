"""The picture of a diagnosis: what each layer loses, by depth, kind of layer and role.

The darker a cell, the more is lost, in one hue: lightness alone tells, to colour-blind eyes and
in print too. Lines are the kinds of layer in a block, columns its depth in the model.
"""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import matplotlib as mpl
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from fp8.measure import ROLES, Row

INK: Final = "#222222"
MUTED: Final = "#666666"
NOTHING: Final = "#e8e8e8"
BROKEN: Final = "#d55e00"
NUMBERS_UP_TO: Final = 8
"""Depths up to which there is room for the number in its cell."""
STYLE: Final = {
    "font.size": 9.0,
    "text.color": INK,
    "axes.labelcolor": MUTED,
    "xtick.color": MUTED,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.spines.bottom": False,
    "xtick.major.size": 0.0,
    "ytick.major.size": 0.0,
    "text.parse_math": False,
}


@dataclass(frozen=True, slots=True)
class _Panel:
    """One number of a row, as a heatmap."""

    title: str
    number: Callable[[Row], float]
    low: float
    high: float
    cmap: str
    words: str


def plot_rows(rows: Sequence[Row], recipe: str, path: Path) -> None:
    """Draw rows of one model; the name's ending is the format (png, svg, pdf).

    Raises: ValueError for an ending that is no format; OSError where path cannot be written.
    """
    roles = [role for role in ROLES if any(row.role == role for row in rows)]
    panels = _panels(rows)
    places = {row.layer: _place(row.layer) for row in rows}
    kinds = list(dict.fromkeys(kind for _, kind in places.values()))
    depths = sorted({depth for depth, _ in places.values()})
    with mpl.rc_context(STYLE):
        cell = 0.62 if len(depths) <= NUMBERS_UP_TO else min(0.3, 6.5 / len(depths))
        width = max(2.6, cell * len(depths))
        figure = Figure(
            figsize=(
                1.9 + (width + 0.55) * len(panels),
                1.3 + (0.26 * len(kinds) + 0.75) * len(roles),
            ),
            layout="constrained",
        )
        FigureCanvasAgg(figure)
        grid = figure.subplots(len(roles), len(panels), squeeze=False, sharex=True, sharey=True)
        for column, panel in enumerate(panels):
            for line, role in enumerate(roles):
                cells = {places[r.layer]: r for r in rows if r.role == role}
                image = _heatmap(grid[line][column], panel, cells, depths, kinds)
                grid[line][column].set_title(f"{role}: {panel.title}", loc="left", fontsize=9)
            grid[-1][column].set_xlabel("block" if len(depths) > 1 else "")
            figure.colorbar(
                image, ax=list(grid[:, column]), location="bottom", shrink=0.6, aspect=40, pad=0.02
            )
        figure.suptitle(_title(rows, recipe), x=0.01, ha="left", fontsize=10)
        figure.savefig(path, dpi=150)


def _panels(rows: Sequence[Row]) -> list[_Panel]:
    finite = [row.sqnr_db for row in rows if math.isfinite(row.sqnr_db)]
    low = min([20.0, *finite])
    high = max([35.0, *finite])
    panels = [
        _Panel("SQNR, dB", lambda r: r.sqnr_db, low, high, "Blues_r", "{:.0f}"),
        _Panel(
            "lost to zero, %",
            lambda r: 100 * r.underflow,
            0,
            _top(rows, "underflow"),
            "Blues",
            "{:.1f}",
        ),
    ]
    if any(row.saturation > 0 for row in rows):
        top = _top(rows, "saturation")
        panels.append(_Panel("clipped, %", lambda r: 100 * r.saturation, 0, top, "Blues", "{:.1f}"))
    return panels


def _top(rows: Sequence[Row], share: str) -> float:
    """The end of a scale of percents: 1 at least, or specks would look like disasters."""
    shares: list[float] = [getattr(row, share) for row in rows]
    return max([1.0, *(100 * x for x in shares if math.isfinite(x))])


def _heatmap(
    axes: Any,
    panel: _Panel,
    cells: dict[tuple[int, str], Row],
    depths: Sequence[int],
    kinds: Sequence[str],
) -> Any:
    numbers = [
        [panel.number(cells[d, k]) if (d, k) in cells else math.nan for d in depths] for k in kinds
    ]
    shown = np.ma.masked_invalid([[min(x, panel.high) for x in line] for line in numbers])
    cmap = mpl.colormaps[panel.cmap].with_extremes(bad=NOTHING)
    image = axes.pcolormesh(
        shown, cmap=cmap, vmin=panel.low, vmax=panel.high, edgecolors="white",
        linewidth=1.0 if len(depths) <= 32 else 0.5,
    )  # fmt: skip
    axes.set_ylim(len(kinds), 0)
    axes.set_yticks([line + 0.5 for line in range(len(kinds))], kinds)
    step = max(1, math.ceil(len(depths) / 16))
    marks = range(0, len(depths), step)
    axes.set_xticks([mark + 0.5 for mark in marks], [str(depths[mark]) for mark in marks])
    for line, kind in enumerate(kinds):
        for column, depth in enumerate(depths):
            row = cells.get((depth, kind))
            if row is not None and row.nonfinite:
                axes.text(
                    column + 0.5,
                    line + 0.5,
                    "x",
                    color=BROKEN,
                    weight="bold",
                    ha="center",
                    va="center",
                )
            elif row is not None and len(depths) <= NUMBERS_UP_TO:
                value = numbers[line][column]
                share = (min(value, panel.high) - panel.low) / (panel.high - panel.low)
                dark = share < 0.4 if panel.cmap == "Blues_r" else share > 0.6
                axes.text(
                    column + 0.5, line + 0.5, panel.words.format(value), fontsize=7.5,
                    color="white" if dark else INK, ha="center", va="center",
                )  # fmt: skip
    return image


def _title(rows: Sequence[Row], recipe: str) -> str:
    text = f"FP8 diagnosis, {recipe} recipe: {len({row.layer for row in rows})} layers"
    if not any(row.saturation > 0 for row in rows):
        text += "; no value is clipped"
    if any(row.nonfinite for row in rows):
        text += "; x: NaN or infinity"
    return text


def _place(layer: str) -> tuple[int, str]:
    """Split a name at its first number into depth and kind: layers.3.mlp.up_proj."""
    match = re.search(r"(?:^|\.)(\d+)\.(.+)$", layer)
    return (int(match[1]), match[2]) if match else (0, layer)
