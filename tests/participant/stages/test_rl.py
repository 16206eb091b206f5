"""Rollouts agree with the trainer, and a stage learns what pays, whatever else it meets."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from fp8.convert import convert_to_float8_training, revert_to_float
from fp8.train import Progress, TrainResult
from fusion.models import ModelSpec, build_model, train_tokenizer
from participant.config import RlStage, SftStage
from participant.stages import rl, rollout, sft
from participant.stages.conversations import Chat, ChatError, Skipped
from participant.stages.rewards import REWARDS
from participant.stages.rollout import Answer, Draw, answer_all, laid_out, logprobs_of
from participant.stages.steady import steady_attention

LETTERS, RIGHT = "ABCD", "B"
QUESTIONS = [f"case {i}{i}" for i in range(12)]


def lines(path: Path, *, answered: bool) -> Path:
    """Each question with every letter as an answer; or with the one that is right."""
    found: list[dict[str, Any]] = []
    for question in QUESTIONS:
        asked = {"role": "user", "content": question}
        if answered:
            found += [
                {"messages": [asked, {"role": "assistant", "content": letter}]}
                for letter in LETTERS
            ]
        else:
            found.append({"messages": [asked], "answer": RIGHT})
    path.write_text("\n".join(map(json.dumps, found)))
    return path


def new_model() -> tuple[PreTrainedModel, Chat]:
    chat = Chat(train_tokenizer([f"User: {q}\nAssistant: A" for q in QUESTIONS] * 3, 280))
    spec = ModelSpec(
        architecture="llama",
        hidden_size=32,
        layers=1,
        heads=2,
        vocab_size=len(chat.tokenizer),
        context=48,
    )
    model = build_model(spec, 0)
    convert_to_float8_training(model)
    return model, chat


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """Weights of a model that answers with any letter."""
    model, chat = new_model()
    data = lines(tmp_path_factory.mktemp("sft") / "chats", answered=True)
    stage = SftStage(kind="sft", data=data, steps=30, lr=2e-2, batch_size=4, seq_len=32, held_out=0)
    sft.finetune(model, chat, stage)
    return model.state_dict()


@pytest.fixture
def model(tuned: dict[str, torch.Tensor]) -> tuple[PreTrainedModel, Chat]:
    net, chat = new_model()
    net.load_state_dict(tuned)
    return net, chat


def stage(folder: Path, **given: Any) -> RlStage:
    settings: dict[str, Any] = {
        "data": lines(folder / "tasks", answered=False),
        "steps": 6,
        "lr": 3e-3,
        "rewards": {"letter": 1.0},
        "prompts": 4,
        "samples": 8,
        "max_new_tokens": 6,
        "held_out": 0,
    }
    return RlStage(kind="rl", **{**settings, **given})


def run(
    model: tuple[PreTrainedModel, Chat], asked: RlStage, folder: Path | None = None, **hooks: Any
) -> tuple[TrainResult, list[Progress]]:
    told: list[Progress] = []
    result = rl.reinforce(*model, asked, checkpoint_dir=folder, on_progress=told.append, **hooks)
    return result, told


# --- rollouts -----------------------------------------------------------------------------------


def drawn(model: tuple[PreTrainedModel, Chat], **given: Any) -> list[Answer]:
    net, chat = model
    prompts = [chat.prompt([{"role": "user", "content": q + " x" * (i % 3)}])
               for i, q in enumerate(QUESTIONS)]  # fmt: skip
    draw = Draw(max_new_tokens=12, temperature=1.3, ends=frozenset(chat.end_ids))
    return answer_all(net, prompts, replace(draw, **given), [7])


def test_what_the_rollout_drew_with_is_what_the_trainer_computes(
    model: tuple[PreTrainedModel, Chat],
) -> None:
    with steady_attention(model[0]):
        answers = drawn(model)
        assert len({len(a.prompt) + len(a.ids) for a in answers}) > 3
        trainer = logprobs_of(model[0], *laid_out(answers), 1.3)
    rolled = torch.tensor([p for a in answers for p in a.logprobs])
    assert trainer.requires_grad
    assert (trainer - rolled).abs().max() < 1e-5


def test_batches_and_padding_change_nothing(model: tuple[PreTrainedModel, Chat]) -> None:
    with steady_attention(model[0]):
        together = drawn(model)
        for other in (drawn(model, batch_size=5), drawn(model, batch_size=1)):
            assert [a.ids for a in other] == [a.ids for a in together]
            for one, two in zip(together, other, strict=True):
                mine, theirs = torch.tensor(one.logprobs), torch.tensor(two.logprobs)
                assert torch.allclose(mine, theirs, atol=1e-5)
        whole = logprobs_of(model[0], *laid_out(together), 1.3)
        alone = torch.cat([logprobs_of(model[0], *laid_out([a]), 1.3) for a in together])
    assert (whole - alone).abs().max() < 1e-5


def test_steady_attention_is_the_models_own_and_leaves_it_as_it_was(
    model: tuple[PreTrainedModel, Chat],
) -> None:
    net = model[0]
    convert = revert_to_float(net)  # no codes whose edges a last bit could cross
    ids = torch.arange(40).reshape(2, 20)
    padded = torch.ones_like(ids)
    padded[0, :5] = 0
    for mask in (None, padded):
        wanted = net(input_ids=ids, attention_mask=mask).logits
        with steady_attention(net):
            found = net(input_ids=ids, attention_mask=mask).logits
        seen = slice(None) if mask is None else padded.bool()
        assert (found - wanted)[seen].abs().max() < 1e-4
        assert not torch.equal(found, wanted)
    assert convert
    assert net.config._attn_implementation == "sdpa"


def test_a_large_vocabulary_goes_through_the_head_in_chunks(
    model: tuple[PreTrainedModel, Chat], monkeypatch: pytest.MonkeyPatch
) -> None:
    net, batch = model[0], laid_out(drawn(model))

    def found(**how: Any) -> tuple[torch.Tensor, torch.Tensor]:
        net.zero_grad()
        logprobs = logprobs_of(net, *batch, 0.7, **how)
        logprobs.square().mean().backward()
        grad = net.get_input_embeddings().weight.grad
        assert isinstance(grad, torch.Tensor)
        return logprobs.detach(), grad.clone()

    wanted = found()
    monkeypatch.setattr(rollout, "LARGE_VOCABULARY", 10)
    for mine, other in zip(found(chunk_tokens=5), wanted, strict=True):
        assert torch.allclose(mine, other, rtol=1e-3, atol=1e-5)


# --- the stage ----------------------------------------------------------------------------------


def test_reward_rises_from_chance_to_nearly_all_in_fp8(
    model: tuple[PreTrainedModel, Chat], tmp_path: Path
) -> None:
    asked = stage(tmp_path, steps=14, lr=2e-3, held_out=0.3)
    _, told = run(model, asked)
    assert told[0].metrics["reward"] < 0.5
    assert told[-1].metrics["reward"] > 0.75
    assert all(p.metrics["gap"] < 1e-3 for p in told)
    assert rl.measure(*model, asked) == {"reward": 1.0, "skipped": 0.0}


def test_a_stage_cut_in_the_middle_of_a_rollout_ends_as_one_that_was_not(
    tuned: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    asked = stage(tmp_path, updates=3, kl=0.05, checkpoint_every=4, steps=7, prompts=2)
    weights = []
    for name, stops in (("whole", (99,)), ("cut", (2, 5, 99))):
        for stop in stops:
            model, chat = new_model()
            model.load_state_dict(tuned)
            told: list[Progress] = []
            result = rl.reinforce(
                model, chat, asked, checkpoint_dir=tmp_path / name, on_progress=told.append,
                should_stop=lambda told=told, stop=stop: bool(told) and told[-1].step >= stop,
            )  # fmt: skip
        assert result.finished
        weights.append(model.state_dict())
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert told[-1].metrics["kl"] > 0
    assert told[-1].metrics["clipped"] >= 0


@pytest.mark.parametrize(
    ("broken", "share"),
    [
        (lambda _said, _right: 1.0, {"alike": 1.0, "failed": 0.0}),
        (lambda _said, _right: 1 / 0, {"alike": 1.0, "failed": 1.0}),
    ],
)
def test_groups_that_say_nothing_move_nothing_and_are_counted(
    broken: Callable[[str, str], float],
    share: dict[str, float],
    model: tuple[PreTrainedModel, Chat],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(REWARDS, "broken", broken)
    before = {name: value.clone() for name, value in model[0].state_dict().items()}
    asked = stage(
        tmp_path, rewards={"broken": 1.0}, steps=11, accumulate=2, prompts=1, samples=4, redraws=0
    )
    result, told = run(model, asked)
    assert (result.finished, result.skipped_steps) == (True, 0)
    after = model[0].state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    answers = 1 - told[0].metrics["cut"]
    assert told[0].metrics["alike"] == share["alike"]
    assert told[0].metrics["failed"] == pytest.approx(share["failed"] * answers)


@pytest.mark.parametrize("cut", ["skip", "wrong"])
def test_answers_cut_by_their_limit_are_counted_and_followed_only_if_they_are_wrong(
    cut: str, model: tuple[PreTrainedModel, Chat], tmp_path: Path
) -> None:
    # Answers of one token: each either ends at once, which is worth something here, or is cut.
    asked = stage(tmp_path, max_new_tokens=1, steps=1, cut=cut, temperature=4.0)
    REWARDS["ended"] = lambda _said, _right: 1.0
    try:
        _, told = run(model, asked.model_copy(update={"rewards": {"ended": 1.0}}))
    finally:
        del REWARDS["ended"]
    assert 0.8 < told[0].metrics["cut"] < 1.0
    assert (told[0].metrics["grad_norm"] > 0) == (cut == "wrong")


def test_tasks_that_cannot_be_used_are_skipped_by_reason(
    model: tuple[PreTrainedModel, Chat], tmp_path: Path
) -> None:
    asked = stage(tmp_path)
    user = {"role": "user", "content": "x"}
    for line in (
        {"messages": [user]},
        {"messages": [user], "answer": 3},
        {"messages": [user, {"role": "assistant", "content": "y"}], "answer": "A"},
        {"messages": [{"role": "user", "content": "x" * 60}], "answer": "A"},
        [],
    ):
        with asked.data.open("a") as file:
            file.write("\n" + json.dumps(line))
    found = rl.read_tasks(*model, asked)
    assert len(found.trained) == len(QUESTIONS)
    assert found.skipped == Skipped(
        found.skipped.counts, {"no answer": 13, "too long": 16, "no messages": 17}
    )
    assert dict(found.skipped.counts) == {"no answer": 3, "too long": 1, "no messages": 1}
    with pytest.raises(ChatError, match=r"found the rewards \['beauty'\], wanted some of"):
        rl.read_tasks(*model, asked.model_copy(update={"rewards": {"beauty": 1.0}}))
