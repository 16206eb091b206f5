"""A pivot's evaluations as a table: models by domains."""

from collections.abc import Mapping
from dataclasses import dataclass
from statistics import fmean
from typing import Any, Final

MEASURES: Final = {"bpb": "bits per byte, held out (lower is better)", "accuracy": "accuracy"}


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


@dataclass(frozen=True, slots=True)
class Evals:
    """What was measured of a pivot, and of the models beside it."""

    pivot: str
    """The row that is the pivot."""
    tables: Mapping[str, Mapping[str, Mapping[str, float]]]
    """Measure -> model -> domain -> value."""

    @classmethod
    def of(cls, said: Mapping[str, Any]) -> "Evals":
        """Read what a pivot's evals.json says."""
        tables = {key: said[key] for key in MEASURES if said.get(key)}
        return cls(pivot=str(said.get("pivot", "")), tables=tables)

    def cells(self) -> list[Cell]:
        """Every number, in rows that a data frame takes: pandas.DataFrame(evals.cells())."""
        return [
            Cell(measure, model, domain, value, model == self.pivot)
            for measure, models in self.tables.items()
            for model, by_domain in models.items()
            for domain, value in by_domain.items()
        ]

    def table(self) -> str:
        """The numbers for people: one table a measure, the pivot's row marked."""
        parts = [
            f"{MEASURES[measure]}\n{_table(models, self.pivot)}"
            for measure, models in self.tables.items()
        ]
        return "\n\n".join(parts) or "nothing was evaluated: the round's spec names no evals"

    def means(self, measure: str) -> dict[str, float]:
        """Model -> mean over domains; empty when it was not measured."""
        return {
            model: fmean(by_domain.values())
            for model, by_domain in self.tables.get(measure, {}).items()
        }


def _table(models: Mapping[str, Mapping[str, float]], pivot: str) -> str:
    domains = list(next(iter(models.values())))
    head = ["model", *domains, "mean"]
    rows = [
        [
            f"{model}{' *' if model == pivot else ''}",
            *(f"{by_domain[domain]:.3f}" for domain in domains),
            f"{fmean(by_domain.values()):.3f}",
        ]
        for model, by_domain in models.items()
    ]
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in [head, *rows]
    )
