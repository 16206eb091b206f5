"""Whole training steps: how fast, in how much memory, and how far from BF16 they end.

Every arm has the same attention, the same chunked cross-entropy and, unless a row says otherwise,
the same optimizer. Decoder layers are compiled one by one: they share one graph, so 28 compile in
the time of one; optimizer, embedding and loss are not compiled. Weights and token ids are random:
speed and memory do not depend on them.
"""

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from types import MappingProxyType
from typing import Any, Final, Literal

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import Qwen2ForCausalLM

from benchmarks.fp8_gpu_kernels import Rig
from benchmarks.fp8_models import SHAPES, Shape, Study, held_out_loss
from fp8.convert import convert_to_float8_training
from fp8.losses import causal_lm_loss
from fp8.optim import Float8AdamW, state_bytes
from fp8.recipe import BackendName, BlockScaling

Mode = Literal["bf16", "plain", "float8", "recompute"]
MODES: Final[tuple[Mode, ...]] = ("plain", "float8", "recompute")
"""What the MLPs keep for backward; see `convert_to_float8_training(swiglu=...)`."""
INFIR2: Final[Mapping[str, Mapping[str, float]]] = MappingProxyType(
    {
        "1.5B-8k": {"time": 0.78, "peak_memory": 0.86, "tokens_per_s": 1.10},
        "1.5B-32k-TP2": {"time": 0.93, "peak_memory": 0.89, "tokens_per_s": 1.04},
        "7B-8k-TP2": {"time": 0.78, "peak_memory": 0.95, "tokens_per_s": 1.19},
        "7B-32k-TP4": {"time": 0.87, "peak_memory": 0.86, "tokens_per_s": 1.14},
    }
)
"""FP8 over BF16 as InfiR2 (arXiv 2509.22536) reports it, forward and backward, on its hardware."""

Optimizer = Callable[[nn.Module], torch.optim.Optimizer]
Arms = dict[str, dict[str, Any]]
"""What each arm gave, by name; filled arm by arm, so that a timeout loses one of them only."""
Report = Callable[[str, Mapping[str, Any]], None]


def plain_adamw(model: nn.Module) -> torch.optim.Optimizer:
    """Return torch's AdamW on the bf16 weights, with bf16 moments: 4 bytes a parameter."""
    return torch.optim.AdamW(model.parameters(), lr=1e-5, betas=(0.9, 0.95), fused=True)


def mixed_adamw(model: nn.Module) -> torch.optim.Optimizer:
    """Return AdamW as mixed precision has it: fp32 moments and masters, 12 bytes a parameter."""
    return Float8AdamW(model.parameters(), lr=1e-5, moments="float32", check_finite=False)


def float8_adamw(model: nn.Module) -> torch.optim.Optimizer:
    """Return Float8AdamW with fp32 masters: 6 bytes a parameter."""
    return Float8AdamW(model.parameters(), lr=1e-5, check_finite=False)


def float8_stochastic_adamw(model: nn.Module) -> torch.optim.Optimizer:
    """Return Float8AdamW that rounds bf16 weights stochastically: 2 bytes a parameter."""
    return Float8AdamW(
        model.parameters(), lr=1e-5, master="bfloat16_stochastic", check_finite=False
    )


@dataclass(frozen=True, kw_only=True)
class Job:
    """One arm: a model, what runs it, and how much it reads at a time."""

    shape: Shape
    mode: Mode
    rows: int
    context: int
    backend: BackendName
    optimizer: Optimizer = plain_adamw
    compiler: str = "inductor"
    """A backend of torch.compile; eager traces the layers and runs them as they are."""
    warmup: int = 3
    steps: int = 8


# ---------------------------------------------------------------------------- one arm
def build(job: Job, device: torch.device) -> nn.Module:
    """Return the model in bf16 on the device, converted if the mode is not bf16."""
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with device:
            model: Any = Qwen2ForCausalLM(job.shape.config(positions=job.context))
    finally:
        torch.set_default_dtype(before)
    model.train()
    if job.mode != "bf16":
        convert_to_float8_training(model, BlockScaling(backend=job.backend), swiglu=job.mode)
    for layer in model.model.layers:
        layer.compile(dynamic=False, backend=job.compiler)
    result: nn.Module = model
    return result


def run(job: Job, device: torch.device, then: Mapping[str, Optimizer]) -> dict[str, Any]:
    """Time training steps, then measure the peak memory under other optimizers too.

    Returns: tokens_per_s, step_ms, peak_gb and parts of it; a loss, to see that it is one.
    """
    generator = torch.Generator(device).manual_seed(1)
    ids = torch.randint(
        job.shape.vocab, (job.rows, job.context + 1), device=device, generator=generator
    )
    began_s = time.monotonic()
    model = build(job, device)
    optimizer = job.optimizer(model)

    def steps(count: int) -> float:
        last = 0.0
        for _ in range(count):
            loss = causal_lm_loss(model, ids)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            last = loss.detach()  # type: ignore[assignment]
        return float(last)  # waits for the GPU

    with _attention(device):
        steps(job.warmup)
        _forget_peak(device)
        ready_s = time.monotonic()
        loss = steps(job.steps)
        step_ms = 1e3 * (time.monotonic() - ready_s) / job.steps
        found = {
            "tokens_per_s": 1e3 * job.rows * job.context / step_ms,
            "step_ms": step_ms,
            "peak_gb": _peak_gb(device),
            "weights_gb": 1e-9 * sum(p.nbytes for p in model.parameters()),
            "optimizer_gb": 1e-9 * sum(state_bytes(optimizer)[:2]),
            "loss": loss,
            "start_s": ready_s - began_s,
        }
        for name, make in then.items():
            del optimizer
            _free(device)
            optimizer = make(model)
            steps(2)
            _forget_peak(device)
            steps(2)
            found[f"peak_gb_{name}"] = _peak_gb(device)
    return found


def attempt(
    job: Job, device: torch.device, then: Mapping[str, Optimizer] | None = None
) -> dict[str, Any]:
    """Run an arm; one that does not fit, or fails, says so instead and leaves nothing behind."""
    _free(device)
    try:
        return run(job, device, then or {})
    except torch.OutOfMemoryError as error:
        why = {"out_of_memory": str(error).partition("\n")[0]}
    except RuntimeError as error:  # torch.compile's errors are that, and those of CUDA
        why = {"failed": f"{type(error).__name__}: {error}"[:1000]}
    # Here the exception is gone, and with it the frames that held the model.
    _free(device)
    return why


@contextlib.contextmanager
def _attention(device: torch.device) -> Iterator[None]:
    if device.type != "cuda":
        yield
        return
    fastest_first = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION]
    with sdpa_kernel([*fastest_first, SDPBackend.EFFICIENT_ATTENTION], set_priority=True):
        yield


def _free(device: torch.device) -> None:
    torch.compiler.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _forget_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()


def _peak_gb(device: torch.device) -> float | None:
    return 1e-9 * torch.cuda.max_memory_allocated() if device.type == "cuda" else None


# ---------------------------------------------------------------------------- 1.5B
def training_steps(rig: Rig, arms: Arms, report: Report) -> None:
    """Run BF16 and FP8 at 8k and 2k tokens of context, the same tokens a step; fills `arms`.

    At 8k every memory mode runs; the fastest of them runs at 2k too.
    """
    long, short = (64, 32) if rig.dry else (8192, 2048)
    job = Job(
        shape=rig.shape,
        mode="bf16",
        rows=rig.tokens // long,
        context=long,
        backend=rig.backend,
        compiler="eager" if rig.dry else "inductor",
        steps=2 if rig.dry else 8,
    )
    masters = {"mixed_adamw": mixed_adamw, "float8_adamw": float8_adamw}
    # The leanest mode first: it is what time must not cut off.
    in_turn: tuple[Mode, ...] = ("bf16", *reversed(MODES))
    for mode in in_turn:
        _arm(f"1.5B-8k {mode}", replace(job, mode=mode), rig, arms, report, masters)
    shorter = replace(job, rows=rig.tokens // short, context=short)
    _arm("1.5B-2k bf16", shorter, rig, arms, report)
    fastest = _fastest(arms)
    if fastest is not None:
        _arm(f"1.5B-2k {fastest}", replace(shorter, mode=fastest), rig, arms, report)


def _arm(
    name: str,
    job: Job,
    rig: Rig,
    arms: Arms,
    report: Report,
    then: Mapping[str, Optimizer] | None = None,
) -> None:
    if rig.left_s() < 30:
        arms[name] = {"skipped": "the section's time was used up"}
    else:
        arms[name] = attempt(job, rig.device, then)
    report(name, arms[name])


def _fastest(arms: Arms) -> Mode | None:
    """Return the FP8 mode with the most tokens per second at 8k, of those that ran."""
    speeds = {mode: arms.get(f"1.5B-8k {mode}", {}).get("tokens_per_s") for mode in MODES}
    ran: list[tuple[float, Mode]] = [(v, mode) for mode, v in speeds.items() if v is not None]
    return max(ran)[1] if ran else None


def compared(arms: Arms) -> dict[str, Any]:
    """Return FP8 over BF16 in tokens per second and in peak memory, as far as both ran.

    FP8 is the fastest memory mode; the leanest has a row of its own, once with the same optimizer
    and once with fp32 masters in both, and Float8AdamW's moments against fp32 ones.
    """
    mode = _fastest(arms)
    found: dict[str, Any] = {"mode": mode, "speedup": {}, "peak_memory_ratio": {}}
    for context in ("1.5B-2k", "1.5B-8k"):
        ours, theirs = arms.get(f"{context} {mode}", {}), arms.get(f"{context} bf16", {})
        found["speedup"][context] = _ratio(ours, theirs, "tokens_per_s")
        found["peak_memory_ratio"][context] = _ratio(ours, theirs, "peak_gb")
    lean, theirs = arms.get("1.5B-8k recompute", {}), arms.get("1.5B-8k bf16", {})
    found["peak_memory_ratio"] |= {
        "1.5B-8k recompute": _ratio(lean, theirs, "peak_gb"),
        "1.5B-8k recompute, Float8AdamW": _ratio(
            {"peak_gb": lean.get("peak_gb_float8_adamw")},
            {"peak_gb": theirs.get("peak_gb_mixed_adamw")},
            "peak_gb",
        ),
    }
    found["infir2"] = {row: dict(ratios) for row, ratios in INFIR2.items()}
    return found


def _ratio(ours: Mapping[str, Any], theirs: Mapping[str, Any], key: str) -> float | None:
    a, b = ours.get(key), theirs.get(key)
    return None if a is None or b is None else float(a) / float(b)


# ---------------------------------------------------------------------------- parity
def loss_parity(rig: Rig) -> dict[str, Any]:
    """Continue one checkpoint for 200 steps in BF16, FP8 and emulated FP8; gaps in per cent."""
    study = Study(hidden=512, inter=1408, layers=4, batch_size=16, seq_len=256, base_steps=300)
    study = replace(study, steps=200, eval_batches=16)
    if rig.dry:
        study = Study(hidden=128, inter=256, base_steps=4, steps=4, eval_batches=1)
    base, batches = study.base(rig.device), study.evaluation()

    def in_bfloat16(model: nn.Module, batch: Tensor) -> Tensor:
        with torch.autocast(rig.device.type, torch.bfloat16):
            return causal_lm_loss(model, batch)

    def low(backend: BackendName) -> Callable[[nn.Module], object]:
        return partial(convert_to_float8_training, recipe=BlockScaling(backend=backend))

    arms: dict[str, Callable[[nn.Module], object]] = {
        "bf16": lambda _model: None,
        rig.backend: low(rig.backend),
        "emulated": low("emulated"),
    }
    losses = {}
    for name, prepare in arms.items():
        model = study.continue_from(base, prepare, in_bfloat16)
        losses[name] = held_out_loss(model, batches, in_bfloat16)
    gap = {name: 100 * (loss / losses["bf16"] - 1) for name, loss in losses.items()}
    return {"loss_gap_pct": gap[rig.backend], "loss_gaps_pct": gap, "losses": losses}


# ---------------------------------------------------------------------------- 7B
def seven_billion(rig: Rig, arms: Arms, report: Report) -> None:
    """Train all parameters of a 7B model on 16k tokens in one sequence; fills `arms`."""
    job = Job(
        shape=SHAPES["toy" if rig.dry else "7B"],
        mode="recompute",
        rows=1,
        context=64 if rig.dry else 16_384,
        backend=rig.backend,
        optimizer=float8_stochastic_adamw,
        compiler="eager" if rig.dry else "inductor",
        warmup=2,
        steps=2 if rig.dry else 3,
    )
    plain = replace(job, mode="bf16", optimizer=plain_adamw)
    _arm("7B-16k recompute, Float8AdamW, bf16 master", job, rig, arms, report)
    _arm("7B-16k bf16, AdamW in bf16", plain, rig, arms, report)
    mixed = replace(plain, optimizer=mixed_adamw)
    _arm("7B-16k bf16, AdamW in fp32", mixed, rig, arms, report)
