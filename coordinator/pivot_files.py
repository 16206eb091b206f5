"""Lays a finished pivot down: the model's files, and all that tells what it is beside them."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import torch
import yaml
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from coordinator.fuse_job import FuseJob
from coordinator.pivot_card import (
    ancestor,
    json_text,
    license_of,
    model_args,
    model_card,
    sums,
)
from coordinator.pivot_tasks import METRIC, RESULTS_FILE, Kind, results, task_files, tasks_of
from fusion.models import eos_id
from protos.chunks import sha256_of
from protos.public_sets import read_evals

_CANNOT: Final = (ValueError, OSError, ImportError, LookupError, TypeError, AttributeError)
"""How AutoTokenizer says that it does not know what to do with a folder."""


def write_pivot(job: FuseJob, model_folder: Path, evals: Mapping[str, Any], folder: Path) -> None:
    """Write a pivot's folder.

    Args: evals: what evals.json shall hold: scores by measure, model and domain, credit, which of
        the models is the pivot, and what lm-eval finds.
    """
    shutil.copytree(model_folder, folder, dirs_exist_ok=True)
    lineage = _lineage(job, model_folder)
    runs = sorted((job.directory / "runs").glob("*/losses.json"))
    losses = {path.parent.name: json.loads(path.read_text(encoding="utf-8")) for path in runs}
    texts = {
        "lineage.json": json_text(lineage),
        "evals.json": json_text(dict(evals)),
        "losses.json": json_text(losses),
        "round.yaml": yaml.safe_dump(lineage["spec"], sort_keys=False),
        "README.md": model_card(lineage, evals),
    }
    if "lm_eval" in evals:
        texts |= _lm_eval(job, lineage, evals, model_folder)
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
    digests = {path.name: sha256_of(path) for path in folder.iterdir()}
    (folder / "SHA256SUMS").write_text(sums(digests), encoding="utf-8")


def _lineage(job: FuseJob, model_folder: Path) -> dict[str, Any]:
    above = _text(job, "lineage.json")
    parent = json.loads(above) if above else {}
    return {
        "name": job.pivot_name,
        "parent": job.spec.pivot,
        "ancestors": [*parent.get("ancestors", ()), ancestor(parent)] if parent else [],
        "round_id": job.round_id,
        "spec": json.loads(job.spec.model_dump_json()),
        "parent_weights_sha256": sha256_of(job.directory / "pivot" / "model.safetensors"),
        # As they were shipped and receipted: each institution finds its own release here.
        "contributions": {
            name: {"sha256": sha256_of(path), "size_bytes": path.stat().st_size}
            for name, path in {**job.contributions, **job.sealed}.items()
        },
        "model": {**_tokenizer(model_folder), "license": license_of(_text(job, "README.md"))},
        "software": {"torch": torch.__version__},
    }


def _tokenizer(model_folder: Path) -> dict[str, Any]:
    """With which class the tokenizer is opened as it is, and what stands before a text."""
    own = PreTrainedTokenizerFast.from_pretrained(model_folder, local_files_only=True)
    try:
        auto = AutoTokenizer.from_pretrained(model_folder, local_files_only=True)
        backend = getattr(auto, "backend_tokenizer", None)
    except _CANNOT:  # a fusion that has been paid for does not end on it
        backend = None
    same = backend is not None and backend.to_str() == own.backend_tokenizer.to_str()
    kind = "AutoTokenizer" if same else "PreTrainedTokenizerFast"
    return {"tokenizer": kind, "prefix_token_id": eos_id(own)}


def _lm_eval(
    job: FuseJob, lineage: Mapping[str, Any], evals: Mapping[str, Any], model_folder: Path
) -> dict[str, str]:
    """The files of lm-eval by name: tasks, their data, and the results."""
    assert job.evals is not None
    own = PreTrainedTokenizerFast.from_pretrained(model_folder, local_files_only=True)
    tasks = tasks_of(read_evals(job.evals), str(own.eos_token))
    scores: dict[Kind, dict[str, float]] = {
        "text": evals["lm_eval"][METRIC["text"]],
        "choice": evals["accuracy"].get(evals["pivot"], {}),
    }
    found = results(tasks, scores, model_args(lineage))
    return {**task_files(tasks), RESULTS_FILE: json_text(found)}


def _text(job: FuseJob, name: str) -> str:
    """A file of the parent; "" when it has none of the name."""
    path = job.pivot_files.get(name)
    return "" if path is None else path.read_text(encoding="utf-8", errors="replace")
