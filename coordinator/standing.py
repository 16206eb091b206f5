"""How far a participant is trusted after what earlier rounds found of it. Pure.

Each pivot keeps what its round found against each source (`credit.suspicion` of evals.json). Who
was left out of a pivot comes to the next rounds with less weight, half as much for each time among
its last _MEMORY rounds; after as many clean ones it is as anybody. The history is that of the
pivot's own ancestors, so a fusion stays a function of what it was given.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:  # the fusion worker reads this file, and no database
    from coordinator.tables import PivotRow

_MEMORY: Final = 5
"""Rounds of a participant that count, its latest."""
_LEAST: Final = 1 / 8
_Signs = Mapping[str, Mapping[str, float]]


@dataclass(frozen=True, slots=True)
class Standing:
    """One participant's record."""

    judged: int
    """Rounds among its last _MEMORY in which its words were held against the text."""
    left_out: int
    """Those in which it was left out."""

    @property
    def weight(self) -> float:
        """What its routing weights are multiplied with, in [_LEAST, 1]."""
        return max(_LEAST, 0.5**self.left_out)


def standings(
    names: Sequence[str], pivot: str, pivots: "Mapping[str, PivotRow]"
) -> dict[str, Standing]:
    """Return the record of each name over the rounds that a pivot has come of."""
    rounds = list(_judged(pivot, pivots))
    found = {}
    for name in names:
        own = [one[name].get("excluded", 0.0) for one in rounds if name in one][:_MEMORY]
        found[name] = Standing(len(own), sum(value > 0 for value in own))
    return found


def _judged(name: str, pivots: "Mapping[str, PivotRow]") -> Iterator[_Signs]:
    """What each ancestor's round found, the latest first; what was only published again tells none.

    Those of a round that was rolled back count as well: who spoiled it has done so.
    """
    seen: set[str] = set()
    while name in pivots and name not in seen:
        seen.add(name)
        row = pivots[name]
        if row.round_id:
            yield (json.loads(row.evals_json).get("credit") or {}).get("suspicion") or {}
        name = row.parent
