"""What fine-tuning and reinforcement learning in FP8 give, against the same in bf16.

    python benchmarks/post_training.py [--seeds 3] [--rl-steps 60] [--cache DIR] [--json]

GRPO: a tiny model is fine-tuned in FP8 on some tasks with their answers, then reinforced in FP8 and
in bf16 from the same weights and with the same seeds (benchmarks/post_training_tasks.py). grpo:
mean reward of answers drawn to held-out tasks at temperature 1, which is what reinforcement raises,
over the seeds; greedy: of the likeliest answers; by_seed has both one by one. paired: mean and
standard error over seeds of the rise from fine-tuning. sft_gap_pct: SmolLM2-135M fine-tuned in FP8
and bf16 at equal steps: the loss on held-out answers, FP8 over bf16, in per cent. logprob_gap_max:
the largest difference in nats between a token's log-probability at an FP8 rollout and in the FP8
trainer. tokens_per_s: the tiny model in FP8, 64 answers at once. cpu_s: of all runs. Without
--cache SmolLM2 is left out. --work keeps finished runs by task, seed and steps, and goes on there.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import tempfile
import time
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Final

# Run as a script, this file's own folder comes first on the path.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from transformers import PreTrainedModel

from benchmarks.post_training_tasks import FAMILIES, TEMPLATE, Question, choices, options_of
from fp8.convert import convert_to_float8_training, revert_to_float
from fp8.train import Progress
from fusion.models import ModelSpec, build_model, load_model, train_tokenizer
from participant.config import RlStage, SftStage
from participant.stages import rl, sft
from participant.stages.conversations import Chat
from participant.stages.rewards import REWARDS
from participant.stages.rollout import Draw, answer_all

_DRAWS: Final = 4
"""Answers drawn to each held-out task; the reward is their mean."""


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
                line: dict[str, Any] = {"messages": [user], "answer": str(places[q.asked])}
                if not tasks:
                    line = {"messages": [user, {"role": "assistant", "content": q.right}]}
                file.write(json.dumps(line) + "\n")
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

    def rl_stage(self, steps: int) -> RlStage:
        """How it is reinforced."""
        return RlStage(
            kind="rl",
            data=self.paths["rl"],
            steps=steps,
            lr=5e-4,
            warmup_steps=5,
            seed=self.seed,
            rewards={"bench": 1.0},
            prompts=8,
            samples=8,
            max_new_tokens=8,
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


def grpo(name: str, seed: int, steps: tuple[int | None, int], folder: Path) -> dict[str, float]:
    """Reward after fine-tuning, and after reinforcement in FP8 and in bf16 from there."""
    began, bench = time.process_time(), Bench(name, seed, folder)
    sft_steps, rl_steps = steps[0] or bench.family.sft_steps, steps[1]
    start = bench.model()
    stage = SftStage(
        kind="sft", data=bench.paths["sft"], steps=sft_steps, lr=3e-3, warmup_steps=5,
        batch_size=4, seq_len=128, seed=seed, held_out=0,
    )  # fmt: skip
    sft.finetune(start, bench.chat, stage)
    found, gaps = _rewards("sft", start, bench), list[float]()

    def told(progress: Progress) -> None:
        gaps.append(progress.metrics.get("gap", 0.0))

    for arm, precision in (("fp8", nullcontext), ("bf16", in_bf16)):
        model = copy.deepcopy(start)
        if arm == "bf16":
            revert_to_float(model)
        with precision():
            hear = told if arm == "fp8" else None
            rl.reinforce(model, bench.chat, bench.rl_stage(rl_steps), on_progress=hear)
            found |= _rewards(arm, model, bench)
    found |= {"gap": max(gaps), "tokens_per_s": speed(start, bench)}
    return {**found, "cpu_s": time.process_time() - began}


def _rewards(arm: str, model: PreTrainedModel, bench: Bench) -> dict[str, float]:
    found = {arm: bench.reward(model), f"{arm}_greedy": bench.reward(model, greedy=True)}
    sys.stderr.write(f"{found}\n")
    return found


def kept(name: str, seed: int, args: argparse.Namespace) -> dict[str, float]:
    """One run of `grpo`, from args.work if it was done there before."""
    steps = (args.sft_steps, args.rl_steps)
    path = args.work and args.work / f"{name}-{seed}-{steps[0] or 'own'}-{steps[1]}.json"
    if path and path.exists():
        found: dict[str, float] = json.loads(path.read_text(encoding="utf-8"))
        return found
    with tempfile.TemporaryDirectory() as folder:
        found = grpo(name, seed, steps, Path(folder))
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(found), encoding="utf-8")
    return found


def speed(model: PreTrainedModel, bench: Bench) -> float:
    """Tokens written in a second, 64 answers at once."""
    tasks = rl.read_tasks(model, bench.chat, bench.rl_stage(1)).trained
    prompts = [tasks[i % len(tasks)].prompt for i in range(64)]
    draw = Draw(max_new_tokens=64, temperature=1.0, ends=frozenset())
    began = time.perf_counter()
    answers = answer_all(model, prompts, draw, [1])
    return sum(len(a.ids) for a in answers) / (time.perf_counter() - began)


def sft_gap(cache: Path, steps: int, folder: Path) -> dict[str, float]:
    """Loss on held-out answers of SmolLM2 after fine-tuning in FP8 and in bf16."""
    from benchmarks.fusion_real_models import smollm2

    data, questions = folder / "chats", choices("choice", 0, facts=40, longest=999)
    with data.open("w", encoding="utf-8") as file:
        for q in questions.trained[:480]:
            told = f"{q.right}, {options_of(q.asked)[q.right]}."
            pair = [("user", q.asked), ("assistant", told)]
            messages = [{"role": role, "content": text} for role, text in pair]
            file.write(json.dumps({"messages": messages}) + "\n")
    losses = {}
    for arm in ("fp8", "bf16"):
        model, tokenizer = load_model(smollm2(cache))
        chat = Chat(tokenizer)
        if arm == "fp8":
            convert_to_float8_training(model)
        stage = SftStage(
            kind="sft", data=data, steps=steps, lr=1e-4, warmup_steps=2, batch_size=1, seq_len=256,
            held_out=0.05,
        )  # fmt: skip
        with in_bf16():
            held_out = sft.read_examples(chat, stage).held_out
            losses[f"{arm}_before"] = sft.answer_loss(model, held_out, chat.end_id)
            sft.finetune(model, chat, stage)
            losses[arm] = sft.answer_loss(model, held_out, chat.end_id)
        sys.stderr.write(f"smollm2 {arm}: {losses}\n")
    return losses


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """All figures."""
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in args.tasks}
    # Seed by seed: what there is after some time is whole for all tasks.
    for seed in range(args.seeds):
        for name in args.tasks:
            runs[name].append(kept(name, seed, args))
            sys.stderr.write(f"{name} seed {seed}: {runs[name][-1]}\n")
    arms, every = ("sft", "fp8", "bf16"), [run for some in runs.values() for run in some]
    result: dict[str, Any] = {
        "grpo": {n: {a: _mean(some, a) for a in arms} for n, some in runs.items() if some},
        "greedy": {
            n: {a: _mean(some, f"{a}_greedy") for a in arms} for n, some in runs.items() if some
        },
        "paired": {n: {a: _rise(some, a) for a in arms[1:]} for n, some in runs.items()},
        "by_seed": runs,
        "logprob_gap_max": max((run["gap"] for run in every), default=None),
        "tokens_per_s": float(np.median([run["tokens_per_s"] for run in every])) if every else None,
        "cpu_s": sum(run["cpu_s"] for run in every),
        "sft_gap_pct": None,
    }
    if args.cache is not None:
        with tempfile.TemporaryDirectory() as folder:
            result["sft"] = losses = sft_gap(args.cache, args.smollm2_steps, Path(folder))
        result["sft_gap_pct"] = 100 * (losses["fp8"] / losses["bf16"] - 1)
    return result


def _mean(runs: list[dict[str, float]], key: str) -> float:
    return float(np.mean([run[key] for run in runs]))


def _rise(runs: list[dict[str, float]], arm: str) -> tuple[float, float] | None:
    """Mean over seeds of what an arm has above fine-tuning, and its standard error."""
    rises = [run[arm] - run["sft"] for run in runs]
    if len(rises) < 2:
        return None
    return float(np.mean(rises)), float(np.std(rises, ddof=1) / len(rises) ** 0.5)


def main() -> None:
    """Measure, and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--tasks", nargs="*", default=list(FAMILIES), choices=list(FAMILIES))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--sft-steps", type=int, help="without: those of each family")
    parser.add_argument("--rl-steps", type=int, default=60)
    parser.add_argument("--smollm2-steps", type=int, default=16)
    parser.add_argument("--cache", type=Path, help="where SmolLM2 is unpacked; without: left out")
    parser.add_argument("--work", type=Path, help="where finished runs are kept")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    result = measure(args)
    if args.json:
        print(json.dumps(result, indent=2))
        return
    for name, found in result["grpo"].items():
        print(f"{name:16} " + "  ".join(f"{arm} {value:.3f}" for arm, value in found.items()))
    print({k: v for k, v in result.items() if k not in ("grpo", "by_seed")})


if __name__ == "__main__":
    main()
