"""A copy of the pivot that is trained here: what it reads, and that it is made once."""

import json
from pathlib import Path
from typing import Any

import pytest

from fusion.codec import LogitFile
from fusion.evaluate import bits_per_byte
from fusion.models import ModelSpec, build_model, load_model, save_model, train_tokenizer
from participant.export import LocalTraining, export_delta, export_logits, grow_expert
from protos.chunks import sha256_of
from protos.messages import Assignment, FileRef
from protos.public_sets import read_prompts

PRIVATE = "the quick brown fox jumps over the lazy dog, and she sells sea shells.\n"
PUBLIC = "zebras graze; buzzards gaze. amazed, a wizard razed the plaza by the azure haze.\n"


@pytest.fixture
def home(tmp_path: Path) -> Path:
    tokenizer = train_tokenizer([PRIVATE, PUBLIC], 260)
    spec = ModelSpec(
        architecture="llama", hidden_size=32, layers=1, heads=2, vocab_size=len(tokenizer)
    )
    save_model(build_model(spec, 0), tokenizer, tmp_path / "pivot")
    (tmp_path / "corpus").write_text(json.dumps({"text": PRIVATE * 20}))
    (tmp_path / "prompts").write_text(json.dumps({"text": PUBLIC * 20}))
    return tmp_path


def _assignment(home: Path, **spec: Any) -> Assignment:
    prompts = home / "prompts"
    digest, weights = sha256_of(prompts), sha256_of(home / "pivot" / "model.safetensors")
    training = {"steps": 30, "batch_size": 2, "seq_len": 32, "lr": 1e-2, "warmup_steps": 1}
    kind = {"kind": "logits", "method": "unified", "grow": training}
    names = {"name": "x", "pivot": "pivot-0", "participants": ["a"]}
    asked = {**names, **kind, "training": training, "prompts": f"sha256:{digest}", **spec}
    size = prompts.stat().st_size
    return Assignment(
        round_id="rnd-1",
        attempt=1,
        submitted_by="ada",
        spec=asked,  # type: ignore[arg-type]
        prompts=FileRef(name="prompts.jsonl", sha256=digest, size_bytes=size),
        pivot_sha256=weights,
        deadline_unix_ms=0,
    )


def _training(home: Path, *, rehearses: bool = False, stopped: bool = False) -> LocalTraining:
    return LocalTraining(
        corpus=home / "corpus",
        prompts=home / "prompts" if rehearses else None,
        on_progress=lambda _: None,
        should_stop=lambda: stopped,
    )


def _outbox(home: Path, name: str) -> Path:
    (home / name).mkdir(exist_ok=True)
    return home / name


def test_a_copy_that_rehearses_knows_the_public_text_better(home: Path) -> None:
    loss = {}
    for rehearses in (True, False):
        outbox = _outbox(home, f"outbox-{rehearses}")
        training = _training(home, rehearses=rehearses)
        folder = grow_expert(home / "pivot", training, _assignment(home), outbox)
        assert folder is not None
        public = read_prompts(home / "prompts")
        loss[rehearses] = bits_per_byte(*load_model(folder), public)
    assert loss[True] < loss[False] - 0.3


def test_a_grown_expert_is_the_model_that_the_contribution_tells_of(home: Path) -> None:
    asked, outbox = _assignment(home), _outbox(home, "outbox")
    folder = grow_expert(home / "pivot", _training(home), asked, outbox)
    assert folder is not None
    path = export_logits(folder, home / "prompts", asked, outbox, lambda *_: None)
    header = LogitFile(path, read_prompts(home / "prompts")).header
    assert header.model_sha256 == sha256_of(folder / "model.safetensors")
    assert header.model_sha256 != asked.pivot_sha256


def test_what_was_grown_before_is_not_trained_again(home: Path) -> None:
    outbox, pivot = _outbox(home, "outbox"), home / "pivot"
    folder = grow_expert(pivot, _training(home), _assignment(home), outbox)
    assert grow_expert(pivot, _training(home, stopped=True), _assignment(home), outbox) == folder


@pytest.mark.parametrize("make", [grow_expert, export_delta])
def test_a_copy_that_was_stopped_leaves_nothing_to_ship(home: Path, make: Any) -> None:
    outbox = _outbox(home, "outbox")
    assert make(home / "pivot", _training(home, stopped=True), _assignment(home), outbox) is None
    assert not [p for p in outbox.iterdir() if not p.name.startswith("checkpoint")]
