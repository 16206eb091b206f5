"""What fine-tuning and reinforcement learning in FP8 give, against the same in bf16.

    python benchmarks/post_training.py [--seeds 3] [--rl-steps 60] [--cache DIR] [--json]

GRPO: a tiny model is fine-tuned in FP8 on some answers to procedural tasks (reasoning-gym, by its
own scorers) and to choice questions of an institution's own facts, then reinforced in FP8 and in
bf16, from the same weights and with the same seeds. grpo: mean reward of the likeliest answers to
tasks that were never trained on (choice: to the facts that were; they cannot be guessed), over the
seeds; by_seed has them one by one. sft_gap_pct: SmolLM2-135M fine-tuned in FP8 and bf16 at equal
steps: the loss on held-out answers, FP8 over bf16, in per cent. logprob_gap_max: the largest
difference in nats between a token's log-probability at an FP8 rollout and in the FP8 trainer.
tokens_per_s: the tiny model in FP8, 64 answers at once. Without --cache SmolLM2 is left out.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

# Run as a script, this file's own folder comes first on the path.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from transformers import PreTrainedModel

from fp8.convert import convert_to_float8_training, revert_to_float
from fp8.train import Progress
from fusion.models import ModelSpec, build_model, load_model, train_tokenizer
from participant.config import RlStage, SftStage
from participant.stages import rl, sft
from participant.stages.conversations import Chat
from participant.stages.rewards import REWARDS, letter
from participant.stages.rollout import Draw, answer_all

ROOT: Final = Path(__file__).resolve().parents[1]
GYM: Final[dict[str, dict[str, Any]]] = {
    "chain_sum": {"max_terms": 3, "max_digits": 1},
    "spell_backward": {"max_word_len": 4},
    "letter_counting": {"min_words": 1, "max_words": 2},
}
"""reasoning-gym's data sets, made as small as the model."""


@dataclass(frozen=True, slots=True)
class Question:
    """A task with its answer."""

    asked: str
    right: str


@dataclass(frozen=True, slots=True)
class Family:
    """Tasks of one kind, and how an answer to one of them is scored."""

    trained: list[Question]
    held_out: list[Question]
    score: Callable[[str, Question], float]


def gym(name: str, seed: int, size: int = 900) -> Family:
    """Tasks of a reasoning-gym data set; those met again under held-out names are dropped."""
    import reasoning_gym

    data = reasoning_gym.create_dataset(name, size=size, seed=seed, **GYM[name])
    entries = {entry["question"]: entry for entry in data}
    questions = [Question(asked, entry["answer"]) for asked, entry in entries.items()]
    keep = min(100, len(questions) // 5)
    return Family(
        questions[keep:],
        questions[:keep],
        lambda said, q: float(data.score_answer(said.strip(), entries[q.asked])),
    )


def choices(_name: str, seed: int, facts: int = 24) -> Family:
    """Which name belongs to a code, of four; each fact is asked with its options in many orders."""
    sample = json.loads((ROOT / "tests" / "data" / "icd_sample.json").read_text(encoding="utf-8"))
    rng, codes = random.Random(seed), sample["codes"]
    picked = rng.sample(codes, facts)
    questions = []
    for _ in range(12):
        for code in picked:
            options = [code, *rng.sample([c for c in picked if c is not code], 3)]
            rng.shuffle(options)
            lines = [f"{x}) {option['name']}" for x, option in zip("ABCD", options, strict=True)]
            right = "ABCD"[options.index(code)]
            questions.append(Question(f"{code['code']}? " + " ".join(lines), right))
    return Family(questions[2 * facts :], questions[: 2 * facts], lambda s, q: letter(s, q.right))


FAMILIES: Final[dict[str, Callable[[str, int], Family]]] = {
    **dict.fromkeys(GYM, gym),
    "choice": choices,
}


class Bench:
    """One family of tasks on disk, with a tokenizer of its own."""

    def __init__(self, name: str, seed: int, folder: Path) -> None:
        self.family, self.seed = FAMILIES[name](name, seed), seed
        everything = [*self.family.trained, *self.family.held_out]
        self.by_place = dict(enumerate(everything))
        texts = [f"User: {q.asked}\nAssistant: {q.right}" for q in everything]
        self.chat = Chat(train_tokenizer(texts, 320))
        self.paths = {
            "sft": self._write(folder / "sft", self.family.trained, tasks=False),
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
            hidden_size=128,
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
            lr=1e-3,
            warmup_steps=5,
            seed=self.seed,
            rewards={"bench": 1.0},
            prompts=12,
            samples=8,
            max_new_tokens=16,
            cut="wrong",
            held_out=0,
            checkpoint_every=10**6,
        )

    def reward(self, model: PreTrainedModel) -> float:
        """Mean reward of the likeliest answers to the held-out tasks."""
        stage = self.rl_stage(1).model_copy(update={"data": self.paths["eval"]})
        tasks = rl.read_tasks(model, self.chat, stage).trained
        draw = Draw(max_new_tokens=16, temperature=0.0, ends=frozenset(self.chat.end_ids))
        said = answer_all(model, [task.prompt for task in tasks], draw, [0])
        scores = [
            REWARDS["bench"](self.chat.decode(a.ids), t.right)
            for a, t in zip(said, tasks, strict=True)
        ]
        return float(np.mean(scores))


def in_bf16() -> AbstractContextManager[Any]:
    """Linear layers and attention in bf16, weights and optimizer in fp32."""
    return torch.autocast("cpu", torch.bfloat16)


def grpo(name: str, seed: int, steps: tuple[int, int], folder: Path) -> dict[str, float]:
    """Reward after fine-tuning, and after reinforcement in FP8 and in bf16 from there."""
    bench, (sft_steps, rl_steps) = Bench(name, seed, folder), steps
    start = bench.model()
    stage = SftStage(
        kind="sft", data=bench.paths["sft"], steps=sft_steps, lr=2e-3, warmup_steps=10,
        decay_steps=sft_steps // 2, batch_size=4, seq_len=256, seed=seed, held_out=0,
    )  # fmt: skip
    sft.finetune(start, bench.chat, stage)
    found = {"sft": bench.reward(start)}
    gaps: list[float] = []

    def told(progress: Progress) -> None:
        gaps.append(progress.metrics.get("gap", 0.0))

    for arm, precision in (("fp8", nullcontext), ("bf16", in_bf16)):
        model = copy.deepcopy(start)
        if arm == "bf16":
            revert_to_float(model)
        with precision():
            hear = told if arm == "fp8" else None
            rl.reinforce(model, bench.chat, bench.rl_stage(rl_steps), on_progress=hear)
            found[arm] = bench.reward(model)
    return {**found, "gap": max(gaps), "tokens_per_s": speed(start, bench)}


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

    data, questions = folder / "chats", choices("choice", 0, facts=40)
    with data.open("w", encoding="utf-8") as file:
        for q in [*questions.trained, *questions.held_out]:
            names = dict(part.split(") ", 1) for part in _options(q.asked))
            told = f"{q.right}, {names[q.right]}."
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


def _options(asked: str) -> Iterator[str]:
    marks = [asked.index(f"{x}) ") for x in "ABCD"]
    for start, stop in zip(marks, [*marks[1:], len(asked)], strict=True):
        yield asked[start:stop].strip()


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """All figures."""
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in args.tasks}
    for name in args.tasks:
        for seed in range(args.seeds):
            with tempfile.TemporaryDirectory() as folder:
                runs[name].append(grpo(name, seed, (args.sft_steps, args.rl_steps), Path(folder)))
            sys.stderr.write(f"{name} seed {seed}: {runs[name][-1]}\n")
    arms = ("sft", "fp8", "bf16")
    every = [run for some in runs.values() for run in some]
    result: dict[str, Any] = {
        "grpo": {n: {a: float(np.mean([r[a] for r in some])) for a in arms}
                 for n, some in runs.items() if some},
        "by_seed": {n: [{a: run[a] for a in arms} for run in some] for n, some in runs.items()},
        "logprob_gap_max": max((run["gap"] for run in every), default=None),
        "tokens_per_s": float(np.median([run["tokens_per_s"] for run in every])) if every else None,
        "sft_gap_pct": None,
    }  # fmt: skip
    if args.cache is not None:
        with tempfile.TemporaryDirectory() as folder:
            result["sft"] = losses = sft_gap(args.cache, args.smollm2_steps, Path(folder))
        result["sft_gap_pct"] = 100 * (losses["fp8"] / losses["bf16"] - 1)
    return result


def main() -> None:
    """Measure, and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--tasks", nargs="*", default=list(FAMILIES), choices=list(FAMILIES))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--sft-steps", type=int, default=120)
    parser.add_argument("--rl-steps", type=int, default=60)
    parser.add_argument("--smollm2-steps", type=int, default=16)
    parser.add_argument("--cache", type=Path, help="where SmolLM2 is unpacked; without: left out")
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
