"""What fusion costs: a step against a plain one, extraction against a forward, bytes, memory.

    python benchmarks/fusion_cost.py [--quick]

A fusion step learns from three sources whose targets are mixed and stored already, chunks of
text that they cut otherwise among them. Both steps train copies of one pivot on the same windows,
in turns in one process and on one thread; the ratio is of the medians over the turns, of CPU
time, which other programs on the machine change least. How much higher than the other a step's
memory peaks is found in processes of their own. A table on stdout, and last one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

# Run as a script, this file's own folder comes first and this file passes for package `fusion`.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from torch import Tensor

from benchmarks.fusion_extract import measure_extract
from fp8.checkpoint import Position
from fp8.train import TrainConfig, causal_lm_loss, make_optimizer, train_step
from fusion.models import ModelSpec, build_model
from fusion.objective import FusionBatch, fusion_loss
from fusion.settings import FusionSettings
from fusion.target_store import TargetStore, read_targets, write_targets

SOURCES: Final = 3
TRAIN: Final = TrainConfig(steps=10**6, lr=1e-3, warmup_steps=0, decay_steps=0)
Step = Callable[[int], None]


@dataclass(frozen=True, slots=True)
class Case:
    """A pivot and the windows of its step."""

    hidden: int
    layers: int
    vocab: int
    windows: int
    width: int
    """Tokens of a window."""

    @property
    def name(self) -> str:
        """What the table calls it."""
        return f"hidden {self.hidden}, {self.layers} layers, V {self.vocab}"


CASES: Final = (
    Case(128, 4, 1_024, 16, 128),
    Case(256, 4, 4_096, 8, 128),
    Case(256, 2, 49_152, 8, 128),
)


def stored(case: Case, settings: FusionSettings, folder: Path) -> TargetStore:
    """Write targets as preparation does: `kept` ids a row, a longer chunk at one row in eight."""
    rows, rng = 64 * case.width, np.random.default_rng(0)
    start = rng.integers(0, case.vocab, (rows, 1))
    probs = np.sort(rng.dirichlet(np.full(settings.kept, 0.3), rows) * 0.9)[:, ::-1]
    length = np.where(rng.random((rows, SOURCES)) < 1 / 8, rng.integers(2, 5, (rows, SOURCES)), 0)
    arrays = {
        "ids": ((start + np.arange(settings.kept) * 7) % case.vocab).astype(np.int32),
        "probs": probs.astype(np.float32),
        "weight": np.ones(rows, np.float32),
        "chunk_length": length.astype(np.int32),
        "chunk_logprob": -rng.random((rows, SOURCES), np.float32) * 8,
        "chunk_weight": np.full((rows, SOURCES), 1 / SOURCES, np.float32),
    }
    write_targets(folder, rows, [arrays], "benchmark")
    stream = rng.integers(0, case.vocab, rows + 1).astype(np.int32)
    return read_targets(folder, stream)


def steps_of(case: Case, folder: Path) -> dict[str, Step]:
    """Return the two steps, each with a pivot and an optimizer of its own."""
    settings = FusionSettings(train=TRAIN, batch_size=case.windows, seq_len=case.width)
    store = stored(case, settings, folder)
    rows = torch.arange(64 * case.width).view(64, case.width)

    def windows(step: int) -> Tensor:
        first = step * case.windows % 64
        return rows[first : first + case.windows]

    def plain_batch(step: int) -> Tensor:
        at = windows(step).numpy()
        ids = np.concatenate([store.stream[at], store.stream[at[:, -1:] + 1]], -1)
        return torch.from_numpy(ids.astype(np.int64))

    def fusion_batch(step: int) -> FusionBatch:
        return store.batch(windows(step))

    arms: dict[str, tuple[Callable[[int], Any], Any]] = {
        "plain": (plain_batch, causal_lm_loss),
        "fusion": (fusion_batch, lambda model, batch: fusion_loss(model, batch, settings)),
    }
    return {name: _step_of(case, *arm) for name, arm in arms.items()}


def _step_of(case: Case, batch_at: Callable[[int], Any], loss: Any) -> Step:
    spec = ModelSpec(
        architecture="llama",
        hidden_size=case.hidden,
        layers=case.layers,
        heads=4,
        vocab_size=case.vocab,
    )
    model = build_model(spec, 0)
    optimizer, at = make_optimizer(model, TRAIN), Position()

    def step(index: int) -> None:
        train_step(model, optimizer, batch_at(index), loss, TRAIN, at)

    return step


def step_seconds(case: Case, turns: int) -> dict[str, float]:
    """Return the median CPU seconds of either step, in turns; the first two turns do not count."""
    with tempfile.TemporaryDirectory() as folder:
        steps = steps_of(case, Path(folder))
        found: dict[str, list[float]] = {name: [] for name in steps}
        for turn in range(turns + 2):
            # Who goes first changes from turn to turn.
            for name in sorted(steps, reverse=bool(turn % 2)):
                start = time.process_time()
                steps[name](turn)
                found[name].append(time.process_time() - start)
    return {name: statistics.median(times[2:]) for name, times in found.items()}


def peak_mib(case: Case, arm: str) -> float:
    """Return the peak memory of a process that does three steps of one kind."""
    number = CASES.index(case)
    command = [sys.executable, __file__, "--peak", arm, "--case", str(number)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(done.stdout)


def _do_steps(case: Case, arm: str) -> float:
    with tempfile.TemporaryDirectory() as folder:
        step = steps_of(case, Path(folder))[arm]
        for index in range(3):
            step(index)
    # Not ru_maxrss: that of a child begins at the peak of the process that started it.
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def measure_steps(cases: Sequence[Case], turns: int) -> dict[str, Any]:
    """Measure time and memory. step_ratio is the worst over the cases."""
    details = {}
    for case in cases:
        seconds = step_seconds(case, turns)
        extra = peak_mib(case, "fusion") - peak_mib(case, "plain")
        details[case.name] = {
            "plain_ms": seconds["plain"] * 1e3,
            "fusion_ms": seconds["fusion"] * 1e3,
            "ratio": seconds["fusion"] / seconds["plain"],
            "extra_mib": extra,
        }
    return {"step_ratio": max(d["ratio"] for d in details.values()), "steps": details}


def show(found: dict[str, Any]) -> None:
    """Print the table, and the JSON."""
    print(f"{'pivot':<32} {'plain ms':>9} {'fusion ms':>9} {'ratio':>6} {'extra MiB':>9}")
    for name, row in found["steps"].items():
        print(
            f"{name:<32} {row['plain_ms']:9.1f} {row['fusion_ms']:9.1f} {row['ratio']:6.3f} "
            f"{row['extra_mib']:9.1f}"
        )
    for shape, ratio in found.get("extract_ratios", {}).items():
        print(f"extraction, {shape} shape: {ratio:.3f} of a bare forward's tokens/s")
    for name, size in found.get("bytes_per_token", {}).items():
        print(f"{name}: {size:.2f} bytes per token")
    if "rss_growth_mib" in found:
        print(f"extraction of four times the prompts: {found['rss_growth_mib']:+.1f} MiB")
    print(json.dumps(found))


def main(argv: Sequence[str]) -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="What fusion costs.")
    parser.add_argument("--quick", action="store_true", help="few turns, steps alone")
    parser.add_argument("--turns", type=int, default=25)
    parser.add_argument("--peak", choices=("plain", "fusion"), help=argparse.SUPPRESS)
    parser.add_argument("--case", type=int, default=0, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    if args.peak:
        print(_do_steps(CASES[args.case], args.peak))
        return 0
    found = measure_steps(CASES, 5 if args.quick else args.turns)
    show(found if args.quick else found | measure_extract())
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
