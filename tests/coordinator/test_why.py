"""An explanation names what is missing, who can cure it, and how."""

import dataclasses

import pytest

from coordinator.rounds import State
from coordinator.store import ContributionRow, ParticipantRow, RoundRow
from coordinator.why import explain, explain_participant
from protos.spec import RoundSpec

SPEC = RoundSpec.model_validate(
    {
        "name": "first",
        "pivot": "pivot-0",
        "participants": ["a", "b", "c"],
        "kind": "weights",
        "method": "merge",
        "training": {"steps": 1, "lr": 0.1},
    }
)
ROUND = RoundRow(
    round_id="rnd-7",
    submitted_by="ada",
    spec_json=SPEC.model_dump_json(),
    state=State.COLLECTING,
    created_unix_ms=0,
    deadline_unix_ms=3_600_000,
    detail="",
    pivot_name="",
)


def _part(name: str, status: str, detail: str = "") -> ContributionRow:
    return ContributionRow(
        round_id="rnd-7",
        participant=name,
        status=status,
        attempt=2,
        sha256="",
        size_bytes=0,
        committed_unix_ms=0,
        detail=detail,
        report_json="",
    )


def test_a_round_that_collects_names_the_silent_ones_first_and_what_helps() -> None:
    parts = [_part("a", "committed"), _part("b", "refused", "not ours"), _part("c", "assigned")]
    found = explain(ROUND, parts, online=["a", "b"], now_unix_ms=600_000)
    assert found.state == "rnd-7 is COLLECTING: 1 of 3 contributions are here, 50 minutes are left"
    first, second, third = found.reasons
    assert (first.says, first.do) == (
        "c has not answered and is not connected",
        "ask c to start its participant: cofuse participant up",
    )
    assert second.says == "b refused: not ours"
    assert third.says == "a has answered"
    assert third.do == ""


@pytest.mark.parametrize("state", State)
def test_every_state_has_an_explanation(state: State) -> None:
    found = explain(
        dataclasses.replace(ROUND, state=state, detail="the disk was full"),
        [],
        online=[],
        now_unix_ms=0,
    )
    assert found.state.startswith(f"rnd-7 is {state}")
    if state is State.SUBMITTED:
        assert "cofuse round approve rnd-7" in found.reasons[0].do
    if state is State.FAILED:
        assert found.reasons[0].says == "the disk was full"


def test_a_participant_is_asked_to_start_only_when_somebody_waits_for_it() -> None:
    row = ParticipantRow(name="st-mary", node_id=1, joined_unix_ms=0)
    idle = explain_participant(row, online=False, open_rounds=[])
    assert (idle.state, idle.reasons[0].do) == ("st-mary is not connected", "")
    wanted = explain_participant(row, online=False, open_rounds=["rnd-7"])
    assert wanted.reasons[0].says == "it is waited for by rnd-7"
    assert "cofuse participant up" in wanted.reasons[0].do
