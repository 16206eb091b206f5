"""The FP8 benchmark on a Hopper GPU: kernels, training steps, memory and parity, in ten minutes.

    python benchmarks/fp8_gpu.py --json --out auto

`--out auto` names the file benchmarks/results/<hardware>-<date>.json. Sections are check, gemm,
quantize, steps, parity and 7b; each has its share of the ten minutes, one that fails or runs over
is reported with its error, and the rest go on. `--dry-run` runs every section at toy sizes on a
CPU, to test this program: its figures mean nothing. Progress goes to stderr; the table and, last,
one line of JSON go to stdout.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import platform
import re
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, Final

# Run as a script, this file's own folder comes first and fp8.py passes for package `fp8`.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from benchmarks import fp8_gpu_kernels as kernels
from benchmarks import fp8_gpu_steps as steps
from benchmarks.fp8_gpu_kernels import Rig
from fp8.backends.select import available
from fp8.ops import kernels_refusal
from fp8.recipe import BlockScaling

RESULTS: Final = Path(__file__).resolve().parent / "results"
SECONDS: Final = {"check": 40, "gemm": 35, "quantize": 35, "steps": 280, "parity": 80, "7b": 110}
"""What each section may take, in the order in which they run."""
KEYS: Final = ("speedup", "peak_memory_ratio", "loss_gap_pct", "gemm_tflops", "quantize_gbps")


class SectionTimeoutError(TimeoutError):
    """A section used its share of the time up."""


def refusal() -> str | None:
    """Say why the benchmark cannot run here; None when it can."""
    wanted = "wanted a GPU of compute capability 9.0 (Hopper: H100, H200) or above"
    if not torch.cuda.is_available():
        return f"found no CUDA device (torch {torch.__version__}); {wanted}; see --dry-run"
    capability = torch.cuda.get_device_capability()
    if capability < (9, 0):
        name = torch.cuda.get_device_name()
        return f"found {name} of compute capability {capability[0]}.{capability[1]}; {wanted}"
    return None


def environment(rig: Rig) -> dict[str, Any]:
    """Say where the numbers come from."""
    found: dict[str, Any] = {"torch": torch.__version__, "python": platform.python_version()}
    for package in ("triton", "transformers", "torchao", "transformer-engine"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    found["device"] = platform.processor() or platform.machine()
    if rig.device.type == "cuda":
        properties = torch.cuda.get_device_properties(rig.device)
        found |= {
            "device": properties.name,
            "memory_gb": properties.total_memory * 1e-9,
            "multiprocessors": properties.multi_processor_count,
            "capability": f"{properties.major}.{properties.minor}",
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),  # type: ignore[no-untyped-call]
        }
    found["kernels"] = kernels_refusal(rig.device) or "Triton"
    found["backends"] = dict(available(BlockScaling(), rig.device))
    return found


# ---------------------------------------------------------------------------- sections
def _check(rig: Rig, found: dict[str, Any]) -> None:
    found["check"] = kernels.check(rig)
    if not found["check"]["correct"]:
        _say("  CODES OR RESULTS DIFFER: speeds below are those of wrong kernels")


def _steps(rig: Rig, found: dict[str, Any]) -> None:
    arms = found["steps"] = {}
    try:
        steps.training_steps(rig, arms, _report)
    finally:
        found |= steps.compared(arms)


Section = Callable[[Rig, dict[str, Any]], object]
"""Measures something and puts it into the results, as it goes."""
SECTIONS: Final[Mapping[str, Section]] = {
    "check": _check,
    "gemm": lambda rig, found: found.update(kernels.gemm_table(rig)),
    "quantize": lambda rig, found: found.update(quantize_gbps=kernels.quantizer_speeds(rig)),
    "steps": _steps,
    "parity": lambda rig, found: found.update(steps.loss_parity(rig)),
    "7b": lambda rig, found: steps.seven_billion(rig, found.setdefault("7b", {}), _report),
}


@contextmanager
def _at_most(seconds: float) -> Iterator[None]:
    """Raise SectionTimeoutError in the block when the time is up."""

    def ring(_signal: int, _frame: FrameType | None) -> None:
        raise SectionTimeoutError(f"not done after {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def measure(
    device: torch.device, *, dry: bool, only: Iterable[str], save: Callable[[dict[str, Any]], None]
) -> dict[str, Any]:
    """Run the sections; `save` is told of all there is after each, so that nothing is lost."""
    began_s = time.monotonic()
    found: dict[str, Any] = {key: None for key in KEYS} | {"errors": {}, "dry_run": dry}
    found["environment"] = environment(Rig(device=device, dry=dry))
    found["seconds_by_section"] = {}
    for name in only:
        _say(f"{time.monotonic() - began_s:5.0f} s  {name}")
        start_s = time.monotonic()
        rig = Rig(device=device, dry=dry, deadline_s=start_s + SECONDS[name])
        try:
            with _at_most(SECONDS[name]):
                SECTIONS[name](rig, found)
        except Exception as error:  # noqa: BLE001 (the one place: a section must not end the rest)
            found["errors"][name] = f"{type(error).__name__}: {error}"[:2000]
            _say(f"  failed: {found['errors'][name]}")
        found["seconds_by_section"][name] = round(time.monotonic() - start_s, 1)
        found["seconds"] = round(time.monotonic() - began_s, 1)
        save(found)
    return found


# ---------------------------------------------------------------------------- the whole
def table(found: Mapping[str, Any]) -> str:
    """Lay out what there is as Markdown tables."""
    lines = ["DRY RUN: no figure below means anything", ""] if found["dry_run"] else []
    lines += [f"{found['environment']['device']}, torch {found['environment']['torch']}", ""]
    if found["gemm_tflops"]:
        arms = list(found["gemm_tflops"])
        lines += [f"| GEMM, TFLOP/s | {' | '.join(arms)} |", "|" + " --- |" * (len(arms) + 1)]
        for label in found["gemm_tflops"]["bf16"]:
            cells = (f"{found['gemm_tflops'][arm][label]:.0f}" for arm in arms)
            lines.append(f"| {label} | {' | '.join(cells)} |")
        cells = (f"{found['gemm_tflops_layer'][arm]:.0f}" for arm in arms)
        lines += [f"| whole layer | {' | '.join(cells)} |", ""]
    if found["quantize_gbps"]:
        lines += ["| kernel | GB/s |", "| --- | --- |"]
        lines += [f"| {name} | {speed:.0f} |" for name, speed in found["quantize_gbps"].items()]
        lines.append("")
    rows = {**found.get("steps", {}), **found.get("7b", {})}
    if rows:
        lines += ["| training step | tokens/s | ms | peak GB |", "| --- | --- | --- | --- |"]
        for name, row in rows.items():
            if "step_ms" in row:
                numbers = (
                    f"{row['tokens_per_s']:.0f} | {row['step_ms']:.0f} | {row['peak_gb'] or 0:.1f}"
                )
            else:
                numbers = " | ".join([next(iter(row)).replace("_", " "), "", ""])
            lines.append(f"| {name} | {numbers} |")
        lines.append("")
    lines += [f"{key}: {found[key]}" for key in ("speedup", "peak_memory_ratio", "loss_gap_pct")]
    lines += [f"{name} failed: {error}" for name, error in found["errors"].items()]
    return "\n".join(lines)


def output_path(wanted: str | None, *, dry: bool) -> Path | None:
    """Return the file to write, or None; `auto` is named by hardware and date.

    Raises: ValueError for a dry run that would write among the results.
    """
    if wanted is None:
        return None
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()
    hardware = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    file = f"{hardware}-{datetime.datetime.now(datetime.UTC).date()}.json"
    path = RESULTS / file if wanted == "auto" else Path(wanted)
    if dry and path.resolve().is_relative_to(RESULTS):
        raise ValueError(f"a dry run has no results: {path} is in {RESULTS}; give another --out")
    return path


def main(arguments: Iterable[str] | None = None) -> int:
    """Run the benchmark. Returns 0, 1 when a section failed, 2 when it cannot run here."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default=",".join(SECTIONS), help="sections, comma-separated")
    parser.add_argument("--out", help="file to write the JSON to, or auto")
    parser.add_argument("--dry-run", action="store_true", help="toy sizes on a CPU, as a test")
    parser.add_argument(
        "--json", action="store_true", help="the table to stderr, only the JSON to stdout"
    )
    options = parser.parse_args(None if arguments is None else list(arguments))
    only = options.only.split(",")
    if unknown := [name for name in only if name not in SECTIONS]:
        parser.error(f"no section {unknown[0]!r}; there are {', '.join(SECTIONS)}")
    why_not = None if options.dry_run else refusal()
    try:
        path = output_path(options.out, dry=options.dry_run)
    except ValueError as error:
        why_not = str(error)
    if why_not is not None:
        _say(f"fp8_gpu: {why_not}")
        return 2

    def save(found: dict[str, Any]) -> None:
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(found, indent=1) + "\n")

    device = torch.device("cpu" if options.dry_run else "cuda")
    # In the order of SECTIONS: correctness before speed, whatever the order asked for.
    found = measure(device, dry=options.dry_run, only=[s for s in SECTIONS if s in only], save=save)
    print(table(found), file=sys.stderr if options.json else sys.stdout)
    print(json.dumps(found))
    return 1 if found["errors"] else 0


def _report(name: str, row: Mapping[str, Any]) -> None:
    cells = (f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items())
    _say(f"  {name}: {', '.join(cells)}")


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
