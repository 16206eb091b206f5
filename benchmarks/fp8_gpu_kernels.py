"""Kernels on the GPU: are their codes the reference's, and how fast are they?

Shapes: T = tokens, K = in_features, N = out_features.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final

import torch
from torch import Tensor

from benchmarks.fp8_models import SHAPES, Shape
from fp8 import ops
from fp8.backends.base import Backend
from fp8.backends.emulated import Emulated
from fp8.backends.select import select
from fp8.optim import Float8AdamW
from fp8.recipe import BackendName, BlockScaling, CurrentScaling, Recipe, RowwiseScaling

LARGEST_GEMM_ERROR: Final = 1e-2
LARGEST_SHARE_OF_OTHER_CODES: Final = 1e-3
"""Of the fused kernels: exp and the order of a sum are the device's own; quantisers have 0."""


@dataclass(frozen=True, kw_only=True)
class Rig:
    """Where and at which size to measure."""

    device: torch.device
    dry: bool
    """Toy sizes on a CPU, to see that every section runs: no figure means anything."""
    deadline_s: float = float("inf")
    """Of the section, on time.monotonic's clock."""
    flush: list[Tensor] = field(default_factory=list)

    @property
    def shape(self) -> Shape:
        """The model's sizes."""
        return SHAPES["toy" if self.dry else "1.5B"]

    @property
    def tokens(self) -> int:
        """Tokens of a micro-batch."""
        return 256 if self.dry else 16_384

    @property
    def backend(self) -> BackendName:
        """What FP8 layers are to run on; an error says why if they cannot."""
        return "emulated" if self.dry else "scaled_mm"

    def left_s(self) -> float:
        """Seconds until the section has to end."""
        return self.deadline_s - time.monotonic()

    def random(self, *size: int, seed: int = 0) -> Tensor:
        """Return bf16 values with a few large channels, as activations have them."""
        generator = torch.Generator(self.device).manual_seed(seed)
        x = torch.randn(*size, device=self.device, generator=generator)
        x[..., ::97] *= 30.0
        return x.bfloat16()

    def milliseconds(self, work: Callable[[], object], *, repeats: int = 20) -> float:
        """Return the median time; the caches of the GPU are emptied before every run."""
        if self.device.type != "cuda":
            began_s = time.perf_counter()
            work()
            return 1e3 * (time.perf_counter() - began_s)
        if not self.flush:
            self.flush.append(torch.empty(256 << 20, dtype=torch.uint8, device=self.device))
        for _ in range(3):
            work()
        make = partial(torch.cuda.Event, enable_timing=True)
        marks = [(make(), make()) for _ in range(repeats)]
        for start, end in marks:
            self.flush[0].zero_()
            start.record()
            work()
            end.record()
        torch.cuda.synchronize()
        return statistics.median(float(start.elapsed_time(end)) for start, end in marks)


# ---------------------------------------------------------------------------- correctness
def check(rig: Rig) -> dict[str, Any]:
    """Compare the kernels' codes with the reference's, and GEMMs with the emulator's."""
    codes = dict(_code_differences(rig))
    errors = dict(_gemm_errors(rig))
    exact = {k: share for k, share in codes.items() if not k.startswith(("rmsnorm", "swiglu"))}
    return {
        "codes_differing": codes,
        "gemm_error": errors,
        "correct": all(share == 0 for share in exact.values())
        and all(share <= LARGEST_SHARE_OF_OTHER_CODES for share in codes.values())
        and all(error <= LARGEST_GEMM_ERROR for error in errors.values()),
    }


def _code_differences(rig: Rig) -> Iterator[tuple[str, float]]:
    for rows, columns in ((256, 384), (200, 1544)):
        for power_of_two in (True, False):
            for name, arguments in _operator_calls(rig, rows, columns, power_of_two).items():
                operator: Any = getattr(ops, name)
                found = operator(*arguments)
                # The operator's own body is the reference in torch, on any device.
                wanted = operator._init_fn(*arguments)
                shares = [_share_differing(f, w) for f, w in zip(found, wanted, strict=True)]
                scales = "p2" if power_of_two else "fp32"
                yield f"{name} {rows}x{columns} {scales}", max(shares)


def _operator_calls(
    rig: Rig, rows: int, columns: int, power_of_two: bool
) -> dict[str, tuple[Any, ...]]:
    """Return arguments for every operator, one set each."""
    x, up, dp = (rig.random(rows, columns, seed=seed) for seed in range(3))
    weight = rig.random(columns, seed=3)
    kept = ops.swiglu_quantize(x, up, power_of_two)[2:]
    calls: dict[str, tuple[Any, ...]] = {
        "quantize_1x128": (x, power_of_two),
        "quantize_1x128_dual": (x, power_of_two),
        "quantize_128x128_dual": (x, power_of_two),
        "rmsnorm_quantize": (x, weight, 1e-6, power_of_two),
        "swiglu_quantize": (x, up, power_of_two),
        "swiglu_backward_quantize": (dp, *kept, power_of_two),
    }
    if power_of_two:
        calls["transpose_requantize"] = ops.quantize_1x128(x, power_of_two)
    return calls


def _share_differing(found: Tensor, wanted: Tensor) -> float:
    if found.dtype == torch.float8_e4m3fn:
        found, wanted = found.view(torch.uint8), wanted.view(torch.uint8)
    return float((found != wanted).float().mean())


def _gemm_errors(rig: Rig) -> Iterator[tuple[str, float]]:
    for name, recipe in recipes(rig.backend).items():
        for sizes in ((256, 384, 512), (200, 1536, 272)):
            fast, slow = (
                {label: backend.gemm(a, b, recipe, torch.float32) for label, a, b in gemms}
                for backend in (backend_of(recipe, rig.device), Emulated())
                for gemms in (three_gemms(backend, recipe, rig, *sizes),)
            )
            for label, y in fast.items():
                error = float((y - slow[label]).norm() / slow[label].norm())
                yield f"{name} {label} {'x'.join(map(str, sizes))}", error


# ---------------------------------------------------------------------------- GEMMs
def recipes(backend: BackendName) -> dict[str, Recipe]:
    """Return the recipes that Hopper has kernels for."""
    return {
        "block": BlockScaling(backend=backend),
        "rowwise": RowwiseScaling(backend=backend),
        "tensorwise": CurrentScaling(backend=backend),
    }


def backend_of(recipe: Recipe, device: torch.device) -> Backend:
    """Return the backend, or raise with its reason."""
    backend, _ = select(recipe, 1024, 1024, device)
    return backend  # type: ignore[return-value]


def three_gemms(
    backend: Backend, recipe: Recipe, rig: Rig, T: int, K: int, N: int
) -> list[tuple[str, Any, Any]]:
    """Return the operands of a layer's three GEMMs, by name."""
    x, w, g = rig.random(T, K), rig.random(N, K, seed=1) * 0.02, rig.random(T, N, seed=2) * 1e-3
    x_rows, saved = backend.input(x, recipe, keep=True, amax=None)
    assert saved is not None
    w_rows, w_columns = backend.weight(w, recipe)
    g_rows, g_columns = backend.gradient(g, recipe, dual=True, amax=None)
    x_columns = backend.saved_input(saved, recipe, T, K)
    return [
        ("fprop", x_rows, w_rows),
        ("dgrad", g_rows, w_columns),
        ("wgrad", g_columns, x_columns),
    ]


def gemm_table(rig: Rig) -> dict[str, Any]:
    """TFLOP/s of every GEMM of a decoder layer, without quantisation, and of the layer's sum."""
    table: dict[str, dict[str, float]] = {}
    layer_ms: dict[str, float] = {}
    flops = 0.0
    sizes = _distinct(rig.shape.linears())
    for names, (N, K) in sizes.items():
        T, count = rig.tokens, len(names.split("/"))
        flops += 6.0 * T * N * K * count
        x, w, g = (rig.random(*size) for size in ((T, K), (N, K), (T, N)))
        plain: dict[str, Callable[[], Tensor]] = {
            "fprop": partial(torch.matmul, x, w.t()),
            "dgrad": partial(torch.matmul, g, w),
            "wgrad": partial(torch.matmul, g.t(), x),
        }
        arms: dict[str, Mapping[str, Callable[[], Tensor]]] = {"bf16": plain}
        for name, recipe in recipes(rig.backend).items():
            backend = backend_of(recipe, rig.device)
            arms[name] = {
                label: partial(backend.gemm, a, b, recipe, torch.bfloat16)
                for label, a, b in three_gemms(backend, recipe, rig, T, K, N)
            }
        for name, works in arms.items():
            for label, work in works.items():
                ms = rig.milliseconds(work)
                table.setdefault(name, {})[f"{names} {label}"] = 2e-9 * T * N * K / ms
                layer_ms[name] = layer_ms.get(name, 0.0) + ms * count
    layer = {name: 1e-9 * flops / ms for name, ms in layer_ms.items()}
    return {"gemm_tflops": table, "gemm_tflops_layer": layer}


def _distinct(linears: Mapping[str, tuple[int, int]]) -> dict[str, tuple[int, int]]:
    """Join the names of layers of one size."""
    found: dict[tuple[int, int], list[str]] = {}
    for name, size in linears.items():
        found.setdefault(size, []).append(name)
    return {"/".join(names): size for size, names in found.items()}


# ---------------------------------------------------------------------------- quantisers
def quantizer_speeds(rig: Rig) -> dict[str, float]:
    """GB/s of every kernel: bytes that must be read plus bytes that must be written."""
    rows, columns = rig.tokens, rig.shape.inter
    source = rig.random(rows, columns)
    target = torch.empty_like(source)
    speeds = {"copy": _gbps(rig, lambda: (target.copy_(source),), (source,))}
    calls = _operator_calls(rig, rows, columns, True)
    calls["quantize_128x128_dual"] = (rig.random(columns, rig.shape.hidden), True)
    calls["rmsnorm_quantize"] = (
        rig.random(rows, rig.shape.hidden),
        rig.random(rig.shape.hidden),
        1e-6,
        True,
    )
    for name, arguments in calls.items():
        operator: Any = getattr(ops, name)
        tensors = tuple(a for a in arguments if isinstance(a, Tensor))
        speeds[name] = _gbps(rig, partial(operator, *arguments), tensors)
    return speeds | {"float8_adamw_step": _adamw_gbps(rig)}


def _gbps(rig: Rig, work: Callable[[], tuple[Tensor, ...]], read: tuple[Tensor, ...]) -> float:
    moved = sum(t.nbytes for t in (*read, *work()))
    return 1e-6 * moved / rig.milliseconds(work)


def _adamw_gbps(rig: Rig) -> float:
    """Speed of a whole optimizer step on one bf16 matrix, rounded stochastically."""
    weight = torch.nn.Parameter(rig.random(256 if rig.dry else 16_384, 4096))
    weight.grad = rig.random(*weight.shape, seed=1)
    optimizer = Float8AdamW([weight], master="bfloat16_stochastic", check_finite=False)
    optimizer.step()
    state = [t for t in optimizer.state[weight].values() if t.numel() > 1]
    moved = weight.grad.nbytes + 2 * (weight.nbytes + sum(t.nbytes for t in state))
    return float(1e-6 * moved / rig.milliseconds(optimizer.step))
