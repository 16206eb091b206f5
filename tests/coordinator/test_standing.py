"""Who was left out of pivots is listened to less for some rounds, and for no reason else."""

import json

import pytest

from coordinator.standing import Standing, standings
from coordinator.tables import PivotRow


def line(*rounds: dict[str, float] | None) -> dict[str, PivotRow]:
    """pivot-0, and a pivot for each round: who was left out (1) or not (0); None: no round."""
    pivots = {}
    for number, left_out in enumerate((None, *rounds)):
        signs = {name: {"lies": 0.0, "excluded": value} for name, value in (left_out or {}).items()}
        pivots[f"pivot-{number}"] = PivotRow(
            name=f"pivot-{number}",
            parent=f"pivot-{number - 1}" if number else "",
            round_id="" if left_out is None else f"rnd-{number}",
            files=(),
            evals_json=json.dumps({"credit": {"suspicion": signs}} if signs else {}),
            created_unix_ms=number,
        )
    return pivots


@pytest.mark.parametrize(
    ("rounds", "judged", "left_out", "weight"),
    [
        ([], 0, 0, 1.0),
        ([{"bob": 0.0}] * 3, 3, 0, 1.0),
        ([{"bob": 1.0}], 1, 1, 0.5),
        ([{"bob": 1.0}, {"bob": 1.0}], 2, 2, 0.25),
        ([{"bob": 1.0}] * 9, 5, 5, 0.125),
        ([{"bob": 1.0}, *[{"bob": 0.0}] * 5], 5, 0, 1.0),  # as many clean rounds make it good
        ([{"bob": 1.0}, {"ada": 1.0}], 1, 1, 0.5),  # a round without it says nothing of it
        ([{"bob": 1.0}, None], 1, 1, 0.5),  # what was rolled back to is judged once
    ],
)
def test_each_time_left_out_halves_the_weight_for_five_rounds(
    rounds: list[dict[str, float] | None], judged: int, left_out: int, weight: float
) -> None:
    found = standings(["ada", "bob"], f"pivot-{len(rounds)}", line(*rounds))["bob"]
    assert (found, found.weight) == (Standing(judged, left_out), weight)


def test_what_came_after_the_rounds_own_pivot_is_not_asked() -> None:
    pivots = line({"bob": 0.0}, {"bob": 1.0})
    assert standings(["bob"], "pivot-1", pivots)["bob"].weight == 1.0
