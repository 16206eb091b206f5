"""What a participant's stages give in fp32, FP8 and NVFP4: the same chain, the same data and seeds.

    python benchmarks/stage_precision.py [--seeds 3] [--steps 200 120 20] [--json]

A small expert goes through pre-training, fine-tuning and reinforcement as participant.toml would
have it, by the participant's own code, once in each precision. bpb: held-out text after
pre-training; answer_loss: held-out answers after fine-tuning, in nats; reward: after reinforcement,
of the likeliest answers to held-out tasks. All are measured in the precision that the stage trained
in, but bpb, which is measured in fp32. gap: the arm over fp32, in per cent (reward: difference).
bits: what a value of a weight, an input and a gradient takes in the GEMMs, scales included;
fp32 stands for bf16 there, whose GEMMs a machine would use. seconds: CPU time of the whole chain,
where every format below bf16 is emulated, so it says nothing of hardware that has NVFP4.
"""

import argparse
import json
import logging
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Final

# Run as a script, this file's own folder comes first on the path.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch

from fp8.formats import E2M1
from fp8.recipe import NVFP4, BlockScaling, QuantSpec
from fusion.evaluate import bits_per_byte
from fusion.models import load_model
from participant.config import ModelConfig, Precision, RlStage, SftStage, TrainingConfig
from participant.stages.chain import EVALS, develop
from participant.stages.cpt import Expert

ARMS: Final[tuple[Precision, ...]] = ("fp32", "fp8", "nvfp4")
SAMPLE: Final = Path(__file__).resolve().parents[1] / "tests" / "data" / "icd_sample.json"
MODEL: Final = ModelConfig(
    architecture="llama", hidden_size=64, layers=4, heads=4, vocab_size=512, context=128
)
MEASURES: Final = ("bpb", "answer_loss", "reward")
_WORDINGS: Final = ("Code {code} is {name}.", "{name} is coded as {code}.", "Dx: {name} ({code}).")
_HELD_OUT: Final = 10
"""One code in so many is never trained on."""


def write_data(folder: Path) -> list[str]:
    """Corpus, conversations and tasks of the sample's codes; return the held-out documents."""
    codes = json.loads(SAMPLE.read_text(encoding="utf-8"))["codes"]
    told, held_out = [], []
    for number, code in enumerate(codes):
        texts = [wording.format(**code) for wording in _WORDINGS]
        (told if number % _HELD_OUT else held_out).extend(texts)
    _write(folder / "corpus", [{"text": text} for text in told])
    asked = [
        ({"role": "user", "content": f"Category of {code['code']}?"}, code["code"].split(".")[0])
        for code in codes
    ]
    answered = [[user, {"role": "assistant", "content": right}] for user, right in asked]
    _write(folder / "chats", [{"messages": turns} for turns in answered])
    _write(folder / "tasks", [{"messages": [user], "answer": right} for user, right in asked])
    return held_out


def run(arm: Precision, seed: int, steps: tuple[int, int, int]) -> dict[str, float]:
    """One chain: its figures."""
    began_s = time.process_time()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        held_out = write_data(folder)
        common: dict[str, Any] = {"seed": seed, "precision": arm}
        training = TrainingConfig(
            steps=steps[0], batch_size=8, seq_len=64, decay_steps=steps[0] // 3, **common
        )
        stages = (
            SftStage(
                kind="sft", data=folder / "chats", steps=steps[1], lr=3e-3, warmup_steps=5,
                decay_steps=steps[1] // 3, batch_size=4, seq_len=64, held_out=0.2, **common
            ),
            RlStage(
                kind="rl", data=folder / "tasks", steps=steps[2], lr=2e-4, prompts=8, samples=8,
                max_new_tokens=12, rewards={"exact": 1.0}, cut="wrong", held_out=0.2, **common
            ),
        )  # fmt: skip
        expert = Expert(folder / "expert", folder / "corpus", MODEL)
        develop(expert, training, stages, on_progress=lambda _: None, should_stop=lambda: False)
        table = json.loads((expert.stages / EVALS).read_text(encoding="utf-8"))
        return {
            "bpb": bits_per_byte(*load_model(expert.stages / "0-cpt" / "model"), held_out),
            "answer_loss": table["1-sft"]["1-sft answer_loss"],
            "reward": table["2-rl"]["2-rl reward"],
            "reward_before": table["1-sft"]["2-rl reward"],
            "seconds": time.process_time() - began_s,
        }


def bits(spec: QuantSpec) -> float:
    """Bits a value: its code, and its share of a scale of eight bits."""
    rows, columns = (size or 128 for size in spec.block)
    return (4 if spec.format is E2M1 else 8) + 8 / (rows * columns)


def summary(runs: dict[str, list[dict[str, float]]]) -> dict[str, Any]:
    """Means, gaps to fp32 seed by seed, and bits."""
    found: dict[str, Any] = {}
    for arm, rows in runs.items():
        means = {key: float(np.mean([row[key] for row in rows])) for key in rows[0]}
        pairs = list(zip(rows, runs["fp32"], strict=True))
        gaps = {key: [100 * (row[key] / base[key] - 1) for row, base in pairs]
                for key in ("bpb", "answer_loss")}  # fmt: skip
        gaps["reward"] = [row["reward"] - base["reward"] for row, base in pairs]
        found[arm] = {**means, "gap": gaps}
    for arm, recipe in (("fp8", BlockScaling()), ("nvfp4", NVFP4())):
        specs = {"weight": recipe.weight, "input": recipe.input, "gradient": recipe.grad_output}
        found[arm]["bits"] = {name: round(bits(spec), 2) for name, spec in specs.items()}
    found["fp32"]["bits"] = dict.fromkeys(("weight", "input", "gradient"), 16)
    return found


def _write(path: Path, rows: list[Any]) -> None:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")


def main() -> None:
    """Measure, and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, nargs=3, default=[200, 120, 20])
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    runs: dict[str, list[dict[str, float]]] = {arm: [] for arm in ARMS}
    for seed in range(args.seeds):
        for arm in ARMS:
            runs[arm].append(run(arm, seed, tuple(args.steps)))
            sys.stderr.write(f"seed {seed} {arm}: {runs[arm][-1]}\n")
    found = summary(runs)
    if args.json:
        print(json.dumps(found, indent=2))
        return
    for arm, row in found.items():
        told = "  ".join(f"{key} {row[key]:.4f}" for key in (*MEASURES, "reward_before"))
        print(f"{arm:6} {told}  {row['seconds']:.0f} s  bits {row['bits']}")


if __name__ == "__main__":
    main()
