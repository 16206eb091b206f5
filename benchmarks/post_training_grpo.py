"""Fine-tuning and reinforcement of a tiny model on one family of tasks, in FP8 and in bf16.

What benchmarks/post_training.py runs for each family and seed.
"""

from __future__ import annotations

import copy
import json
import sys
import tempfile
import time
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from transformers import PreTrainedModel

from benchmarks.post_training_tasks import FAMILIES, TEMPLATE, Question
from fp8.convert import convert_to_float8_training, revert_to_float
from fp8.train import Progress
from fusion.models import ModelSpec, build_model, train_tokenizer
from participant.config import RlStage, SftStage
from participant.stages import rl, sft
from participant.stages.conversations import Chat
from participant.stages.rewards import REWARDS
from participant.stages.rollout import Draw, answer_all

ARMS: Final = ("sft", "sft_longer", "fp8", "bf16")
"""Fine-tuned; for as many steps more; reinforced from there in FP8, and in bf16."""
_DRAWS: Final = 4
"""Answers drawn to each held-out task; the reward is their mean."""


def conversation(asked: str, said: str) -> str:
    """A question and its answer, as a line of a stage's data."""
    messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]
    return json.dumps({"messages": messages}) + "\n"


class Bench:
    """One family of tasks on disk, with a tokenizer of its own."""

    def __init__(self, name: str, seed: int, folder: Path) -> None:
        self.family, self.seed = FAMILIES[name](name, seed), seed
        everything = [*self.family.trained, *self.family.held_out]
        self.by_place = dict(enumerate(everything))
        texts = [f"{q.asked}>{q.right}" for q in everything]
        self.chat = Chat(train_tokenizer(texts, self.family.vocabulary), TEMPLATE)
        self.paths = {
            "sft": self._write(folder / "sft", self.family.shown, tasks=False),
            "rl": self._write(folder / "rl", self.family.trained, tasks=True),
            "eval": self._write(folder / "eval", self.family.held_out, tasks=True),
        }
        REWARDS["bench"] = lambda said, place: self.family.score(said, self.by_place[int(place)])

    def _write(self, path: Path, questions: list[Question], *, tasks: bool) -> Path:
        places = {q.asked: place for place, q in self.by_place.items()}
        with path.open("w", encoding="utf-8") as file:
            for q in questions:
                user = {"role": "user", "content": q.asked}
                task = {"messages": [user], "answer": str(places[q.asked])}
                line = json.dumps(task) + "\n"
                file.write(line if tasks else conversation(q.asked, q.right))
        return path

    def model(self) -> PreTrainedModel:
        """A new one, in FP8."""
        spec = ModelSpec(
            architecture="llama",
            hidden_size=64,
            layers=2,
            heads=4,
            vocab_size=len(self.chat.tokenizer),
        )
        model = build_model(spec, self.seed)
        convert_to_float8_training(model)
        return model

    def sft_stage(self, steps: int, *, seed: int | None = None) -> SftStage:
        """How it is fine-tuned; the seed orders the examples."""
        return SftStage(
            kind="sft",
            data=self.paths["sft"],
            steps=steps,
            lr=3e-3,
            warmup_steps=5,
            batch_size=16,
            seq_len=128,
            seed=self.seed if seed is None else seed,
            held_out=0,
        )

    def rl_stage(self, steps: int) -> RlStage:
        """How it is reinforced."""
        return RlStage(
            kind="rl",
            data=self.paths["rl"],
            steps=steps,
            lr=2e-4,
            warmup_steps=5,
            seed=self.seed,
            rewards={"bench": 1.0},
            prompts=16,
            samples=8,
            max_new_tokens=self.family.max_new_tokens,
            redraws=1,
            cut="wrong",
            held_out=0,
            checkpoint_every=10**6,
        )

    def reward(self, model: PreTrainedModel, *, greedy: bool = False) -> float:
        """Mean reward of answers to the held-out tasks: of some drawn, or of the likeliest."""
        stage = self.rl_stage(1).model_copy(update={"data": self.paths["eval"]})
        tasks = rl.read_tasks(model, self.chat, stage).trained * (1 if greedy else _DRAWS)
        draw = Draw(
            max_new_tokens=stage.max_new_tokens,
            temperature=0.0 if greedy else 1.0,
            ends=frozenset(self.chat.end_ids),
        )
        said = answer_all(model, [task.prompt for task in tasks], draw, [0])
        scores = [
            0.0 if a.cut else REWARDS["bench"](self.chat.decode(a.ids), t.right)
            for a, t in zip(said, tasks, strict=True)
        ]
        return float(np.mean(scores))


def in_bf16() -> AbstractContextManager[Any]:
    """Linear layers and attention in bf16, weights and optimizer in fp32.

    Without autocast's cache: it keeps the bf16 weights of the first step until the end.
    """
    return torch.autocast("cpu", torch.bfloat16, cache_enabled=False)


def grpo(name: str, seed: int, steps: tuple[int | None, int]) -> dict[str, float]:
    """Reward after fine-tuning, and from there: reinforced in FP8, in bf16, or fine-tuned on."""
    began, gaps = time.process_time(), list[float]()

    def tell(progress: Progress) -> None:
        gaps.append(progress.metrics.get("gap", 0.0))

    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(name, seed, Path(folder))
        sft_steps, rl_steps = steps[0] or bench.family.sft_steps, steps[1]
        start = bench.model()
        sft.finetune(start, bench.chat, bench.sft_stage(sft_steps))
        found = _rewards("sft", start, bench)
        for arm, precision in (("fp8", nullcontext), ("bf16", in_bf16)):
            model = copy.deepcopy(start)
            if arm == "bf16":
                revert_to_float(model)
            with precision():
                hear = tell if arm == "fp8" else None
                rl.reinforce(model, bench.chat, bench.rl_stage(rl_steps), on_progress=hear)
                found |= _rewards(arm, model, bench)
        model = copy.deepcopy(start)
        sft.finetune(model, bench.chat, bench.sft_stage(rl_steps, seed=seed + 1000))
        found |= _rewards("sft_longer", model, bench)
        found |= {"gap": max(gaps), "tokens_per_s": speed(start, bench)}
    return {**found, "cpu_s": time.process_time() - began}


def speed(model: PreTrainedModel, bench: Bench) -> float:
    """Tokens written in a second, 64 answers at once."""
    tasks = rl.read_tasks(model, bench.chat, bench.rl_stage(1)).trained
    prompts = [tasks[i % len(tasks)].prompt for i in range(64)]
    draw = Draw(max_new_tokens=64, temperature=1.0, ends=frozenset())
    began = time.perf_counter()
    answers = answer_all(model, prompts, draw, [1])
    return sum(len(a.ids) for a in answers) / (time.perf_counter() - began)


def _rewards(arm: str, model: PreTrainedModel, bench: Bench) -> dict[str, float]:
    found = {arm: bench.reward(model), f"{arm}_greedy": bench.reward(model, greedy=True)}
    sys.stderr.write(f"{found}\n")
    return found
