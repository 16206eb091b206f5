"""What fine-tuning and reinforcement learning in FP8 give, against the same in bf16.

    python benchmarks/post_training.py [--seeds 3] [--rl-steps 120] [--cache DIR] [--json]

GRPO: a tiny model is fine-tuned in FP8 on some tasks with their answers, then reinforced in FP8 and
in bf16 from the same weights and with the same seeds (benchmarks/post_training_grpo.py); sft_longer
is the control, fine-tuned for as many steps more. grpo: mean reward of answers drawn to held-out
tasks at temperature 1, which is what reinforcement raises, over the seeds; greedy: of the likeliest
answers; by_seed has both one by one. paired: mean and standard error over seeds of the rise from
fine-tuning and from the control. sft_gap_pct: SmolLM2-135M fine-tuned in FP8 and bf16 on medical
definitions at equal steps: the loss on held-out answers, FP8 over bf16, in per cent, each read in
its own precision; sft_learned_gap_pct: both read in bf16, which leaves what training itself lost.
logprob_gap_max: the largest difference in nats between a token's log-probability at an FP8 rollout
and in the FP8 trainer. tokens_per_s: the tiny model in FP8, 64 answers at once. cpu_s: of all runs.
Without --cache SmolLM2 is left out. --work keeps finished runs by task, seed and steps, and goes on
there.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Final

# Run as a script, this file's own folder comes first on the path.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

from benchmarks.fusion_real_models import smollm2
from benchmarks.post_training_grpo import ARMS, conversation, grpo, in_bf16
from benchmarks.post_training_tasks import FAMILIES, definitions
from fp8.convert import convert_to_float8_training, revert_to_float
from fp8.train import Progress
from fusion.models import load_model
from participant.config import SftStage
from participant.stages import sft
from participant.stages.conversations import Chat

_DEFINITIONS: Final = 640


def kept(work: Path | None, name: str, run: Callable[[], dict[str, float]]) -> dict[str, float]:
    """What a run found, from the folder `work` if it was done there before."""
    path = work and work / f"{name}.json"
    if path and path.exists():
        found: dict[str, float] = json.loads(path.read_text(encoding="utf-8"))
        return found
    found = run()
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(found), encoding="utf-8")
    return found


def fine_tuned(cache: Path, arm: str, steps: int) -> dict[str, float]:
    """Loss on held-out answers of SmolLM2 before and after it is fine-tuned on definitions.

    Args: arm: "fp8" or "bf16", which is the precision of the linear layers; the rest is in bf16.
    """
    model, tokenizer = load_model(smollm2(cache))
    chat = Chat(tokenizer)
    if arm == "fp8":
        convert_to_float8_training(model)
    with tempfile.TemporaryDirectory() as folder, in_bf16():
        data = Path(folder) / "chats"
        data.write_text(
            "".join(conversation(q.asked, q.right) for q in definitions(_DEFINITIONS)),
            encoding="utf-8",
        )
        stage = SftStage(
            kind="sft", data=data, steps=steps, lr=1e-4, warmup_steps=5, decay_steps=steps // 3,
            batch_size=1, seq_len=256, held_out=0.1,
        )  # fmt: skip
        held_out = sft.read_examples(chat, stage).held_out
        before = sft.answer_loss(model, held_out, chat.end_id)
        sys.stderr.write(f"smollm2 {arm}, before: {before}\n")
        sft.finetune(model, chat, stage, on_progress=_tell)
        found = {"before": before, "after": sft.answer_loss(model, held_out, chat.end_id)}
        revert_to_float(model)
        return {**found, "in_bf16": sft.answer_loss(model, held_out, chat.end_id)}


def _tell(progress: Progress) -> None:
    sys.stderr.write(f"step {progress.step} of {progress.steps}: {progress.loss:.4f}\n")


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """All figures."""
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in args.tasks}
    steps = (args.sft_steps, args.rl_steps)
    # Seed by seed: what there is after some time is whole for all tasks.
    for seed, name in itertools.product(range(args.seeds), args.tasks):
        run = partial(grpo, name, seed, steps)
        runs[name].append(kept(args.work, f"{name}-{seed}-{steps[0] or 'own'}-{steps[1]}", run))
        sys.stderr.write(f"{name} seed {seed}: {runs[name][-1]}\n")
    every = [run for some in runs.values() for run in some]
    result: dict[str, Any] = {
        "grpo": {n: {a: _mean(some, a) for a in ARMS} for n, some in runs.items() if some},
        "greedy": {
            n: {a: _mean(some, f"{a}_greedy") for a in ARMS} for n, some in runs.items() if some
        },
        "paired": {
            n: {a: {b: _rise(some, a, b) for b in ARMS[:2]} for a in ARMS[2:]}
            for n, some in runs.items()
        },
        "by_seed": runs,
        "logprob_gap_max": max((run["gap"] for run in every), default=None),
        "tokens_per_s": float(np.median([run["tokens_per_s"] for run in every])) if every else None,
        "cpu_s": sum(run["cpu_s"] for run in every),
        "sft_gap_pct": None,
        "sft_learned_gap_pct": None,
    }
    if args.cache is not None:
        result["sft"] = {
            arm: kept(
                args.work,
                f"smollm2-{arm}-{args.smollm2_steps}",
                partial(fine_tuned, args.cache, arm, args.smollm2_steps),
            )
            for arm in ("bf16", "fp8")
        }
        fp8, bf16 = result["sft"]["fp8"], result["sft"]["bf16"]
        result["sft_gap_pct"] = 100 * (fp8["after"] / bf16["after"] - 1)
        result["sft_learned_gap_pct"] = 100 * (fp8["in_bf16"] / bf16["after"] - 1)
    return result


def _mean(runs: list[dict[str, float]], key: str) -> float:
    return float(np.mean([run[key] for run in runs]))


def _rise(runs: list[dict[str, float]], arm: str, over: str) -> tuple[float, float] | None:
    """Mean over seeds of what an arm has above another, and its standard error."""
    rises = [run[arm] - run[over] for run in runs]
    if len(rises) < 2:
        return None
    return float(np.mean(rises)), float(np.std(rises, ddof=1) / len(rises) ** 0.5)


def main() -> None:
    """Measure, and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--tasks", nargs="*", default=list(FAMILIES), choices=list(FAMILIES))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--sft-steps", type=int, help="without: those of each family")
    parser.add_argument("--rl-steps", type=int, default=120)
    parser.add_argument("--smollm2-steps", type=int, default=120)
    parser.add_argument("--cache", type=Path, help="where SmolLM2 is unpacked; without: left out")
    parser.add_argument("--work", type=Path, help="where finished runs are kept")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    result = measure(args)
    for name, found in result["grpo"].items():
        print(f"{name:16} " + "  ".join(f"{arm} {value:.3f}" for arm, value in found.items()))
    for name in ("logprob_gap_max", "tokens_per_s", "cpu_s", "sft_gap_pct", "sft_learned_gap_pct"):
        print(f"{name:20} {result[name]}")
    if args.json:
        print(json.dumps(result))


if __name__ == "__main__":
    main()
