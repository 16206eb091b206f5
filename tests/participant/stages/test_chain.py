"""Stages one after the other: each from the last one's model, each done once, each measured."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import pytest
import torch

from fp8.linear import Float8Linear
from fp8.train import Progress
from fusion.models import ModelSpec, build_model, load_model
from participant.canaries import open_canaries
from participant.canary_stats import exposure
from participant.config import (
    ModelConfig,
    Precision,
    RlStage,
    SftStage,
    Stage,
    StartConfig,
    TrainingConfig,
    load_config,
)
from participant.policy import GateRules
from participant.stages import StageError, chain, sft
from participant.stages.chain import develop, name_of
from participant.stages.conversations import Chat, ChatError
from participant.stages.cpt import Expert, set_precision
from participant.stages.stage_gate import StageGate, gate_of

FACTS = {"I63.9": "cerebral infarction", "M00.0": "arthritis", "E11.9": "diabetes", "J18": "lung"}
TRAINING = TrainingConfig(steps=4, batch_size=2, seq_len=32, lr=1e-2, warmup_steps=1)


def conversations(path: Path, *broken: str) -> Path:
    lines = [
        json.dumps(
            {
                "messages": [
                    {"role": "user", "content": f"{i}. What is {code}?"},
                    {"role": "assistant", "content": meaning},
                ]
            }
        )
        for i in range(8)
        for code, meaning in FACTS.items()
    ]
    path.write_text("\n".join([*lines, *broken]))
    return path


class Home:
    """An expert's folder with a little text, and what training told."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        text = "".join(f"{code} is {meaning}. " for code, meaning in FACTS.items())
        (folder / "corpus").write_text(json.dumps({"text": text * 8}))
        self.data = conversations(folder / "chats", "{", '{"messages": []}')
        self.model = ModelConfig(
            architecture="llama", hidden_size=32, layers=1, heads=2, vocab_size=300
        )
        self.told: list[Progress] = []

    @property
    def expert(self) -> Expert:
        return Expert(self.folder / "expert", self.folder / "corpus", self.model)

    def stage(self, **given: Any) -> SftStage:
        settings = {"steps": 4, "lr": 1e-2, "batch_size": 1, "seq_len": 64, "held_out": 0.2}
        return SftStage(kind="sft", **{"data": self.data, **settings, **given})

    def develop(
        self, *stages: Stage, stop_after: int = 10**6, gate: StageGate | None = None
    ) -> bool:
        self.told = []
        return develop(
            self.expert,
            TRAINING,
            stages,
            on_progress=self.told.append,
            should_stop=lambda: len(self.told) >= stop_after,
            gate=gate,
        ).finished


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: p.detach() for name, p in load_model(folder)[0].named_parameters()}


def same(one: Path, other: Path) -> bool:
    mine, theirs = weights(one), weights(other)
    return all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_a_chain_cut_at_every_third_step_ends_as_one_that_was_not(tmp_path: Path) -> None:
    homes = []
    for name in ("whole", "cut"):
        (tmp_path / name).mkdir()
        homes.append(Home(tmp_path / name))
    whole, cut = homes
    stages = [(home.stage(), home.stage(seed=1, lr=5e-3)) for home in homes]
    assert whole.develop(*stages[0])
    while not cut.develop(*stages[1], stop_after=3):
        assert not cut.expert.ready  # only a finished chain makes an expert
    assert same(whole.expert.directory, cut.expert.directory)
    assert not same(whole.expert.directory, whole.expert.stages / "1-sft" / "model")


def test_only_what_changed_is_done_again(tmp_path: Path) -> None:
    home = Home(tmp_path)
    first, second = home.stage(), home.stage(seed=1)
    assert home.develop(first, second)
    assert len(home.told) == TRAINING.steps + 8
    assert home.expert.facts().stages == name_of([first, second])
    home.develop(first, second)
    assert not home.told
    home.develop(first, home.stage(seed=2))
    assert len(home.told) == 4
    conversations(home.data)
    assert home.expert.facts().stages != name_of([first, home.stage(seed=2)])
    home.develop(first, home.stage(seed=2))
    assert len(home.told) == 8
    version = home.expert.facts().version
    home.develop()  # the stages are taken out of the settings: pre-training alone is the expert
    assert (home.told, home.expert.facts().stages) == ([], "")
    assert home.expert.facts().version == version + 1
    assert same(home.expert.directory, home.expert.stages / "0-cpt" / "model")


def test_every_stage_is_measured_on_every_stages_held_out_lines(tmp_path: Path) -> None:
    home = Home(tmp_path)
    tasks = tmp_path / "tasks"
    asked = [{"role": "user", "content": f"{i}. What is J18?"} for i in range(8)]
    tasks.write_text("\n".join(json.dumps({"messages": [m], "answer": "lung"}) for m in asked))
    reinforced = RlStage(
        kind="rl", data=tasks, steps=2, lr=1e-4, rewards={"exact": 1.0}, prompts=1, samples=2,
        max_new_tokens=3, held_out=0.4, redraws=0,
    )  # fmt: skip
    assert home.develop(home.stage(steps=20), reinforced)
    table = json.loads((home.expert.stages / chain.EVALS).read_text())
    assert list(table) == ["0-cpt", "1-sft", "2-rl"]
    losses = [row["1-sft answer_loss"] for row in table.values()]
    assert losses[1] < losses[0] - 0.5
    assert all(0 <= row["2-rl reward"] <= 1 for row in table.values())
    assert all(row["1-sft skipped"] == 2 for row in table.values())
    lines = (home.expert.stages / "2-rl" / chain.PROGRESS).read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2]
    assert {"reward", "cut", "failed", "alike"} <= json.loads(lines[0]).keys()


def test_an_expert_may_begin_as_a_model_that_is_there_already(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    for folder in (first, second):
        folder.mkdir()
    old, _ = Home(first), Home(second)
    old.develop(old.stage(steps=1))
    start = StartConfig(folder=old.expert.directory)
    expert = Expert(second / "expert", second / "corpus", start)
    seen: list[Progress] = []
    training = TRAINING.model_copy(update={"lr": 1e-9, "steps": 1})
    develop(expert, training, [], on_progress=seen.append, should_stop=lambda: False)
    before, after = weights(start.folder), weights(expert.directory)
    assert all(torch.allclose(before[name], after[name], atol=1e-6) for name in before)
    assert load_model(expert.directory)[1].chat_template


def test_the_finished_expert_knows_its_template_and_where_answers_end(tmp_path: Path) -> None:
    home = Home(tmp_path)
    template = tmp_path / "t.jinja"
    template.write_text(
        "{% for m in messages %}{{ m.role }}>{{ m.content }}{{ eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}assistant>{% endif %}"
    )
    home.develop(home.stage(template=template))
    model, tokenizer = load_model(home.expert.directory)
    assert tokenizer.chat_template == template.read_text()
    assert model.generation_config is not None
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id


def test_fine_tuning_runs_in_fp8_and_counts_what_it_skips(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    home = Home(tmp_path)
    home.develop(home.stage(steps=1))
    assert "skipped 1 not JSON (first in line 33), 1 no messages (first in line 34)" in caplog.text
    assert "infarction" not in caplog.text
    model, chat = chain.opened(home.expert.directory, home.stage())
    assert any(isinstance(module, Float8Linear) for module in model.modules())
    found = sft.read_examples(chat, home.stage())
    assert dict(found.skipped.counts) == {"not JSON": 1, "no messages": 1}
    held = {tuple(e.ids) for e in found.held_out}
    assert held
    assert not held & {tuple(e.ids) for e in found.trained}


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"seq_len": 16}, "found no conversation to train on"),
        ({"seq_len": 512}, "found seq_len 512, wanted at most 256"),
        ({"data": Path("/nowhere")}, "there is no such file"),
    ],
)
def test_a_stage_that_cannot_run_says_what_to_change(
    tmp_path: Path, settings: dict[str, Any], words: str
) -> None:
    home = Home(tmp_path)
    home.develop(home.stage(steps=1))
    model, tokenizer = load_model(home.expert.directory)
    with pytest.raises(ChatError, match=words):
        sft.finetune(model, Chat(tokenizer), home.stage(**settings))


def test_a_stage_that_cannot_go_on_is_named_with_what_to_do(tmp_path: Path) -> None:
    home = Home(tmp_path)
    long = home.stage(steps=30, checkpoint_every=1)
    assert not home.develop(long, stop_after=TRAINING.steps + 3)
    (state,) = (home.expert.stages / "1-sft" / "checkpoint").glob("*-3/state.json")
    for path in (home.expert.stages / "1-sft" / "checkpoint").glob("*/state.json"):
        path.write_text("{")
    with pytest.raises(StageError, match=rf"stage 1-sft: .*{state}.* delete {state.parent}"):
        home.develop(long)
    with pytest.warns(RuntimeWarning), pytest.raises(StageError, match=r"stage 1-sft: .*lower lr"):
        home.develop(home.stage(steps=30, lr=1e30))
    assert home.develop(home.stage(steps=1)), "other settings are the way out"


TOML = """
name = "a"
coordinator = "localhost:1"
corpus = "corpus"
data_dir = "data"
policy = "policy.toml"
[model]
architecture = "llama"
hidden_size = 32
layers = 1
heads = 1
vocab_size = 300
[tls]
ca = "ca"
certificate = "c"
key = "k"
"""
STAGES = """
[[stage]]
kind = "cpt"
steps = 7
[[stage]]
kind = "sft"
data = "chats.jsonl"
template = "t.jinja"
steps = 3
lr = 1e-4
"""


def test_stages_stand_in_participant_toml_in_their_order(tmp_path: Path) -> None:
    path = tmp_path / "participant.toml"
    path.write_text(TOML + STAGES)
    config = load_config(path)
    assert config.training == TrainingConfig(steps=7)
    assert [(s.kind, s.data, s.template) for s in config.stage] == [
        ("sft", tmp_path / "chats.jsonl", tmp_path / "t.jinja")
    ]
    start = (
        TOML.partition("[model]")[0] + '[model]\nfolder = "m"\n[tls]' + TOML.partition("[tls]")[2]
    )
    path.write_text(start + STAGES)
    assert load_config(path).model == StartConfig(folder=tmp_path / "m")
    path.write_text(TOML + "[training]\nsteps = 7\n" + STAGES)
    with pytest.raises(ValueError, match=r"found \[training\] and a stage of kind"):
        load_config(path)


def planted(folder: Path, action: Literal["block", "warn", "off"], limit: float) -> StageGate:
    secret = json.dumps({"secret": "07" * 32, "pairs": 6})
    (folder / "canaries.json").write_text(secret)
    return StageGate(folder / "canaries.json", GateRules(canaries=action, recall_tpr_max=limit))


def recited(home: Home, gate: StageGate) -> SftStage:
    """A stage that teaches the planted records by heart, twice as long as it takes."""
    records = open_canaries(gate.canaries)
    assert records is not None
    turns = [
        [{"role": "user", "content": "?"}, {"role": "assistant", "content": text}]
        for text in records.planted
    ]
    (home.folder / "by-heart").write_text(
        "\n".join(json.dumps({"messages": turn}) for turn in turns)
    )
    return home.stage(data=home.folder / "by-heart", steps=60, batch_size=2, seq_len=256,
                      held_out=0.0)  # fmt: skip


@pytest.mark.slow
def test_a_stage_that_teaches_planted_records_by_heart_is_found_out(tmp_path: Path) -> None:
    home = Home(tmp_path)
    blocking = planted(tmp_path, "block", 0.2)
    assert home.develop(home.stage(), recited(home, blocking), gate=blocking)
    table = json.loads((home.expert.stages / chain.EVALS).read_text())
    assert table["1-sft"]["canaries"]["tpr"] < 0.2 < table["2-sft"]["canaries"]["tpr_low"]
    assert same(home.expert.directory, home.expert.stages / "1-sft" / "model")


def test_a_stage_that_makes_the_expert_recite_is_not_taken_where_the_policy_blocks(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    unread = np.arange(100.0)

    def measured(model: Path, _: Path) -> dict[str, float]:
        known = unread[-20:] + 1000 * model.is_relative_to(home.expert.stages / "2-sft")
        return asdict(exposure(known - 20, unread))

    monkeypatch.setattr(chain, "recall_of", measured)
    home = Home(tmp_path)
    blocking = planted(tmp_path, "block", 0.2)
    stages = [home.stage(steps=1, seed=seed) for seed in range(3)]
    assert home.develop(*stages, gate=blocking)
    table = json.loads((home.expert.stages / chain.EVALS).read_text())
    assert list(table) == ["0-cpt", "1-sft", "2-sft"]  # the third was never begun
    assert same(home.expert.directory, home.expert.stages / "1-sft" / "model")
    assert "stage 2-sft is not taken" in caplog.text
    assert home.expert.facts().stages == name_of(stages)  # nothing is due, so nothing repeats
    assert home.develop(*stages[:2], gate=planted(tmp_path, "warn", 0.2))
    assert same(home.expert.directory, home.expert.stages / "2-sft" / "model")


def test_a_gate_without_records_or_switched_off_measures_nothing(tmp_path: Path) -> None:
    home = Home(tmp_path)
    off = planted(tmp_path, "off", 0.0)
    assert home.develop(home.stage(), gate=off)
    nothing = StageGate(tmp_path / "nowhere", GateRules(canaries="block", recall_tpr_max=0.0))
    assert home.develop(home.stage(), gate=nothing)
    assert same(home.expert.directory, home.expert.stages / "1-sft" / "model")
    assert "canaries" not in (home.expert.stages / chain.EVALS).read_text()


def test_an_unreadable_policy_warns_and_lets_training_go_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert gate_of(tmp_path / "policy.toml", None) is None
    gate = gate_of(tmp_path / "policy.toml", tmp_path / "canaries.json")
    assert gate is not None
    assert gate.rules == GateRules(canaries="warn")
    assert "only warns" in caplog.text
    (tmp_path / "policy.toml").write_text('version = 2\n[gates]\ncanaries = "block"\n')
    strict = gate_of(tmp_path / "policy.toml", tmp_path / "canaries.json")
    assert strict is not None
    assert strict.rules.canaries == "block"


def test_a_stage_runs_in_the_precision_it_names() -> None:
    spec = ModelSpec(
        architecture="llama", hidden_size=32, layers=2, heads=2, vocab_size=64, context=32
    )
    recipes = {}
    for precision in get_args(Precision):
        model = build_model(spec, 0)
        set_precision(model, precision)
        found = [m.recipe.name for m in model.modules() if isinstance(m, Float8Linear)]
        recipes[precision] = (set(found), len(found))
    block = (next(iter(recipes["fp8"][0])), 14)
    # The recipe's default leaves the last 15 % of the blocks in high precision: here one of two.
    assert recipes == {"fp32": (set(), 0), "fp8": ({block[0]}, 14), "nvfp4": ({"nvfp4"}, 7)}
