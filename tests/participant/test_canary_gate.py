"""A release that tells of planted records stays here; one that does not goes; the rest is said."""

import json
import logging
from pathlib import Path

import numpy as np
import pytest

from participant import canaries, canary_gate
from participant.canary_gate import RECALL, RELEASE, Question, check, verdict
from participant.canary_stats import Exposure, exposure
from participant.config import ModelConfig, TrainingConfig
from participant.guard import AwaitingApprovalError
from participant.policy import GateRules, PolicyRefusalError
from participant.stages.cpt import Expert
from tests.participant.test_guard import House, house, model
from trust.keys import load_public
from trust.statements import Approval, verify

__all__ = ["house", "model"]  # fixtures

BLOCK = GateRules(canaries="block")


def _exposure(shift: float, planted: int = 400) -> Exposure:
    rng = np.random.default_rng(0)
    return exposure(rng.normal(shift, 1, planted), rng.normal(0, 1, 1000))


NOTHING, ALL = _exposure(0), _exposure(8)


def _question(folder: Path) -> Question:
    return Question(
        kind="logits", release=folder / "r", model=folder / "m", canaries=folder / "canaries.json"
    )


@pytest.fixture
def planted(tmp_path: Path) -> Question:
    (tmp_path / "canaries.json").write_text("{}")
    return _question(tmp_path)


@pytest.mark.parametrize(
    ("release", "recall", "passes"),
    [(NOTHING, NOTHING, True), (NOTHING, ALL, False), (ALL, NOTHING, False), (ALL, ALL, False)],
)
def test_either_way_of_telling_blocks(release: Exposure, recall: Exposure, passes: bool) -> None:
    assert verdict(BLOCK, {RELEASE: release, RECALL: recall}).passed is passes


def test_each_limit_is_the_policy_s_own() -> None:
    found = {RELEASE: ALL, RECALL: ALL}
    loose = {"auc_max": 1.0, "tpr_max": 1.0, "recall_tpr_max": 1.0}
    assert verdict(GateRules(canaries="block", **loose), found).passed
    for name in loose:
        default = GateRules.model_fields[name].default
        assert not verdict(GateRules(**{**loose, name: default}), found).passed, name


def test_few_records_pass_and_are_said_to_be_too_few(
    planted: Question, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    few = _exposure(0, planted=8)
    monkeypatch.setattr(canary_gate, "measure", lambda _: {RELEASE: few})
    with caplog.at_level(logging.WARNING):
        assert check(BLOCK, planted) == {RELEASE: few}
    assert "too few records to be sure" in caplog.text


def test_the_submitter_hears_that_it_did_not_pass_and_no_figure(
    planted: Question, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(canary_gate, "measure", lambda _: {RECALL: ALL})
    with pytest.raises(PolicyRefusalError, match="canary gate") as refusal:
        check(BLOCK, planted)
    assert not any(character.isdigit() for character in str(refusal.value))
    assert "1.000" in refusal.value.here
    assert "lower `steps`" in refusal.value.here  # what the institution may do about it
    assert check(GateRules(canaries="warn"), planted) == {RECALL: ALL}


def test_an_expert_that_never_read_a_canary_cannot_pass_for_clean(tmp_path: Path) -> None:
    with pytest.raises(PolicyRefusalError) as refusal:
        check(BLOCK, _question(tmp_path))
    assert "canaries = true" in refusal.value.here
    assert check(GateRules(canaries="warn"), _question(tmp_path)) == {}


def test_a_measurement_that_breaks_lets_nothing_out(
    planted: Question, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(canary_gate.sys, "executable", "/bin/false")
    with pytest.raises(RuntimeError, match="nothing leaves"):
        check(BLOCK, planted)


def test_where_the_gate_is_off_nothing_is_measured(tmp_path: Path) -> None:
    assert check(GateRules(), _question(tmp_path)) == {}


def test_the_guard_keeps_nothing_of_a_release_that_did_not_pass(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Question] = []

    def measure(question: Question) -> dict[str, Exposure]:
        asked.append(question)
        return {RECALL: ALL}

    monkeypatch.setattr(canary_gate, "measure", measure)
    house.policy()
    with (house.home / "policy.toml").open("a") as file:
        file.write('[gates]\ncanaries = "block"\n')
    (house.home / "data" / canaries.FILE).parent.mkdir()
    (house.home / "data" / canaries.FILE).write_text("{}")
    with pytest.raises(PolicyRefusalError, match="canary gate"):
        house.release(house.guard(), house.entry())
    assert house.sealed == []
    assert (asked[0].kind, asked[0].model) == ("logits", house.home / "model")
    monkeypatch.setattr(canary_gate, "measure", lambda _: {RECALL: NOTHING})
    assert house.release(house.guard(), house.entry()).path.exists()


def test_an_expert_of_a_participant_that_wants_them_reads_the_records(tmp_path: Path) -> None:
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text((json.dumps({"text": "the knee was seen " * 20}) + "\n") * 40)
    model = ModelConfig(architecture="llama", hidden_size=32, layers=1, heads=2, vocab_size=300)
    sizes = []
    for file in (None, tmp_path / "canaries.json"):
        expert = Expert(tmp_path / f"expert-{file is None}", corpus, model, file)
        expert.pretrain(
            TrainingConfig(steps=1, batch_size=1, seq_len=16),
            on_progress=lambda _: None,
            should_stop=lambda: False,
        )
        sizes.append(len(np.load(tmp_path / f"expert-{file is None}" / "tokens.npy")))
    assert sizes[1] > sizes[0]


def test_what_was_measured_is_shown_to_the_approver_signed_and_outlives_a_restart(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    house.policy("manual")
    with (house.home / "policy.toml").open("a", encoding="utf-8") as file:
        file.write('[gates]\ncanaries = "block"\n')
    (house.home / "data" / canaries.FILE).parent.mkdir(parents=True)
    (house.home / "data" / canaries.FILE).write_text("{}", encoding="utf-8")
    monkeypatch.setattr(canary_gate, "measure", lambda _: {RELEASE: NOTHING, RECALL: NOTHING})
    entry, guard = house.entry(), house.guard()
    with pytest.raises(AwaitingApprovalError) as caught:
        house.release(guard, entry)
    shown = caught.value.release
    assert shown.gates == verdict(BLOCK, {RELEASE: NOTHING, RECALL: NOTHING}).words
    decision = guard.approvals.decide(shown, approved=True, by="grace")
    public = load_public(house.home / "approver.pub")
    assert verify(Approval, decision.signed, public).gates == shown.gates
    again = house.guard()
    assert house.release(again, entry).made.gates == shown.gates
    # Figures that nobody saw are not what was approved.
    better = shown.model_copy(update={"gates": "auc 0.500"})
    assert again.approvals.decision(better) is None
