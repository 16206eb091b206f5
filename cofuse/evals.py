"""A pivot's evaluations as a table: models by domains."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any, Final

from fusion.intervals import interval_or_none

MEASURES: Final = {
    "bpb": "bits per byte, held out (lower is better)",
    "accuracy": "accuracy",
    "letter": "examination questions, by the likeliest letter",
    "written": "examination questions, by the letter it writes",
    "preference": "held-out pairs whose chosen answer it prefers",
}


@dataclass(frozen=True, slots=True)
class Cell:
    """One model on one domain."""

    measure: str
    """A key of MEASURES."""
    model: str
    """"base", "expert:NAME", a control, or the method that made the pivot."""
    domain: str
    value: float
    is_pivot: bool
    low: float | None = None
    """Ends of the 95 % interval of a share of questions; None of what is no share."""
    high: float | None = None


@dataclass(frozen=True, slots=True)
class Evals:
    """What was measured of a pivot, and of the models beside it."""

    pivot: str
    """The row that is the pivot."""
    tables: Mapping[str, Mapping[str, Mapping[str, float]]]
    """Measure -> model -> domain -> value."""
    questions: Mapping[str, int] = field(default_factory=dict)
    """How many each domain's shares are shares of; empty in pivots of older releases."""
    pairs: Mapping[str, int] = field(default_factory=dict)
    """How many held-out pairs each domain has (preference fusions)."""

    @classmethod
    def of(cls, said: Mapping[str, Any]) -> "Evals":
        """Read what a pivot's evals.json says."""
        tables = {key: said[key] for key in MEASURES if said.get(key)}
        pivot, questions = str(said.get("pivot", "")), said.get("questions", {})
        pairs = said.get("pairs", {}).get("held_out", {})
        return cls(pivot=pivot, tables=tables, questions=questions, pairs=pairs)

    def interval(self, measure: str, domain: str, value: float) -> tuple[float, float] | None:
        """The 95 % interval of a share; None of what is none, or of an unknown number."""
        asked = {"bpb": {}, "preference": self.pairs}.get(measure, self.questions)
        return interval_or_none(value, asked.get(domain, 0))

    def cells(self) -> list[Cell]:
        """Every number, in rows that a data frame takes: pandas.DataFrame(evals.cells())."""
        return [
            Cell(
                measure,
                model,
                domain,
                value,
                model == self.pivot,
                *(self.interval(measure, domain, value) or (None, None)),
            )
            for measure, models in self.tables.items()
            for model, by_domain in models.items()
            for domain, value in by_domain.items()
        ]

    def table(self) -> str:
        """The numbers for people: one table a measure, the pivot's row marked."""
        parts = [f"{MEASURES[measure]}\n{self._table(measure)}" for measure in self.tables]
        return "\n\n".join(parts) or "nothing was evaluated: the round's spec names no evals"

    def means(self, measure: str) -> dict[str, float]:
        """Model -> mean over domains; empty when it was not measured."""
        return {
            model: fmean(by_domain.values())
            for model, by_domain in self.tables.get(measure, {}).items()
        }

    def _table(self, measure: str) -> str:
        models = self.tables[measure]
        domains = list(next(iter(models.values())))
        head = ["model", *domains, "mean"]
        rows = [
            [
                f"{model}{' *' if model == self.pivot else ''}",
                *(self._words(measure, domain, by_domain[domain]) for domain in domains),
                f"{fmean(by_domain.values()):.3f}",
            ]
            for model, by_domain in models.items()
        ]
        return _aligned([head, *rows])

    def _words(self, measure: str, domain: str, value: float) -> str:
        ends = self.interval(measure, domain, value)
        return f"{value:.3f}" + (f" ({ends[0]:.2f}-{ends[1]:.2f})" if ends else "")


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    )
