"""What a round asks for, made from the expert: typed arrays in the outbox, nothing else.

The same question to the same expert has the same answer: it is kept, and not computed twice.
"""

import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerFast

from fp8.train import Progress, TrainResult
from fusion.budget import Budget
from fusion.codec import LogitFile
from fusion.contribution import CODEC_VERSION
from fusion.delta_file import write_delta
from fusion.extract import extract_to_file
from fusion.merge import subtract
from fusion.models import load_model, parameter_arrays, save_model
from fusion.pair_file import read_pairs
from fusion.pair_scores import write_scores
from fusion.pair_scoring import score_pairs
from fusion.scoreboard import scores_of
from participant.canaries import open_canaries
from participant.durable import sync_tree
from participant.pivots import WEIGHTS
from participant.stages.cpt import adapt_pivot, open_expert
from protos.chunks import sha256_of
from protos.messages import Assignment, Scores
from protos.public_sets import read_evals, read_prompts
from protos.spec import RoundSpec, TrainingSpec


def export_logits(
    expert: Path,
    prompts: Path,
    assignment: Assignment,
    outbox: Path,
    on_progress: Callable[[int, int], None],
    *,
    pivot: Path | None = None,
) -> Path:
    """Write the expert's log-probabilities on the prompt set as the spec wants; return the file.

    The expert is the folder of a model; the pivot that of the round's, for a spec that ships only
    where the expert beats it.
    """
    assert assignment.prompts is not None
    spec, texts = assignment.spec, read_prompts(prompts)
    model_sha256 = sha256_of(expert / WEIGHTS)
    asked: dict[str, float] = {"k": spec.top_k, "v": CODEC_VERSION}
    if spec.sampler == "samples":
        asked |= {"n": spec.draws, "s": spec.seed}
    if pivot is not None:
        asked |= {"share": spec.ship_share}
    names = [assignment.prompts.sha256[:16], model_sha256[:16]]
    names += [] if pivot is None else [assignment.pivot_sha256[:16]]
    names += [f"{key}{value}" for key, value in asked.items()]
    path = outbox / f"logits-{'-'.join(names)}.safetensors"
    if path.exists():
        return path
    extract_as_asked(
        path,
        lambda: open_expert(expert),
        texts,
        spec,
        prompt_set_sha256=assignment.prompts.sha256,
        model_sha256=model_sha256,
        pivot=None if pivot is None else (pivot, assignment.pivot_sha256),
        on_progress=on_progress,
    )
    return path


def export_pairs(
    expert: Path,
    pairs: Path,
    assignment: Assignment,
    outbox: Path,
    on_progress: Callable[[int, int], None],
) -> Path:
    """Write how likely the expert, a model's folder, finds both answers of each pair."""
    assert assignment.pairs is not None
    model_sha256 = sha256_of(expert / WEIGHTS)
    path = outbox / f"pairs-{assignment.pairs.sha256[:16]}-{model_sha256[:16]}.json"
    if not path.exists():
        score_pair_file(
            path, lambda: open_expert(expert), pairs, model_sha256=model_sha256, tell=on_progress
        )
    return path


def score_pair_file(
    path: Path,
    load: Callable[[], tuple[PreTrainedModel, PreTrainedTokenizerFast]],
    pairs: Path,
    *,
    model_sha256: str,
    tell: Callable[[int, int], None],
) -> None:
    """Write what a model thinks of every pair of a file; `path` appears whole or not at all."""
    asked = read_pairs(pairs).pairs
    partial = path.with_name(path.name + ".partial")
    write_scores(partial, score_pairs(*load(), asked, tell), asked, model_sha256=model_sha256)
    os.replace(partial, path)


def extract_as_asked(
    path: Path,
    load: Callable[[], tuple[PreTrainedModel, PreTrainedTokenizerFast]],
    texts: Sequence[str],
    spec: RoundSpec,
    *,
    prompt_set_sha256: str,
    model_sha256: str,
    pivot: tuple[Path, str] | None = None,
    on_progress: Callable[[int, int], None],
) -> None:
    """Write what a model thinks of the texts, the rows chosen as the spec says.

    Args: pivot: folder and weights digest of the pivot to beat, where ship_share is below 1.
    """
    options: dict[str, Any] = {"prompt_set_sha256": prompt_set_sha256}
    known = path.with_name(path.name + ".pivot")
    if pivot is not None:
        folder, digest = pivot
        base, words = load_model(folder)
        extract_to_file(known, base, words, texts, top_k=1, model_sha256=digest, **options)
        options |= {"budget": Budget(spec.ship_share), "pivot": LogitFile(known, texts)}
    extract_to_file(
        path,
        *load(),
        texts,
        top_k=spec.top_k,
        model_sha256=model_sha256,
        on_progress=on_progress,
        sampler=spec.sampler,
        draws=spec.draws,
        seed=spec.seed,
        **options,
    )
    known.unlink(missing_ok=True)


@dataclass(frozen=True, kw_only=True)
class LocalTraining:
    """How a copy of the pivot is trained at this participant."""

    corpus: Path
    prompts: Path | None
    """The round's prompt set, for a spec that rehearses it."""
    on_progress: Callable[[Progress], None]
    should_stop: Callable[[], bool]
    canaries: Path | None = None
    """Where the records planted in the text are kept."""

    def adapt(
        self, pivot: Path, asked: TrainingSpec, assignment: Assignment, outbox: Path
    ) -> tuple[PreTrainedModel, PreTrainedTokenizerFast, TrainResult]:
        """Train as asked, from the checkpoint of an earlier try where there is one."""
        rehearsed = read_prompts(self.prompts) if self.prompts is not None else []
        records = open_canaries(self.canaries) if self.canaries is not None else None
        return adapt_pivot(
            pivot,
            self.corpus,
            asked,
            assignment.spec.seed,
            rehearsed=[*rehearsed, *(records.planted if records else ())],
            checkpoint_dir=outbox / f"checkpoint-{assignment.round_id}",
            on_progress=self.on_progress,
            should_stop=self.should_stop,
        )


def export_delta(
    pivot: Path, training: LocalTraining, assignment: Assignment, outbox: Path
) -> Path | None:
    """Train a copy of the pivot here and write the difference; None when stopped before the end."""
    path = outbox / f"delta-{_name_of(assignment)}.safetensors"
    if path.exists():
        return path
    asked = assignment.spec.training
    before = parameter_arrays(load_model(pivot)[0])
    model, _, result = training.adapt(pivot, asked, assignment, outbox)
    if not result.finished:
        return None
    write_delta(
        path,
        subtract(parameter_arrays(model), before),
        pivot_sha256=assignment.pivot_sha256,
        steps=asked.steps,
        tokens=asked.steps * asked.batch_size * asked.seq_len,
    )
    return path


def grow_expert(
    pivot: Path, training: LocalTraining, assignment: Assignment, outbox: Path
) -> Path | None:
    """Train a copy of the pivot here, to ask it; return its folder, or None when stopped before."""
    assert assignment.spec.grow is not None
    folder = grown_folder(assignment, outbox)
    if folder.exists():
        return folder
    model, tokenizer, result = training.adapt(pivot, assignment.spec.grow, assignment, outbox)
    if not result.finished:
        return None
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    save_model(model, tokenizer, partial)
    sync_tree(partial)
    partial.rename(folder)
    return folder


def grown_folder(assignment: Assignment, outbox: Path) -> Path:
    """Where the copy that was grown for a round lies."""
    return outbox / f"grown-{_name_of(assignment)}"


def _name_of(assignment: Assignment) -> str:
    return f"{assignment.round_id}-{assignment.pivot_sha256[:16]}"


def score(expert: Path, evals: Path, cache: Path) -> Scores:
    """Measure the expert on the round's public evaluation set, once per expert and set."""
    key = f"scores-{sha256_of(evals)[:16]}-{sha256_of(expert / WEIGHTS)[:16]}.json"
    if not (cache / key).exists():
        scores = Scores(**scores_of(*open_expert(expert), read_evals(evals).domains))
        (cache / key).write_text(scores.model_dump_json(), encoding="utf-8")
    return Scores.model_validate_json((cache / key).read_text(encoding="utf-8"))
