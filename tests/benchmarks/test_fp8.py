"""The FP8 benchmarks run, and answer under the keys that others read."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import fp8, fp8_gpu, fp8_gpu_steps
from benchmarks.fp8_memory import measure_memory, saved_bytes
from benchmarks.fp8_models import SHAPES, Study, text

TINY = Study(hidden=128, inter=192, layers=1, base_steps=2, steps=2, eval_batches=1, seq_len=32)
without_a_gpu = pytest.mark.skipif(
    fp8_gpu.refusal() is None, reason="there is a GPU: the benchmark itself would run"
)


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def leaves(found: Any) -> list[float]:
    if isinstance(found, dict | list):
        return [
            x
            for part in (found.values() if isinstance(found, dict) else found)
            for x in leaves(part)
        ]
    return [found] if isinstance(found, float) else []


def test_the_cpu_benchmark_answers_under_its_keys(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(fp8, "QUICK_STUDY", TINY)
    out = tmp_path / "new" / "fp8.json"
    assert fp8.main(["--quick", "--no-compile", "--json", "--out", str(out)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found == json.loads(out.read_text())
    assert found["quick"] is True
    assert set(found["saved_bytes"]) == {"bf16", "fp8_inputs", "swiglu", "recompute"}
    assert set(found["parity_gap_pct"]) == {"bf16", *fp8.QUICK_RECIPES}
    for key in ("linear_vs_bf16", "linear_vs_fp32", "moment_bytes_per_param"):
        assert found[key] > 0
    assert all(map(math.isfinite, leaves(found)))


def test_every_way_of_keeping_less_keeps_less() -> None:
    kept, layer = saved_bytes(SHAPES["toy"], 128)
    order = ["recompute", "swiglu", "fp8_inputs", "bf16", "bf16_eager"]
    assert sorted(kept, key=kept.__getitem__) == order
    assert all(p.grad is not None for p in layer.parameters())


def test_the_layer_of_a_real_model_keeps_what_the_docs_say() -> None:
    # Counted by hand: 6 tensors of the model's width (7 with q), k and v, 3 of the MLP's, and the
    # log-sum-exp of 12 heads in fp32.
    shape = SHAPES["1.5B"]
    per_token = 2 * (6 * shape.hidden + 2 * 256 + 3 * shape.inter) + 4 * shape.heads
    kept, _ = saved_bytes(shape, 128)
    norms = 2 * 4  # one fp32 number per norm
    assert kept["bf16"] == per_token + norms
    wanted = {"fp8_inputs": -14, "swiglu": -39, "recompute": -51}
    for name, change in wanted.items():
        assert 100 * (kept[name] / kept["bf16"] - 1) == pytest.approx(change, abs=1.6)


def test_eight_bit_moments_weigh_two_bytes() -> None:
    assert measure_memory(quick=True)["moment_bytes_per_param"] <= 2.1


def test_training_text_and_held_out_text_are_apart() -> None:
    train, held_out = (text(train=flag).tobytes() for flag in (True, False))
    assert len(train) > 500_000
    assert len(held_out) > 50_000
    assert held_out[:2000] not in train


def test_causal_recipes_leak_nothing_and_tensor_wise_scaling_does() -> None:
    base, batch = TINY.base(), TINY.evaluation()[0]
    for name, exact in {"block_p2": True, "rowwise": True, "current": False}.items():
        prepare, loss_fn = fp8._arms(quick=False)[name]
        found = fp8.leaks(fp8._ready(base, prepare), batch, loss_fn)
        assert (max(found.values()) == 0) is exact, name


@without_a_gpu
def test_without_a_gpu_the_gpu_benchmark_says_what_it_wants(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert fp8_gpu.main([]) == 2
    said = capsys.readouterr()
    assert "compute capability 9.0" in said.err
    assert "found" in said.err
    assert said.out == ""


def test_a_dry_run_measures_nothing_and_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert fp8_gpu.main(["--dry-run", "--only", "quantize,gemm"]) == 0
    printed = capsys.readouterr().out
    found = json.loads(printed.splitlines()[-1])
    assert printed.startswith("DRY RUN")
    assert found["dry_run"] is True
    assert set(fp8_gpu.KEYS) <= found.keys()
    assert list(found["seconds_by_section"]) == ["gemm", "quantize"]
    assert found["errors"] == {}
    assert set(found["gemm_tflops"]) == {"bf16", "block", "rowwise", "tensorwise"}
    assert all(map(math.isfinite, leaves(found)))


def test_a_dry_run_leaves_the_results_alone(capsys: pytest.CaptureFixture[str]) -> None:
    for path in ("auto", str(fp8_gpu.RESULTS / "mine.json")):
        assert fp8_gpu.main(["--dry-run", "--out", path]) == 2
        assert "dry run" in capsys.readouterr().err


def test_a_section_that_fails_is_named_and_the_rest_go_on(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(rig: Any, found: dict[str, Any]) -> None:
        found["half"] = 1
        raise RuntimeError("no kernel image")

    sections = {"check": broken, "gemm": lambda rig, found: found.update(gemm_tflops=None)}
    monkeypatch.setattr(fp8_gpu, "SECTIONS", sections)
    out = tmp_path / "out.json"
    assert fp8_gpu.main(["--dry-run", "--only", "check,gemm", "--out", str(out)]) == 1
    found = json.loads(out.read_text())
    assert found["errors"] == {"check": "RuntimeError: no kernel image"}
    assert found["half"] == 1
    assert list(found["seconds_by_section"]) == ["check", "gemm"]
    capsys.readouterr()


def test_a_section_that_takes_too_long_is_stopped(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def endless(rig: Any, found: dict[str, Any]) -> None:
        while True:
            pass

    monkeypatch.setattr(fp8_gpu, "SECTIONS", {"check": endless})
    monkeypatch.setattr(fp8_gpu, "SECONDS", {"check": 0.2})
    assert fp8_gpu.main(["--dry-run", "--only", "check"]) == 1
    assert "SectionTimeoutError" in capsys.readouterr().err


def test_an_arm_that_does_not_fit_or_fails_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    job = fp8_gpu_steps.Job(
        shape=SHAPES["toy"], mode="bf16", rows=1, context=32, backend="emulated", compiler="eager"
    )
    errors = iter([torch.OutOfMemoryError("CUDA out of memory.\nTried"), RuntimeError("bad")])

    def run(*_: Any) -> dict[str, Any]:
        raise next(errors)

    monkeypatch.setattr(fp8_gpu_steps, "run", run)
    device = torch.device("cpu")
    assert fp8_gpu_steps.attempt(job, device) == {"out_of_memory": "CUDA out of memory."}
    assert fp8_gpu_steps.attempt(job, device) == {"failed": "RuntimeError: bad"}


def test_ratios_are_fp8_over_bf16_of_the_fastest_mode() -> None:
    arms: fp8_gpu_steps.Arms = {
        "1.5B-8k bf16": {"tokens_per_s": 10.0, "peak_gb": 100.0, "peak_gb_mixed_adamw": 120.0},
        "1.5B-8k recompute": {
            "tokens_per_s": 11.0,
            "peak_gb": 60.0,
            "peak_gb_float8_adamw": 48.0,
        },
        "1.5B-8k float8": {"tokens_per_s": 12.0, "peak_gb": 70.0},
        "1.5B-8k plain": {"failed": "RuntimeError: bad"},
        "1.5B-2k bf16": {"out_of_memory": "CUDA"},
        "1.5B-2k float8": {"tokens_per_s": 12.0, "peak_gb": 70.0},
    }
    found = fp8_gpu_steps.compared(arms)
    assert found["mode"] == "float8"
    assert found["speedup"] == {"1.5B-2k": None, "1.5B-8k": 1.2}
    assert found["peak_memory_ratio"] == {
        "1.5B-2k": None,
        "1.5B-8k": 0.7,
        "1.5B-8k recompute": 0.6,
        "1.5B-8k recompute, Float8AdamW": 0.4,
    }


@pytest.mark.slow
def test_the_steps_and_parity_sections_run(capsys: pytest.CaptureFixture[str]) -> None:
    assert fp8_gpu.main(["--dry-run", "--only", "steps,parity,7b"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert set(found["speedup"]) == {"1.5B-2k", "1.5B-8k"}
    assert all(x is not None for x in found["speedup"].values())
    assert math.isfinite(found["loss_gap_pct"])
    assert len(found["7b"]) == 3


@pytest.mark.slow
def test_the_same_seed_gives_the_same_gap() -> None:
    study = replace(TINY, seed=3)
    first, second = (fp8.parity(study, quick=True)["block_p2"]["gap_pct"] for _ in range(2))
    assert first == second
