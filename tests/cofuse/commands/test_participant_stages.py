"""Broken data of stages, from participant.toml to what its owner reads: skipped, counted, said."""

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from cofuse.cli import app
from participant.config import load_config
from participant.corpus import CorpusError
from participant.stages.cpt import Expert
from participant.stages.rewards import REWARDS
from participant.training import Training

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
heads = 2
vocab_size = 300
context = 64
[training]
steps = 2
batch_size = 2
seq_len = 32
[[stage]]
kind = "sft"
data = "chats"
steps = 2
lr = 1e-3
batch_size = 1
seq_len = 63
held_out = 0
[[stage]]
kind = "rl"
data = "tasks"
steps = 3
lr = 1e-4
prompts = 2
samples = 4
max_new_tokens = 4
redraws = 0
held_out = 0
rewards = { odd = 1.0 }
[tls]
ca = "ca"
certificate = "c"
key = "k"
"""
ASKED = {"role": "user", "content": "J18?"}


def answered(text: str) -> dict[str, Any]:
    return {"messages": [ASKED, {"role": "assistant", "content": text}]}


@pytest.fixture
def home(tmp_path: Path) -> Path:
    chats: list[Any] = [answered("lung")] * 3 + [answered("qzjx" * 40), [], {"messages": [ASKED]}]
    chats.append({"messages": [{"role": "robot", "content": "x"}]})
    tasks: list[Any] = [{"messages": [ASKED], "answer": "lung"}] * 3 + [{"messages": [ASKED]}]
    for name, rows in (("chats", chats), ("tasks", tasks)):
        lines = [json.dumps(row) for row in rows]
        (tmp_path / name).write_text("\n".join([*lines, "{broken", ""]))
    (tmp_path / "corpus").write_text(json.dumps({"text": "J18 is lung. " * 40}))
    (tmp_path / "policy.toml").write_text("version = 2\n[gates]\n")
    (tmp_path / "participant.toml").write_text(TOML)
    return tmp_path


def told(home: Path, status: int = 0) -> dict[str, Any]:
    done = CliRunner().invoke(app, ["participant", "stages", str(home), "--json"])
    assert done.exit_code == status, done.output
    data: dict[str, Any] = json.loads(done.stdout)["data"]
    return data


def trained(home: Path) -> bool:
    config = load_config(home / "participant.toml")
    expert = Expert(config.data_dir / "expert", config.corpus, config.model)
    return (
        Training(config, expert).run(on_progress=lambda _: None, should_stop=lambda: False).finished
    )


def test_what_is_broken_is_skipped_counted_and_told_from_the_settings_to_the_command(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    worth = iter([1 / 3, float("nan"), "raise"] * 1000)

    def odd(_said: str, _right: str) -> float:
        value = next(worth)
        if isinstance(value, str):
            raise ZeroDivisionError(value)
        return value

    monkeypatch.setitem(REWARDS, "odd", odd)
    before = told(home)
    assert [row["skipped"] for row in before["stages"]] == [
        {"no messages": 1, "no answer": 1, "unknown role": 1, "not JSON": 1},
        {"no answer": 1, "not JSON": 1},
    ]
    assert before["stages"][0]["first_line"]["not JSON"] == 8
    assert [row["usable"] for row in before["stages"]] == [4, 3]
    assert (before["evals"], before["stages"][0]["last"]) == ({}, {})
    assert trained(home)
    after = told(home)
    # The answer that is too long is known to the tokenizer alone.
    assert after["evals"]["1-sft"]["1-sft skipped"] == 5
    last = after["stages"][1]["last"]
    assert last["step"] == 3
    assert last["alike"] == 1.0  # every reward that is one is the same: nothing to follow
    assert last["failed"] > 0 or last["cut"] == 1.0
    words = CliRunner().invoke(app, ["participant", "stages", str(home)]).stdout
    assert "1-sft: 4 usable lines in chats, skips " in words
    assert "2-rl: 3 usable lines in tasks" in words
    assert "at step 3 of 3" in words
    assert "after 2-rl: " in words
    assert "lung" not in words


def test_a_stage_that_cannot_run_is_said_before_it_does_and_stops_with_the_same_words(
    home: Path,
) -> None:
    found = told(home, status=1)["stages"]  # no reward is called odd
    assert found[0]["problem"] == ""
    assert found[1]["problem"].startswith("found the rewards ['odd'], wanted some of")
    (home / "chats").write_text("[]\n")
    assert "found no line to train on" in told(home, status=1)["stages"][0]["problem"]
    (home / "chats").unlink()
    assert "there is no such file" in told(home, status=1)["stages"][0]["problem"]
    with pytest.raises(CorpusError, match="there is no such file"):
        trained(home)
