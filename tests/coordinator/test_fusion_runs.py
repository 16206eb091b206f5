"""A spec's words are fusion's words, and each control is the run it names."""

from dataclasses import replace
from typing import get_args

import pytest

from coordinator.fusion_runs import CONTROLS, plan, settings_of
from fusion.merge import MERGES
from fusion.objective import DISTILL_WEIGHT
from fusion.outer import OUTER
from fusion.routing import ROUTES
from protos import spec as words
from tests.coordinator.test_fuse_worker import spec


def test_a_round_may_ask_for_all_that_fusion_offers() -> None:
    assert set(get_args(words.MergeName)) == MERGES.keys()
    assert set(get_args(words.OuterName)) == OUTER.keys()
    assert set(get_args(words.RoutingName)) == ROUTES.keys()
    assert {*get_args(words.LossName), "none"} == DISTILL_WEIGHT.keys()
    assert set(get_args(words.ControlName)) == {*CONTROLS, "leave_one_out"}


def test_leave_one_out_is_a_run_without_each_source() -> None:
    runs = plan(spec(controls=("leave_one_out",)), ("a", "b", "c"))
    assert {r.name: r.sources for r in runs[1:]} == {
        "without-a": ("b", "c"),
        "without-b": ("a", "c"),
        "without-c": ("a", "b"),
    }
    assert len(plan(spec(controls=("leave_one_out",)), ("a",))) == 1  # nobody is left


@pytest.mark.parametrize("control", sorted(CONTROLS.keys() - {"dpo"}))
def test_a_control_differs_from_the_pivots_run_in_what_it_names_alone(control: str) -> None:
    asked = spec(controls=(control,), distill_weight=0.7)
    ours = settings_of(asked)
    theirs = settings_of(asked, CONTROLS[control])
    changed = replace(ours, **CONTROLS[control], distill_weight=theirs.distill_weight)
    assert theirs == changed
    published = DISTILL_WEIGHT[theirs.loss]
    assert theirs.distill_weight == (0.7 if published is None else published)


def test_the_specs_numbers_reach_the_run() -> None:
    asked = spec(
        routing="document", max_share=0.4, gate_nats=1.5, precision="fp8", distill_weight=0.9
    )
    found = settings_of(asked)
    assert (found.routing, found.max_share, found.gate_nats) == ("document", 0.4, 1.5)
    assert found.fp8
    assert found.distill_weight == 0.9
    assert settings_of(spec(apart=True)).apart
    assert not found.apart
