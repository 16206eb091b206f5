"""A preference round of real processes: experts judge public pairs, the pivot learns from it."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from cofuse.demo.federation import Federation, ParticipantPlan
from cofuse.demo.material import base_job, write_texts
from cofuse.demo.result import DemoPlan
from cofuse.demo.settings import TINY
from cofuse.evals import Evals
from cofuse.sdk import Pivot, Round
from participant.budget import FILE, Ledger
from participant.egress import releases
from protos.spec import load_spec

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
HOSPITALS = TINY.hospitals[:3]
EXAMPLE = Path(__file__).parents[2] / "examples" / "pairs-preference.yaml"
POLICY = """version = 2
[[allow]]
purpose = "*"
submitters = ["*"]
kinds = ["{kind}", "scores"]
prompt_sets = ["*"]
approval = "auto"
"""


@dataclass
class Story:
    work: Path
    final: Round
    pivot: Pivot
    pairs: int


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Story]:
    out = tmp_path_factory.mktemp("preference")
    work = out / "federation"
    work.mkdir()
    plan = DemoPlan(out=out, settings=TINY, hospitals=HOSPITALS, rounds=(), seed=3, source="sample")
    with Federation(work, lambda _who, _message: None) as federation:
        federation.init()
        federation.start_coordinator()
        write_texts(plan, work)
        rows = _write_pairs(work / "public")
        federation.run("pivot-0", "cofuse.demo.base_pivot", [str(base_job(plan, work))])
        for hospital in HOSPITALS:
            federation.start_participant(
                ParticipantPlan(
                    name=hospital.name,
                    corpus=work / "text" / hospital.name / "private.jsonl",
                    model=hospital.model,
                    training=TINY.expert_training,
                    policy={},
                )
            )
            # The last one has agreed to logits, and so to no judgement of answers.
            kind = "logits" if hospital is HOSPITALS[-1] else "pairs"
            (work / hospital.name / "policy.toml").write_text(POLICY.format(kind=kind))
        federation.wait("pivot-0")
        with federation.connect("operator") as operator:
            operator.import_pivot("pivot-0", work / "pivot-0")
        spec = load_spec(EXAMPLE)
        training = spec.training.model_copy(update={"steps": 8, "warmup_steps": 2})
        names = tuple(hospital.name for hospital in HOSPITALS)
        spec = spec.model_copy(update={"participants": names, "quorum": 2, "training": training})
        with federation.connect("researcher") as researcher:
            final = researcher.wait(researcher.submit(spec, folder=work / "public"), timeout_s=800)
            assert final.state == "PUBLISHED", final.detail
            yield Story(work, final, researcher.pivot(final.pivot_name), rows)


def _write_pairs(public: Path) -> int:
    """Each question of the evaluation set as a pair: the right option against the next one."""
    evals = json.loads((public / "evals.json").read_text())["domains"]
    rows = [
        {
            "prompt": question["prompt"],
            "chosen": " " + question["options"][question["answer"]],
            "rejected": " " + question["options"][question["answer"] - 1],
            "domain": name,
        }
        for name, domain in evals.items()
        for question in domain["questions"]
    ]
    lines = [*map(json.dumps, rows), "{broken"]
    (public / "pairs.jsonl").write_text("\n".join(lines))
    return len(rows)


def test_the_pivot_is_measured_on_pairs_that_nobody_learned_from(story: Story) -> None:
    evals = story.pivot.evals
    judges = [hospital.name for hospital in HOSPITALS[:2]]
    experts = [f"expert:{name}" for name in sorted(judges)]
    assert list(evals["preference"]) == ["base", "dpo", *experts, "preference"]
    assert set(evals["bpb"]) >= {"base", "dpo", "preference"}
    assert evals["pairs"]["learned"] + sum(evals["pairs"]["held_out"].values()) == story.pairs
    assert evals["pairs"]["skipped"] == {"no JSON": 1}
    assert set(evals["credit"]["judgement"]) == set(judges)
    assert "held-out pairs whose chosen answer it prefers" in Evals.of(evals).table()


def test_a_policy_that_does_not_name_pairs_lets_none_out(story: Story) -> None:
    parts = {part.participant: part for part in story.final.contributions}
    refusing = HOSPITALS[-1].name
    assert parts.pop(refusing).status == "refused"
    assert {part.status for part in parts.values()} == {"committed"}
    left = releases(story.work / refusing / "data")
    assert {one.what for one in left if one.allowed} == {"report"}


def test_what_left_is_small_and_is_in_the_budget_and_on_the_chain(story: Story) -> None:
    for hospital in HOSPITALS[:2]:
        data = story.work / hospital.name / "data"
        part = next(p for p in story.final.contributions if p.participant == hospital.name)
        left = [one for one in releases(data) if one.what == "pairs"]
        assert sum(one.size_bytes for one in left) == part.size_bytes
        assert part.size_bytes < 8_000  # sealed: an envelope of some kilobytes, 40 bytes a pair
        asked = Ledger(data / FILE).question(story.final.round_id)
        assert asked is not None
        assert asked.kind == "pairs"
        assert asked.positions > 2 * story.pairs
