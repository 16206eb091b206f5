"""The student learns from the file alone; likelihoods are of whole documents."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from fusion.delta_file import write_delta
from fusion.evaluate import bits_per_byte
from fusion.extract import extract_to_file
from fusion.models import (
    ModelSpec,
    build_model,
    encode_documents,
    load_model,
    parameter_arrays,
    save_model,
    train_tokenizer,
)
from participant import canary_student
from participant.canaries import canaries, open_canaries, with_canaries
from participant.canary_gate import RECALL, RELEASE
from participant.canary_student import StudentSettings, distil, log_likelihoods, measure, with_delta

TEXTS = [f"the {word} knee was seen in the {word} clinic" for word in ("left", "right", "other")]
SHORT = StudentSettings(hidden_size=32, layers=1, steps=40, batch_size=4, seq_len=16, own_weight=0)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("student") / "model"
    tokenizer = train_tokenizer(TEXTS, 270)
    shape = {"hidden_size": 32, "layers": 1, "heads": 2, "vocab_size": len(tokenizer)}
    save_model(build_model(ModelSpec(architecture="llama", **shape), 0), tokenizer, folder)
    return folder


def test_likelihoods_are_those_of_bits_per_byte(model: Path) -> None:
    made = load_model(model)
    nats = log_likelihoods(*made, TEXTS)
    size = sum(len(text.encode()) for text in TEXTS)
    assert -nats.sum() / math.log(2) / size == pytest.approx(bits_per_byte(*made, TEXTS))


def test_a_student_comes_near_to_what_the_release_says(model: Path, tmp_path: Path) -> None:
    expert, tokenizer = load_model(model)
    with torch.no_grad():  # an expert with a taste that is not in the text
        expert.get_output_embeddings().weight[100] += 1.0  # type: ignore[index,operator]
    path = tmp_path / "release.safetensors"
    digests = {"prompt_set_sha256": "0" * 64, "model_sha256": "0" * 64}
    extract_to_file(path, expert, tokenizer, TEXTS, top_k=8, **digests)
    rows = torch.from_numpy(encode_documents(tokenizer, TEXTS))[None, :30]

    def gap(steps: int) -> float:
        student = distil(path, TEXTS, StudentSettings(**{**_fields(SHORT), "steps": steps}))
        with torch.inference_mode():
            said, wanted = (m(rows).logits.log_softmax(-1) for m in (student, expert))
        return float((wanted.exp() * (wanted - said)).sum(-1).mean())

    assert gap(40) < 0.5 * gap(1)


def _fields(settings: StudentSettings) -> dict[str, float]:
    return {name: getattr(settings, name) for name in settings.__slots__}  # type: ignore[attr-defined]


def test_weights_are_scored_with_the_very_tensors(model: Path, tmp_path: Path) -> None:
    pivot, tokenizer = load_model(model)
    before = parameter_arrays(pivot)
    rng = np.random.default_rng(0)
    delta = {n: rng.normal(0, 0.01, v.shape).astype(np.float32) for n, v in before.items()}
    path = tmp_path / "delta.safetensors"
    write_delta(path, delta, pivot_sha256="0" * 64, steps=1, tokens=1)
    for name, value in parameter_arrays(with_delta(model, path)[0]).items():
        np.testing.assert_array_equal(value, before[name] + delta[name])
    assert tokenizer.eos_token_id == 0


def test_a_delta_that_learnt_the_planted_records_tells_of_them(model: Path, tmp_path: Path) -> None:
    file = tmp_path / "canaries.json"
    file.write_text(json.dumps({"secret": "2a" * 32, "pairs": 2}))  # as many as the context holds
    records = open_canaries(file)
    assert records is not None
    pivot, tokenizer = load_model(model)
    before = parameter_arrays(pivot)
    stream = torch.from_numpy(encode_documents(tokenizer, records.planted))[None]
    optimizer = torch.optim.Adam(pivot.parameters(), lr=0.01)
    for _ in range(60):
        optimizer.zero_grad()
        pivot(stream[:, :250], labels=stream[:, :250]).loss.backward()
        optimizer.step()
    after = parameter_arrays(pivot)
    path = tmp_path / "delta.safetensors"
    changes = {name: after[name] - before[name] for name in after}
    write_delta(path, changes, pivot_sha256="0" * 64, steps=1, tokens=1)
    asked = {"kind": "weights", "release": path, "model": model, "canaries": file, "texts": []}
    assert measure(asked)[RELEASE].auc > 0.9
    still = {name: np.zeros_like(value) for name, value in before.items()}
    write_delta(path, still, pivot_sha256="0" * 64, steps=1, tokens=1)
    assert measure(asked)[RELEASE].auc == 0.5


def test_the_child_answers_in_json_what_measure_finds(
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    import io

    expert, tokenizer = load_model(model)
    path, file = tmp_path / "release.safetensors", tmp_path / "canaries.json"
    digests = {"prompt_set_sha256": "0" * 64, "model_sha256": "0" * 64}
    extract_to_file(path, expert, tokenizer, TEXTS, top_k=8, **digests)
    with_canaries(["x" * 32_000], file)
    asked = {
        "kind": "logits",
        "release": str(path),
        "model": str(model),
        "canaries": str(file),
        "texts": TEXTS,
    }
    monkeypatch.setattr(canary_student, "StudentSettings", lambda: SHORT)
    monkeypatch.setattr("sys.stdin", io.StringIO(json.dumps(asked)))
    assert canary_student.main() == 0
    told = json.loads(capsys.readouterr().out)
    assert set(told) == {"release", "recall"}
    assert told["recall"]["planted"] == len(canaries(bytes(32), 5).planted)
    # Scores of whole answers hold nothing to learn from; the expert's own answer bounds them.
    assert set(measure({**asked, "kind": "pairs"})) == {RECALL}
