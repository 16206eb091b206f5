"""What the sources of a local fusion know: `python -m cofuse.local_sources TASK.json`, a child.

Makes each file of the task that is not there yet, one source after the other, so that memory holds
one model. A file appears whole or not at all; a killed child goes on with what is missing.
"""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.numpy import save_file

from coordinator.fuse_worker import score
from coordinator.merging import merge_settings
from fusion.fisher import fisher_on_texts
from fusion.merge_files import merge_directories
from fusion.models import load_model
from participant.export import extract_as_asked, score_pair_file
from protos.chunks import sha256_of
from protos.process import die_with_parent
from protos.public_sets import read_prompts
from protos.spec import RoundSpec


def make_logits(
    task: dict[str, Any], source: dict[str, Any], on_progress: Callable[[int, int], None]
) -> None:
    """Write what a source's model thinks of the prompt set."""
    spec = RoundSpec.model_validate_json(json.dumps(task["spec"]))
    pivot = Path(task["pivot"])
    extract_as_asked(
        Path(source["made"]),
        lambda: load_model(Path(source["path"])),
        read_prompts(Path(task["prompts"])),
        spec,
        prompt_set_sha256=task["prompts_sha256"],
        model_sha256=source["model_sha256"],
        pivot=(pivot, sha256_of(pivot / "model.safetensors")) if spec.ship_share < 1 else None,
        on_progress=on_progress,
    )


def make_pair_scores(
    task: dict[str, Any], source: dict[str, Any], on_progress: Callable[[int, int], None]
) -> None:
    """Write how likely a source's model finds the answers of each pair."""
    score_pair_file(
        Path(source["made"]),
        lambda: load_model(Path(source["path"])),
        Path(task["pairs"]),
        model_sha256=source["model_sha256"],
        tell=on_progress,
    )


def make_merged(
    task: dict[str, Any], on_progress: Callable[[int, int, str], None] | None = None
) -> None:
    """Write the merge of the sources' models around the pivot, tensor by tensor."""
    out = Path(task["merged"])
    out.parent.mkdir(parents=True, exist_ok=True)
    spec = RoundSpec.model_validate_json(json.dumps(task["spec"]))
    fisher = None
    if spec.merge == "fisher":
        fisher = {row["name"]: _fisher_file(task, row, spec) for row in task["sources"]}
    merge_directories(
        Path(task["pivot"]),
        {source["name"]: Path(source["path"]) for source in task["sources"]},
        out,
        merge_settings(spec),
        fisher=fisher,
        on_progress=on_progress,
    )


def _fisher_file(task: dict[str, Any], source: dict[str, Any], spec: RoundSpec) -> Path:
    """Measure a source on the prompt set; one model is in memory at a time."""
    path = Path(task["merged"]).with_name(f"fisher-{source['name']}.safetensors")
    _tell("progress", phase="fisher", source=source["name"])
    texts = read_prompts(Path(task["prompts"]))
    model = load_model(Path(source["path"]))
    save_file(fisher_on_texts(*model, texts, seq_len=spec.training.seq_len, seed=spec.seed), path)
    return path


def make_scores(task: dict[str, Any], source: dict[str, Any]) -> None:
    """Write how good a source's model is on the evaluation set."""
    folder = Path(source["path"])
    text = json.dumps(score(folder, folder, Path(task["evals"])), sort_keys=True)
    path = Path(source["scores"])
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def main(argv: list[str]) -> int:
    """Do one task."""
    die_with_parent()
    task = json.loads(Path(argv[0]).read_text(encoding="utf-8"))
    for source in task["sources"]:

        def tell(done: int, total: int, name: str = source["name"]) -> None:
            _tell("progress", phase="extract", source=name, done=done, total=total)

        if _missing(source["made"]):
            make = make_pair_scores if task["spec"]["kind"] == "pairs" else make_logits
            make(task, source, tell)
        if _missing(source["scores"]):
            _tell("progress", phase="score", source=source["name"])
            make_scores(task, source)
    if _missing(task["merged"]):
        make_merged(task, lambda done, total, _: _tell_merge(done, total))
    return 0


def _missing(path: str | None) -> bool:
    return path is not None and not Path(path).exists()


def _tell_merge(done: int, total: int) -> None:
    _tell("progress", phase="merge", done=done, total=total)


def _tell(kind: str, **body: Any) -> None:
    os.write(1, (json.dumps({"kind": kind, **body}) + "\n").encode())


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
