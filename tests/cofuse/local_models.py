"""Tiny models, a prompt set and a spec on disk: what a local fusion starts from."""

import json
from pathlib import Path
from typing import Any

import yaml

from fusion.models import ModelSpec, build_model, save_model, train_tokenizer

HEART = [f"The heart valve number {i} narrows when the aorta stiffens." for i in range(12)]
NERVE = [f"The nerve number {i} carries a signal to the cortex." for i in range(12)]
TEXTS = HEART + NERVE
SPEC: dict[str, Any] = {
    "pivot": "pivot",
    "sources": {"heart": "heart", "nerve": "nerve"},
    "method": "unified",
    "prompts": "prompts.jsonl",
    "evals": "evals.json",
    "top_k": 4,
    "training": {"steps": 3, "batch_size": 2, "seq_len": 16, "lr": 0.003, "warmup_steps": 1},
}
MERGE: dict[str, Any] = {
    "pivot": "pivot",
    "sources": {"first": "pivot-1", "second": "pivot-2"},
    "method": "merge",
    "merge": "linear",
    "evals": "evals.json",
}


def lay_out(folder: Path) -> Path:
    """Three architectures with tokenizers of their own, and two more models of the pivot's."""
    pivot = train_tokenizer(TEXTS, 300)
    models = {
        "pivot": ("llama", pivot, 0),
        "pivot-1": ("llama", pivot, 1),
        "pivot-2": ("llama", pivot, 2),
        "heart": ("qwen2", train_tokenizer(HEART, 340), 3),
        "nerve": ("gpt_neox", train_tokenizer(NERVE, 280), 4),
    }
    for name, (architecture, tokenizer, seed) in models.items():
        spec = ModelSpec(
            architecture=architecture,  # type: ignore[arg-type]
            hidden_size=16,
            layers=1,
            heads=2,
            vocab_size=len(tokenizer),
            context=64,
            intermediate_size=16,
        )
        save_model(build_model(spec, seed), tokenizer, folder / name)
    lines = (json.dumps({"text": text}) + "\n" for text in TEXTS)
    (folder / "prompts.jsonl").write_text("".join(lines))
    question = {"prompt": "The nerve", "options": ["carries a signal", "narrows"], "answer": 0}
    domains = {
        "heart": {"documents": HEART[:2]},
        "nerve": {"documents": NERVE[:2], "questions": [question]},
        "exam": {"questions": [question], "lettered": True},
    }
    (folder / "evals.json").write_text(json.dumps({"domains": domains}))
    return folder


def write_spec(folder: Path, values: dict[str, Any], name: str = "fuse.yaml") -> Path:
    """Write a spec beside the models."""
    (folder / name).write_text(yaml.safe_dump(values, sort_keys=False))
    return folder / name
