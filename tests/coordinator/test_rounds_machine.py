"""Whatever happens, in any order, twice, late, across crashes and jumps of the clock."""

import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import run_state_machine_as_test

from coordinator import queries, round_rows
from coordinator.happenings import Happening
from coordinator.round_state import Round
from coordinator.rounds import State, step
from coordinator.store import Store
from tests.coordinator.round_world import DEADLINE_MS, NAMES, NOW, RoundWorld


class PureWorld(RoundWorld):
    """The rules alone."""

    def begin(self, needed: int) -> Round:
        return Round(
            round_id="rnd-1",
            state=State.SUBMITTED,
            participants=NAMES,
            needed=needed,
            deadline_unix_ms=NOW + DEADLINE_MS,
            collect_unix_ms=NOW + DEADLINE_MS * 2 // 3,
        )

    def apply(self, happening: Happening, now: int) -> Round:
        return step(self.round, happening, now)[0]


class StoredWorld(RoundWorld):
    """The rules in a database, which is opened anew for each round."""

    def begin(self, needed: int) -> Round:
        self.folder = tempfile.TemporaryDirectory()
        self.store = Store.at(Path(self.folder.name) / "store.sqlite")
        spec = {"participants": NAMES, "quorum": needed}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(round_rows, "now_unix_ms", lambda: NOW)
            row = self.store.submit_round(
                request_id="r",
                submitted_by="ada",
                spec_json=json.dumps(spec),
                deadline_ms=DEADLINE_MS,
            )
        return self.store.core(row.round_id)

    def apply(self, happening: Happening, now: int) -> Round:
        with pytest.MonkeyPatch.context() as patch:
            for module in (round_rows, queries):
                patch.setattr(module, "now_unix_ms", lambda: now)
            try:
                self.store.step("rnd-1", happening)
            finally:
                stored = self.store.core("rnd-1")
        return stored

    def teardown(self) -> None:
        super().teardown()
        if hasattr(self, "folder"):
            story = [json.loads(e.body_json) for e in self.store.events("rnd-1")]
            states = [told["state"] for told in story if "state" in told]
            assert states[0] == State.SUBMITTED
            assert states[-1] == self.round.state
            assert len(states) == len(set(states)), "a state was entered twice"
            self.store.close()
            self.folder.cleanup()


def run(world: type[RoundWorld], *, examples: int, steps: int) -> None:
    several: Any = settings(
        max_examples=examples,
        stateful_step_count=steps,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        database=None,
    )
    run_state_machine_as_test(world, settings=several)  # type: ignore[no-untyped-call]


def test_a_round_keeps_its_promises_whatever_happens() -> None:
    run(PureWorld, examples=60, steps=40)


def test_a_stored_round_keeps_them_too() -> None:
    run(StoredWorld, examples=12, steps=25)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_round_keeps_its_promises_over_a_hundred_thousand_steps() -> None:
    run(PureWorld, examples=2_000, steps=60)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_stored_round_keeps_them_over_thousands_of_steps() -> None:
    run(StoredWorld, examples=150, steps=40)
