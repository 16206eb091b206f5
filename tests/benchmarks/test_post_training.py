"""The benchmark of post-training runs whole, on a model and steps small enough for a test."""

import argparse
import re
from pathlib import Path

import pytest
import torch

from benchmarks import post_training, post_training_tasks
from fusion.models import ModelSpec, build_model, save_model, train_tokenizer

SAMPLE = post_training_tasks.choices("choice", 0)


def test_choice_questions_hold_their_answer_among_four_options() -> None:
    names = {code: set[str]() for code in (q.asked.split("?")[0] for q in SAMPLE.trained)}
    for q in [*SAMPLE.trained, *SAMPLE.held_out]:
        code, told = q.asked.split("? ")
        assert re.findall("= ([A-Z])", told) == ["A", "B", "C", "D"]
        assert f"{q.right}," in f"{told},"
        assert SAMPLE.score(f"It is {q.right}.", q) == 1
        names[code].add(q.right.split(" = ")[0])
    assert all(len(one) == 1 for one in names.values()), "a code has one name"


def test_bf16_reads_the_weights_as_they_are_after_every_step() -> None:
    layer, x = torch.nn.Linear(4, 4), torch.ones(1, 4)
    with post_training.in_bf16():
        before = layer(x).detach().clone()
        layer(x).sum().backward()
        torch.optim.SGD(layer.parameters(), lr=1.0).step()
        assert not torch.equal(layer(x), before), "autocast kept the weights of the first step"


def test_the_rise_is_that_of_each_seed_over_its_own_beginning() -> None:
    runs = [{"sft": 0.1, "fp8": 0.3}, {"sft": 0.5, "fp8": 0.9}]
    assert post_training._rise(runs, "fp8", "sft") == pytest.approx((0.3, 0.1))
    assert post_training._rise(runs[:1], "fp8", "sft") is None, "one seed has no error"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_every_figure_comes_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = train_tokenizer([q.asked for q in SAMPLE.trained], 400)
    spec = ModelSpec(
        architecture="llama", hidden_size=32, layers=1, heads=2, vocab_size=len(tokenizer)
    )
    save_model(build_model(spec, 0), tokenizer, tmp_path / "model")
    monkeypatch.setattr(post_training, "smollm2", lambda _cache: tmp_path / "model")
    found = post_training.measure(
        argparse.Namespace(
            tasks=["spell_backward"],
            seeds=1,
            sft_steps=2,
            rl_steps=1,
            cache=tmp_path,
            work=tmp_path / "work",
            smollm2_steps=2,
        )
    )
    assert set(found["grpo"]["spell_backward"]) == {"sft", "sft_longer", "fp8", "bf16"}
    assert found["logprob_gap_max"] < 1e-3
    assert found["tokens_per_s"] > 0
    assert abs(found["sft_gap_pct"]) < 5
