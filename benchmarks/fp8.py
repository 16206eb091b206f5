"""The FP8 benchmark that needs no GPU: what emulation costs, what is kept, and what is lost.

    python benchmarks/fp8.py --json --seeds 1

Four parts. A linear layer, forward and backward, in fp32, bf16 and emulated FP8. The bytes that
autograd keeps per token for a decoder layer of Qwen2.5-1.5B. The bytes of the optimizer's
moments. And continual pre-training of a language model of 1.6 million parameters under every
recipe from one checkpoint on the same batches: the held-out loss against fp32's, the gradients
of one step against fp32's, and whether other tokens and other rows change a row's answer.
Progress goes to stderr; tables and, last, one line of JSON go to stdout.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

# Run as a script, this file's own folder comes first and this file passes for package `fp8`.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor, nn

from benchmarks.fp8_memory import measure_memory
from benchmarks.fp8_models import (
    Study,
    gradient_error,
    held_out_loss,
    linear_gradients,
)
from fp8.backends.emulated import native_bfloat16
from fp8.convert import convert_to_float8_training
from fp8.epoch import invalidate_weight_caches
from fp8.linear import Float8Linear, autocast
from fp8.recipe import (
    MXFP8,
    NVFP4,
    BlockScaling,
    CurrentScaling,
    DelayedScaling,
    Recipe,
    RowwiseScaling,
)
from fp8.rounding import compile_quantizers
from fp8.train import causal_lm_loss

LINEARS: Final = ((1024, 512, 1536), (1024, 896, 4864))
"""Tokens, in_features, out_features; the first is the reference's, the second Qwen2.5-0.5B's up."""
RECIPES: Final[Mapping[str, Recipe]] = MappingProxyType(
    {
        "block_p2": BlockScaling(),
        "block_fp32": BlockScaling(scale_format="fp32"),
        "rowwise": RowwiseScaling(),
        "current": CurrentScaling(),
        "delayed": DelayedScaling(),
        "mxfp8": MXFP8(),
        # All layers in FP4: of two blocks, the recipe's default would leave one in high precision.
        "nvfp4": NVFP4(keep_last=0.0),
        "nvfp4_no_hadamard": NVFP4(keep_last=0.0, hadamard=False),
        "nvfp4_no_stochastic": NVFP4(keep_last=0.0, stochastic_rounding=False),
        "nvfp4_neither": NVFP4(keep_last=0.0, hadamard=False, stochastic_rounding=False),
        "nvfp4_keep_last": NVFP4(),
    }
)
QUICK_RECIPES: Final = ("block_p2", "nvfp4")
QUICK_STUDY: Final = Study(hidden=128, inter=256, base_steps=20, steps=8, eval_batches=2)

Loss = Callable[[nn.Module, Tensor], Tensor]


# ---------------------------------------------------------------------------- a linear layer
def linear_times(shape: tuple[int, int, int], *, rounds: int, compiled: bool) -> dict[str, float]:
    """CPU milliseconds of forward and backward; the fastest of `rounds`, the arms in turn.

    Every round quantises the weight anew, as a training step with one micro-batch does.
    """
    T, K, N = shape
    torch.manual_seed(0)
    plain = nn.Linear(K, N, bias=False)
    narrow = nn.Linear(K, N, bias=False, dtype=torch.bfloat16)
    low = Float8Linear.from_float(narrow, BlockScaling(backend="emulated"))
    x_TK, g_TN = torch.randn(T, K), torch.randn(T, N)

    def step(layer: nn.Module, dtype: torch.dtype) -> None:
        x, g = x_TK.to(dtype).requires_grad_(), g_TN.to(dtype)
        invalidate_weight_caches()
        began_s = time.process_time()
        layer(x).backward(g)
        taken.append(time.process_time() - began_s)
        layer.zero_grad()

    arms = {
        "fp32": (plain, torch.float32, False),
        "bf16": (narrow, torch.bfloat16, False),
        "emulated": (low, torch.bfloat16, False),
    }
    if compiled:
        arms["emulated_compiled"] = (low, torch.bfloat16, True)
    taken: list[float] = []
    best = dict.fromkeys(arms, float("inf"))
    for _ in range(rounds):
        for name, (layer, dtype, fast) in arms.items():
            compile_quantizers(fast)
            taken.clear()
            for _ in range(3):  # the first one wakes the compiled code up
                step(layer, dtype)
            best[name] = min(best[name], 1e3 * min(taken[1:]))
    compile_quantizers(False)
    return best


def measure_linear(*, quick: bool, compiled: bool) -> dict[str, Any]:
    """Time the linear layers; the ratios of the first are those of the goal."""
    found = {}
    for T, K, N in [(128, 128, 256)] if quick else LINEARS:
        _say(f"linear {T} tokens, {K} -> {N}")
        found[f"{T}x{K}x{N}"] = linear_times(
            (T, K, N), rounds=3 if quick else 12, compiled=compiled
        )
    first = next(iter(found.values()))
    arm = "emulated_compiled" if compiled else "emulated"
    return {
        "linear_vs_bf16": first[arm] / first["bf16"],
        "linear_vs_fp32": first[arm] / first["fp32"],
        "linear_arm": arm,
        "linear_vs_bf16_eager": first["emulated"] / first["bf16"],
        "linear_vs_fp32_eager": first["emulated"] / first["fp32"],
        "linear_ms": found,
    }


# ---------------------------------------------------------------------------- parity
def _in_bfloat16(model: nn.Module, batch: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return causal_lm_loss(model, batch)


def _arms(quick: bool) -> dict[str, tuple[Callable[[nn.Module], object], Loss]]:
    recipes = {k: v for k, v in RECIPES.items() if not quick or k in QUICK_RECIPES}
    low = {
        name: (partial(convert_to_float8_training, recipe=recipe), causal_lm_loss)
        for name, recipe in recipes.items()
    }
    return {"bf16": (lambda _model: None, _in_bfloat16), **low}


def parity(study: Study, *, quick: bool) -> dict[str, dict[str, float]]:
    """Compare every arm with fp32 from one checkpoint; gaps and errors in per cent."""
    _say(f"seed {study.seed}: checkpoint of {study.base_steps} steps")
    base, evaluation = study.base(), study.evaluation()
    fp32 = held_out_loss(study.continue_from(base, lambda _model: None), evaluation)
    other = study.continue_from(base, lambda _model: None, first_batch=10_000)
    moved = 100 * (held_out_loss(other, evaluation) / fp32 - 1)
    found = {
        "fp32": {"loss": fp32, "loss_before": held_out_loss(base, evaluation)},
        "fp32_other_order": {"gap_pct": moved},
    }
    _say(f"  fp32 {fp32:.4f}, on other batches {moved:+.3f} %")
    for name, (prepare, loss_fn) in _arms(quick).items():
        began_s = time.perf_counter()
        model = study.continue_from(base, prepare, loss_fn)
        row = {"gap_pct": 100 * (held_out_loss(model, evaluation, loss_fn) / fp32 - 1)}
        with autocast(enabled=False):
            row["gap_in_fp32_pct"] = 100 * (held_out_loss(model, evaluation) / fp32 - 1)
        row |= one_step_error(base, prepare, loss_fn, study) | leaks(model, evaluation[0], loss_fn)
        row["seconds"] = time.perf_counter() - began_s
        found[name] = row
        _say(f"  {name:20} gap {row['gap_pct']:+.3f} %  gradients {row['mean_pct']:.1f} %")
    return found


def one_step_error(
    base: nn.Module, prepare: Callable[[nn.Module], object], loss_fn: Loss, study: Study
) -> dict[str, float]:
    """Compare the gradients of the linear weights with fp32's, at the checkpoint."""
    batch = study.train_at()(study.base_steps)
    gradients = []
    like = _ready(base, lambda m: convert_to_float8_training(m, BlockScaling()))
    for ready, loss in ((lambda _model: None, causal_lm_loss), (prepare, loss_fn)):
        model = _ready(base, ready)
        torch.manual_seed(study.seed)
        loss(model, batch).backward()  # type: ignore[no-untyped-call]
        gradients.append(linear_gradients(model, like))
    return gradient_error(gradients[1], gradients[0])


def _ready(base: nn.Module, prepare: Callable[[nn.Module], object]) -> nn.Module:
    """Return a prepared copy of base, without gradients."""
    model = copy.deepcopy(base)
    prepare(model)
    model.zero_grad()
    return model


def leaks(model: nn.Module, batch: Tensor, loss_fn: Loss) -> dict[str, float]:
    """Tell how far the log-probabilities of one row move when they must not.

    Returns: causality: when later tokens of the row change; batch: when the other rows do. 0 is
        a guarantee in so far as the GEMMs of this device do not depend on other rows.
    """
    narrow = torch.autocast("cpu", torch.bfloat16) if loss_fn is _in_bfloat16 else None
    ids = batch[:4, :-1]
    half = ids.shape[1] // 2
    later, others = ids.clone(), ids.clone()
    later[0, half:] = ids[0, half:].flip(0)
    others[1:] = ids[1:].flip(1)

    def log_probabilities(tokens: Tensor) -> Tensor:
        with torch.no_grad(), narrow or contextlib.nullcontext():
            logits = model(input_ids=tokens, use_cache=False).logits[0]
        log_p: Tensor = logits.float().log_softmax(-1)
        return log_p

    model.eval()
    true = log_probabilities(ids)
    return {
        "causality_leak": float((log_probabilities(later) - true)[:half].abs().max()),
        "batch_leak": float((log_probabilities(others) - true).abs().max()),
    }


def measure_parity(*, quick: bool, seeds: int) -> dict[str, Any]:
    """Run the study for every seed, and average."""
    study = QUICK_STUDY if quick else Study()
    by_seed = [parity(replace(study, seed=seed), quick=quick) for seed in range(seeds)]
    table = {
        arm: {key: statistics.fmean(run[arm][key] for run in by_seed) for key in by_seed[0][arm]}
        for arm in by_seed[0]
    }
    gaps = {arm: row["gap_pct"] for arm, row in table.items() if not arm.startswith("fp32")}
    return {
        "parity_gap_pct": gaps,
        "parity_gap_pct_by_seed": {
            arm: [run[arm]["gap_pct"] for run in by_seed] for arm in (*gaps, "fp32_other_order")
        },
        "parity": table,
        "seeds": seeds,
    }


# ---------------------------------------------------------------------------- the whole
def tables(found: Mapping[str, Any]) -> str:
    """Lay out the results as Markdown tables."""
    lines = ["| linear, ms of CPU | " + " | ".join(next(iter(found["linear_ms"].values()))) + " |"]
    lines.append("|" + " --- |" * lines[0].count(" |"))
    for shape, times in found["linear_ms"].items():
        lines.append(f"| {shape} | " + " | ".join(f"{t:.1f}" for t in times.values()) + " |")
    saved = found["saved_bytes"]
    lines += ["", "| saved for backward | bytes per token and layer | change |", "|" + " --- |" * 3]
    for name, size in saved.items():
        lines.append(f"| {name} | {size:,.0f} | {100 * (size / saved['bf16'] - 1):+.1f} % |")
    lines.append(f"| bf16_eager | {found['saved_bytes_bf16_eager']:,.0f} | |")
    moments = found["moment_bytes_per_param"], found["moment_bytes_per_param_adamw"]
    lines += ["", f"Moments: {moments[0]:.3f} bytes a parameter; AdamW's {moments[1]:.3f}.", ""]
    head = "recipe | eval-loss gap % | same weights in fp32 % | gradient error mean % | max % |"
    lines += [f"| {head} min cosine | causality leak | batch leak | s |", "|" + " --- |" * 9]
    keys = ["gap_pct", "gap_in_fp32_pct", "mean_pct", "max_pct", "min_cosine"]
    for arm, row in found["parity"].items():
        if arm.startswith("fp32"):
            continue
        cells = [f"{row[key]:.3f}" for key in keys]
        cells += [f"{row[key]:.2g}" for key in ("causality_leak", "batch_leak")]
        lines.append(f"| {arm} | " + " | ".join([*cells, f"{row['seconds']:.0f}"]) + " |")
    order = found["parity_gap_pct_by_seed"]["fp32_other_order"]
    lines.append(f"\nfp32 on other batches: {', '.join(f'{gap:+.2f} %' for gap in order)}.")
    return "\n".join(lines)


def environment() -> dict[str, Any]:
    """Say where the numbers come from."""
    return {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "cpu_has_bfloat16": native_bfloat16(),
        "threads": torch.get_num_threads(),
    }


def main(arguments: Iterable[str] | None = None) -> int:
    """Run the benchmark and print what came out, whatever it is."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=1, help="checkpoints of the parity table")
    parser.add_argument("--quick", action="store_true", help="toy sizes: to see that it runs")
    parser.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="time the compiled quantisers too; the first use takes seconds",
    )
    parser.add_argument("--out", type=Path, help="file to write the JSON to")
    parser.add_argument(
        "--json", action="store_true", help="tables to stderr, only the JSON to stdout"
    )
    options = parser.parse_args(None if arguments is None else list(arguments))
    before, began_s = torch.get_num_threads(), time.perf_counter()
    torch.set_num_threads(1)
    try:
        found = measure_linear(quick=options.quick, compiled=options.compile)
        _say("bytes kept for a decoder layer, and by the optimizer")
        found |= measure_memory(quick=options.quick)
        found |= measure_parity(quick=options.quick, seeds=options.seeds)
        found |= {"environment": environment(), "quick": options.quick}
    finally:
        torch.set_num_threads(before)
    found["seconds"] = round(time.perf_counter() - began_s, 1)
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(found, indent=1) + "\n")
    print(tables(found), file=sys.stderr if options.json else sys.stdout)
    print(json.dumps(found))
    return 0


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
