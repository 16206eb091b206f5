"""Whole jobs with tiny models: what a spec asks for is in the pivot directory."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from coordinator.fuse_job import FuseJob
from coordinator.fuse_worker import work
from coordinator.merging import OUTER_FILE
from fusion.delta_file import write_delta
from fusion.extract import extract_to_file
from fusion.models import ModelSpec, build_model, load_model, parameter_arrays, save_model
from fusion.models import train_tokenizer as make_tokenizer
from fusion.outer import OuterSettings, load_outer, outer_step
from protos.chunks import sha256_of
from protos.public_sets import Prompt, write_prompts
from tests.coordinator.test_fuse_worker import spec

TEXTS = [f"Code I{n} is infarction of part {n}, left side." for n in range(8)]
TRAINING = {"steps": 2, "lr": 0.001, "batch_size": 2, "seq_len": 16, "warmup_steps": 0}


def tiny(folder: Path, vocab_size: int, seed: int) -> Path:
    tokenizer = make_tokenizer(TEXTS[: vocab_size - 280], vocab_size)
    shape = ModelSpec(
        architecture="llama", hidden_size=32, layers=1, heads=2, vocab_size=len(tokenizer)
    )
    save_model(build_model(shape, seed), tokenizer, folder)
    return folder


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("job")
    tiny(folder / "pivot", 300, 0)
    prompts = [Prompt(text=t, domain="ab"[n % 2]) for n, t in enumerate(TEXTS)]
    write_prompts(folder / "prompts.jsonl", prompts)
    domains = {d: {"documents": [f"Code {d} is known."]} for d in ("a", "b")}
    (folder / "evals.json").write_text(json.dumps({"domains": domains}))
    for name, vocab_size in (("x", 290), ("y", 310), ("z", 320)):
        expert = load_model(tiny(folder / name, vocab_size, 5))
        extract_to_file(
            folder / f"{name}.logits", *expert, TEXTS, top_k=8,
            prompt_set_sha256=sha256_of(folder / "prompts.jsonl"), model_sha256="a" * 64,
        )  # fmt: skip
    return folder


def job(place: Path, directory: Path, files: dict[str, Path], **change: Any) -> FuseJob:
    made = FuseJob(
        directory=directory,
        round_id="rnd-1",
        pivot_name="pivot-1",
        spec=spec(participants=tuple(sorted(files)), training=TRAINING, **change),
        pivot_files={p.name: p for p in (place / "pivot").iterdir()},
        contributions=files,
        reports={},
        prompts=place / "prompts.jsonl",
        evals=place / "evals.json",
    )
    made.save()
    return made


def test_credit_is_told_by_domain_and_by_leaving_each_source_out(
    place: Path, tmp_path: Path
) -> None:
    files = {name: place / f"{name}.logits" for name in ("x", "y", "z")}
    made = job(place, tmp_path, files, controls=("leave_one_out",), max_share=0.2)
    work(made)
    evals = json.loads((made.result / "evals.json").read_text())
    assert list(evals["bpb"]) == ["base", "unified"]
    assert evals["credit"]["suspicion"].keys() == {"x", "y", "z"}
    shares = evals["credit"]["share"]
    assert shares.keys() == {"a", "b", "all"}
    for told in shares.values():
        assert sum(told.values()) == pytest.approx(1, abs=1e-4)
    assert all(shares["all"][name] <= 0.2 + 1e-4 for name in ("x", "y", "z"))
    assert evals["credit"]["leave_one_out"].keys() == {"x", "y", "z"}
    card = (made.result / "README.md").read_text()
    assert "## Credit" in card
    assert f"| {shares['all']['x']:.2f} |" in card


def test_an_outer_optimizer_remembers_from_pivot_to_pivot(place: Path, tmp_path: Path) -> None:
    settings = OuterSettings(method="diloco")
    base = parameter_arrays(load_model(place / "pivot")[0])
    pivot, state = place / "pivot", None
    for number in (1, 2):
        rng = np.random.default_rng(number)
        deltas = {
            name: {k: rng.normal(0, 0.01, v.shape).astype(np.float32) for k, v in base.items()}
            for name in ("x", "y")
        }
        digest, files = sha256_of(pivot / "model.safetensors"), {}
        for name, delta in deltas.items():
            files[name] = tmp_path / f"{name}{number}.delta"
            write_delta(files[name], delta, pivot_sha256=digest, steps=1, tokens=1)
        made = job(
            place, tmp_path / str(number), files, kind="weights", method="merge", outer="diloco"
        )
        made = FuseJob(**{
            **{f: getattr(made, f) for f in made.__dataclass_fields__},
            "pivot_files": {p.name: p for p in pivot.iterdir()},
        })  # fmt: skip
        made.save()
        work(made)
        base, state = outer_step(base, deltas, settings, state)
        found = parameter_arrays(load_model(made.result)[0])
        for name, value in base.items():
            assert found[name] == pytest.approx(value, abs=1e-6)
        pivot = made.result
    digest = sha256_of(pivot / "model.safetensors")
    assert load_outer(pivot / OUTER_FILE, settings, pivot_sha256=digest).rounds == 2
