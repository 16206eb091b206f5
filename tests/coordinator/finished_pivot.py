"""A pivot's folder as the fusion worker lays it down, of a tiny untrained model."""

import json
from pathlib import Path
from typing import Any

from coordinator.fuse_job import FuseJob
from coordinator.fuse_worker import rolling_scores, score
from coordinator.pivot_files import write_pivot
from fusion.models import Architecture, ModelSpec, build_model, save_model, train_tokenizer
from protos.spec import RoundSpec

TEXTS = [f"Code I{n}.9 is infarction of part {n}, left side; caf\u00e9." for n in range(12)]
EVALS = {
    "domains": {
        "Heart and lungs": {
            "documents": [*TEXTS[:5], "", " ".join(TEXTS)],  # the last is longer than the context
            "questions": [
                {"prompt": f"Code I{n}.9 is", "options": ["infarction", "of part", "left"],
                 "answer": n % 3}
                for n in range(7)
            ],
        },
        "brain": {"documents": TEXTS[5:]},
    }
}  # fmt: skip


def tiny_model(folder: Path, architecture: Architecture = "llama", width: int = 32) -> Path:
    """A model and its own tokenizer."""
    tokenizer = train_tokenizer(TEXTS, 300)
    spec = ModelSpec(
        architecture=architecture, hidden_size=width, layers=2, heads=2,
        vocab_size=len(tokenizer), context=64,
    )  # fmt: skip
    save_model(build_model(spec, 3), tokenizer, folder)
    return folder


def finished_pivot(folder: Path, architecture: Architecture = "llama", **change: Any) -> Path:
    """The folder of pivot-2, made from pivot-1 of the license apache-2.0."""
    parent = tiny_model(folder / "model", architecture)
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n# pivot-1\n")
    above = {
        "name": "pivot-1", "parent": "pivot-0", "round_id": "rnd-1",
        "spec": {"kind": "logits", "method": "unified"},
    }  # fmt: skip
    (folder / "lineage.json").write_text(json.dumps(above))
    (folder / "evals").write_text(json.dumps(EVALS))
    (folder / "one").write_bytes(b"x" * 1234)
    (folder / "job" / "pivot").mkdir(parents=True)
    (folder / "job" / "pivot" / "model.safetensors").symlink_to(
        parent.resolve() / "model.safetensors"
    )
    spec = {
        "name": "second", "pivot": "pivot-1", "participants": ("one",), "kind": "logits",
        "method": "unified", "prompts": "p", "training": {"steps": 1, "lr": 0.1}, **change,
    }  # fmt: skip
    job = FuseJob(
        directory=folder / "job", round_id="rnd-2", pivot_name="pivot-2",
        spec=RoundSpec.model_validate(spec),
        pivot_files={name: folder / name for name in ("README.md", "lineage.json")},
        contributions={"one": folder / "one"}, reports={}, prompts=None, evals=folder / "evals",
    )  # fmt: skip
    found = score(job.directory, parent, folder / "evals")
    evals = {
        "bpb": {"base": found["bpb"], "unified": found["bpb"]},
        "accuracy": {"base": found["accuracy"], "unified": found["accuracy"]},
        "credit": {}, "pivot": "unified",
        "lm_eval": {"bits_per_byte": rolling_scores(parent, folder / "evals")},
    }  # fmt: skip
    out = folder / "pivot-2"
    write_pivot(job, parent, evals, out)
    return out
