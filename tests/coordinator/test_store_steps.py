"""A step of a round is one transaction: whole, or not there at all."""

import json
from pathlib import Path

import pytest

from coordinator.happenings import Committed, Fused, Heard, Tick, Worked
from coordinator.rounds import CommitRefusedError, Event, IllegalTransitionError, State
from coordinator.store import Store
from protos.errors import CofuseError
from protos.messages import FileRef

FILES = [FileRef(name="model.safetensors", sha256="1" * 64, size_bytes=1)]


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """One with a round that is evaluated."""
    found = Store.at(tmp_path / "store.sqlite")
    found.submit_round(
        request_id="r",
        submitted_by="ada",
        spec_json=json.dumps({"participants": ["a", "b"], "quorum": 1, "fusion_minutes": 0.005}),
        deadline_ms=3_600_000,
    )
    found.advance("rnd-1", Event.APPROVE)
    found.step("rnd-1", Tick())
    found.commit("rnd-1", "a", "a" * 64, 5)
    found.report("rnd-1", "a", "committed", "", "{}")
    found.advance("rnd-1", Event.COLLECTED)
    for happening in (Worked(1), Fused(1)):
        found.step("rnd-1", happening)
    return found


def publish(store: Store, attempt: int = 1) -> None:
    store.publish("rnd-1", attempt, parent="pivot-0", files=FILES, evals_json="{}")


def test_a_pivot_and_its_rounds_end_appear_together(store: Store) -> None:
    publish(store)
    assert store.round("rnd-1").state is State.PUBLISHED
    assert store.pivot("pivot-1").round_id == "rnd-1"


@pytest.mark.parametrize("why", ["cancelled", "another worker", "another pivot of its name"])
def test_a_publication_that_is_refused_leaves_nothing(
    store: Store, why: str, tmp_path: Path
) -> None:
    error: type[Exception] = IllegalTransitionError
    if why == "cancelled":
        store.advance("rnd-1", Event.CANCEL)
    if why == "another pivot of its name":  # from a database of before the name was kept
        error = CofuseError
        store.add_pivot(name="pivot-1", parent="", round_id="rnd-1", files=[], evals_json="{}")
    before = store.round("rnd-1"), store.pivots(), store.events("rnd-1")
    with pytest.raises(error):
        publish(store, attempt=2 if why == "another worker" else 1)
    again = Store.at(tmp_path / "store.sqlite")
    assert (again.round("rnd-1"), again.pivots(), again.events("rnd-1")) == before


def test_nobody_imports_a_pivot_under_a_name_that_a_round_keeps(store: Store) -> None:
    with pytest.raises(CofuseError, match="rnd-1 will publish"):
        store.add_pivot(name="pivot-1", parent="", round_id="", files=FILES, evals_json="{}")


def test_what_changes_nothing_is_not_written(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Store, "_write", None)  # whoever writes now fails
    before = store.core("rnd-1")
    for happening in (Tick(), Worked(1), Fused(1), Heard("b", 1), Committed("a", "a" * 64, 5)):
        store.step("rnd-1", happening)
    with pytest.raises(CommitRefusedError, match="EVALUATING"):
        store.step("rnd-1", Committed("b", "b" * 64, 5))
    assert store.core("rnd-1") == before


def test_the_spec_says_who_is_asked_and_how_long(store: Store) -> None:
    round_ = store.core("rnd-1")
    assert (round_.participants, round_.needed) == (("a", "b"), 1)
    assert round_.deadline_unix_ms - round_.collect_unix_ms == 300
