"""Lines of tables out of rows: laws that hold for any story."""

import json
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from coordinator.console.queries import spans
from coordinator.console.views import MAX_POINTS, curves, gates, heat, steps_of, verdict
from coordinator.tables import EventRow
from tests.coordinator.console.conftest import EVALS

STATES = st.sampled_from(["SUBMITTED", "APPROVED", "COLLECTING", "FUSING", "PUBLISHED", "FAILED"])
SCORES = st.dictionaries(
    st.sampled_from(["base", "unified", "sft", "expert:a", "expert:b"]),
    st.fixed_dictionaries({"x": st.floats(0.5, 9), "y": st.floats(0.5, 9)}),
    min_size=1,
)


@given(st.lists(st.tuples(STATES, st.integers(0, 1000)), max_size=8), st.integers(0, 3000))
def test_spans_follow_each_other_without_a_gap(story: list[tuple[str, int]], now: int) -> None:
    story.sort(key=lambda pair: pair[1])
    found = spans(story, now)
    assert [state for state, _, _ in found] == [state for state, _ in story]
    assert all(a[2] == b[1] for a, b in pairwise(found))
    assert all(start <= end for _, start, end in found)


@given(SCORES, st.sampled_from(["bpb", "accuracy"]))
def test_the_heat_map_has_the_pivot_on_top_and_its_best_cell_strongest(
    scores: dict[str, dict[str, float]], measure: str
) -> None:
    table = heat({measure: scores, "pivot": "unified"}, measure)
    assert table is not None
    names = [row["name"] for row in table.rows]
    assert sorted(names) == sorted(scores)
    if "unified" in scores:
        assert names[0] == "unified"
    better = min if measure == "bpb" else max
    for column, domain in enumerate(table.domains[:-1]):
        cells = [row["cells"][column] for row in table.rows]
        best = better(cell["value"] for cell in cells)
        assert best == better(row[domain] for row in scores.values())
        assert all(cell["best"] == (cell["value"] == best) for cell in cells)
        top = [cell["step"] for cell in cells if cell["best"]]
        assert all(step <= cell["step"] for cell in cells for step in top)


def test_shares_of_questions_have_intervals_and_what_is_no_share_has_none() -> None:
    found = {"pivot": "unified", "questions": {"exam": 40}}
    scores = {"unified": {"exam": 0.25, "other": 0.5}, "expert:a": {"exam": 7.0, "other": 0.1}}
    table = heat({**found, "letter": scores}, "letter")
    assert table is not None
    told = {row["name"]: [cell["interval"] for cell in row["cells"]] for row in table.rows}
    low, high = told["unified"][0]
    assert low < 0.25 < high
    # Unknown numbers of questions, the mean, and an expert's word that cannot be.
    assert [*told["unified"][1:], *told["expert:a"]] == [None] * 5
    pairs = {"pairs": {"held_out": {"exam": 40, "other": 4}}, "preference": scores}
    judged = heat({"pivot": "unified", **pairs}, "preference")
    assert judged is not None
    assert judged.rows[0]["cells"][0]["interval"] == (low, high)
    bits = heat({**found, "bpb": {"unified": {"exam": 0.5}}}, "bpb")
    assert bits is not None
    assert bits.rows[0]["cells"][0]["interval"] is None


def test_the_verdict_compares_with_base_and_the_best_expert() -> None:
    assert [held for held, _ in verdict(EVALS)] == [True, True]
    assert verdict({}) == []


def test_a_domain_that_got_worse_and_a_source_left_out_are_told() -> None:
    assert [held for held, _ in gates(EVALS)] == [True, True, True]
    bpb = EVALS["bpb"] | {"unified": {"cardio": 2.0, "neuro": 3.3}}
    credit = {"suspicion": {"north": {"excluded": 1.0}, "st-mary": {"excluded": 0.0}}}
    told = dict(map(reversed, gates(EVALS | {"bpb": bpb, "credit": credit})))
    assert told["no domain is worse than in the pivot before: neuro is, by 0.100"] is False
    [left_out] = [words for words, held in told.items() if not held and "left out" in words]
    assert "north" in left_out
    assert "st-mary" not in left_out
    assert gates({}) == []


def test_curves_keep_both_ends_and_the_word_of_the_last_worker() -> None:
    def told(step: int, loss: float) -> EventRow:
        body = {"phase": "train", "run": "u", "step": step, "steps": 2000, "loss": loss}
        return EventRow(seq=step, time_unix_ms=0, kind="progress", body_json=json.dumps(body))

    [curve] = curves([told(step, 9.0) for step in range(1000)] + [told(0, 1.0)])
    assert len(curve.points) <= MAX_POINTS + 1
    assert (curve.points[0], curve.points[-1][0]) == ((0, 1.0), 999)


def test_a_round_that_ended_badly_ends_its_bar() -> None:
    bar = steps_of([("SUBMITTED", 0, 5), ("CANCELLED", 5, 5)], "CANCELLED")
    assert [(step["state"], step["when"]) for step in bar] == [
        ("SUBMITTED", "done"),
        ("CANCELLED", "now"),
    ]
    assert [step["when"] for step in steps_of([("SUBMITTED", 0, 5)], "SUBMITTED")][1:] == [""] * 5
