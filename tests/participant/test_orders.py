"""A round is worked on when its submitter ordered it, as it is, and once."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from participant.orders import believe
from participant.policy import PolicyRefusalError
from protos.messages import Assignment
from protos.recurring import RecurringSpec
from protos.spec import RoundSpec
from tests.participant.ordering import authority_at, ordered

# Certificates are made when a test runs, which may be long after this file was read.
NOW = time.time_ns() // 1_000_000 + 3_600_000
SPEC = RoundSpec.model_validate(
    {
        "name": "first",
        "pivot": "pivot-0",
        "participants": ["a"],
        "kind": "logits",
        "method": "unified",
        "prompts": "sha256:" + "0" * 64,
        "training": {"steps": 1, "lr": 0.1},
    }
)


def assignment(signed: str, **changes: Any) -> Assignment:
    values: dict[str, Any] = {
        "round_id": "rnd-1",
        "attempt": 1,
        "submitted_by": "ada",
        "spec": SPEC,
        "pivot_sha256": "0" * 64,
        "deadline_unix_ms": 0,
        "order": signed,
    }
    return Assignment.model_validate({**values, **changes})


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("orders")
    authority_at(folder)
    return folder


Hear = Callable[[Assignment], None]


@pytest.fixture
def hear(home: Path, tmp_path: Path) -> Hear:
    return lambda one: believe(one, home / "ca.pem", tmp_path / "orders", NOW)


def test_what_was_ordered_is_believed_as_often_as_it_is_assigned(home: Path, hear: Hear) -> None:
    order = ordered(home, SPEC.model_dump_json(), "n-1", NOW)
    for attempt in (1, 2):
        hear(assignment(order, attempt=attempt))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"order": ""}, "no order that its submitter signed"),
        ({"order": "{}"}, "not to be believed"),
        ({"submitted_by": "eve"}, "another submitter's"),
        ({"spec": SPEC.model_copy(update={"top_k": 64})}, "not what its submitter ordered"),
        ({"spec": SPEC.model_copy(update={"pivot": "pivot-1"})}, "not what its submitter ordered"),
    ],
)
def test_the_coordinator_alone_orders_nothing(
    home: Path, hear: Hear, changes: dict[str, Any], says: str
) -> None:
    order = ordered(home, SPEC.model_dump_json(), "n-1", NOW)
    with pytest.raises(PolicyRefusalError, match=says):
        hear(assignment(order, **changes))


def test_an_order_is_carried_out_once(home: Path, hear: Hear) -> None:
    order = ordered(home, SPEC.model_dump_json(), "n-1", NOW)
    hear(assignment(order))
    with pytest.raises(PolicyRefusalError, match="carried out before"):
        hear(assignment(order, round_id="rnd-2"))


def test_rounds_by_the_calendar_differ_in_their_pivot_alone(home: Path, hear: Hear) -> None:
    spec = RecurringSpec.model_validate({"name": "x", "every": "0 2 * * sun", "round": SPEC})
    order = ordered(home, spec.model_dump_json(), "n-1", NOW, recurring=True)
    for number in (1, 2):
        newer = SPEC.model_copy(update={"pivot": f"pivot-{number}"})
        hear(assignment(order, round_id=f"rnd-{number}", spec=newer))
    with pytest.raises(PolicyRefusalError, match="not what its submitter ordered"):
        hear(assignment(order, spec=SPEC.model_copy(update={"top_k": 64})))
