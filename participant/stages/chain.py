"""Stages one after the other: pre-training, then whatever participant.toml lists.

Each stage starts from the model the one before it finished, keeps its own checkpoint, and leaves
its model in a folder of its own: expert/stages/0-cpt, 1-sft, ... A stage whose model, settings or
data are others than last time is done anew; the rest is kept. Only when the last one is finished is
there a new expert. After each, every stage's held-out lines are measured, so that the table in
stages/evals.json shows what a stage gave and what it cost the others; it also counts the lines
that were skipped. What it recites of planted records is measured too: where the policy blocks, a
stage that makes it recite too much, and those after it, are not taken.
"""

import hashlib
import json
import logging
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Final, Protocol

from transformers import PreTrainedModel

from fp8.train import CheckpointError, Progress, TrainingDivergedError, TrainResult
from fusion.models import load_model, save_model
from fusion.sampling import GenerateError
from participant.config import Stage, TrainingConfig
from participant.durable import sync_tree, write_durably
from participant.stages import StageError, rl, sft
from participant.stages.conversations import Chat
from participant.stages.cpt import Expert, set_precision
from participant.stages.review import EVALS, PROGRESS
from participant.stages.stage_gate import FIGURES, StageGate, judged, recall_of
from protos.files import flush

_LOG = logging.getLogger(__name__)
_KEY: Final = "key"


class Learn(Protocol):
    """Trains a model in place through one stage; it resumes from its checkpoint by itself."""

    def __call__(
        self,
        model: PreTrainedModel,
        chat: Chat,
        stage: Any,
        *,
        checkpoint_dir: Path | None,
        on_progress: Callable[[Progress], None] | None,
        should_stop: Callable[[], bool] | None,
    ) -> TrainResult:
        """Return how it went."""
        ...


LEARN: Final[Mapping[str, Learn]] = {"sft": sft.finetune, "rl": rl.reinforce}
MEASURE: Final[Mapping[str, Callable[[PreTrainedModel, Chat, Any], dict[str, float]]]] = {
    "sft": sft.measure,
    "rl": rl.measure,
}


def name_of(stages: Sequence[Stage], before: str = "") -> str:
    """Name what comes after pre-training by its settings and data; "" when nothing does.

    Data are told apart by size and time of change: a large file is not read to see it is the same.
    """
    for stage in stages:
        files = [path.stat() for path in (stage.data, stage.template) if path and path.exists()]
        # Without defaults: a key that a later release brings begins no stage anew.
        said = stage.model_dump_json(exclude_defaults=True)
        told = [before, said, *((f.st_size, f.st_mtime_ns) for f in files)]
        before = hashlib.sha256(json.dumps(told).encode()).hexdigest()
    return before


def develop(
    expert: Expert,
    training: TrainingConfig,
    stages: Sequence[Stage],
    *,
    on_progress: Callable[[Progress], None],
    should_stop: Callable[[], bool],
    gate: StageGate | None = None,
) -> TrainResult:
    """Take the expert through pre-training and every stage, from where each was left.

    Args: gate: what a stage may make the expert recite; None: nothing was planted.
    Returns: the result of the last stage that ran; finished is False when should_stop ended it.
    Raises: CorpusError, ChatError; StageError of a run that diverged or a damaged checkpoint.
    """
    pretrain = partial(expert.pretrain, training, on_progress=on_progress, should_stop=should_stop)
    with _named("0-cpt"):
        if not stages:
            return pretrain()
        result = pretrain(into=(base := expert.stages / "0-cpt" / "model"))
    if not result.finished:
        return result
    name = name_of(stages)  # now: data that change under our hands are a reason to begin anew
    model, key = base, _sha256(base / "model.safetensors")
    _measure_once(expert.stages, "0-cpt", key, model, stages)
    taken = _passes(expert.stages, "0-cpt", model, gate)
    for number, stage in enumerate(stages if taken else (), start=1):
        folder = expert.stages / f"{number}-{stage.kind}"
        key = name_of([stage], before=key)
        _keep_only(folder, key)
        if not (folder / "model").exists():
            _LOG.info("stage %s begins", folder.name)
            with _named(folder.name):
                result = _learn(model, folder, stage, on_progress, should_stop)
            if not result.finished:
                return result
        _measure_once(expert.stages, folder.name, key, folder / "model", stages)
        if not _passes(expert.stages, folder.name, folder / "model", gate):
            break
        model = folder / "model"
    write = partial(shutil.copytree, model)
    expert.finish(write, training.steps, stages=name)
    return result


@contextmanager
def _named(stage: str) -> Iterator[None]:
    """Say which stage it was that cannot go on: its words tell what to change, not where."""
    try:
        yield
    except (CheckpointError, TrainingDivergedError, GenerateError) as error:
        raise StageError(f"stage {stage}: {error}") from error


def opened(folder: Path, stage: Stage) -> tuple[PreTrainedModel, Chat]:
    """Load a model to train or measure it as this stage does: its precision, its chat template."""
    model, tokenizer = load_model(folder)
    set_precision(model, stage.precision)
    template = stage.template.read_text(encoding="utf-8") if stage.template else None
    return model, Chat(tokenizer, template)


def _learn(
    start: Path,
    folder: Path,
    stage: Stage,
    on_progress: Callable[[Progress], None],
    should_stop: Callable[[], bool],
) -> TrainResult:
    model, chat = opened(start, stage)
    with (folder / PROGRESS).open("a", buffering=1, encoding="utf-8") as file:

        def told(progress: Progress) -> None:
            numbers = {"step": progress.step, "loss": progress.loss, "lr": progress.lr}
            file.write(json.dumps({**numbers, **progress.metrics}) + "\n")
            on_progress(progress)

        result = LEARN[stage.kind](
            model,
            chat,
            stage,
            checkpoint_dir=folder / "checkpoint",
            on_progress=told,
            should_stop=should_stop,
        )
    if result.finished:
        draft = folder / "model.new"
        shutil.rmtree(draft, ignore_errors=True)
        save_model(model, chat.tokenizer, draft)
        sync_tree(draft)
        draft.rename(folder / "model")
        flush(folder)
        shutil.rmtree(folder / "checkpoint", ignore_errors=True)
    return result


def _keep_only(folder: Path, key: str) -> None:
    """Empty a stage's folder unless all in it was made under this key."""
    known = folder / _KEY
    if not known.exists() or known.read_text(encoding="ascii") != key:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        write_durably(known, key)


def _passes(folder: Path, name: str, model: Path, gate: StageGate | None) -> bool:
    """Whether the expert may be what this stage made of it, as the gate of today has it."""
    if gate is None or not gate.on:
        return True
    path = folder / EVALS
    table = json.loads(path.read_text(encoding="utf-8"))
    if FIGURES not in table[name]:
        table[name][FIGURES] = recall_of(model, gate.canaries)
        write_durably(path, json.dumps(table, indent=2))
    if judged(gate, table[name][FIGURES], name).passed or gate.rules.canaries != "block":
        return True
    _LOG.error(
        "stage %s is not taken, nor those after it: the expert recites planted records; train it "
        "less, or raise recall_tpr_max in [gates] of policy.toml",
        name,
    )
    return False


def _measure_once(folder: Path, name: str, key: str, model: Path, stages: Sequence[Stage]) -> None:
    """Write into the table what this model does on every stage's held-out lines."""
    path = folder / EVALS
    table = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    if table.get(name, {}).get(_KEY) == key:
        return
    found: dict[str, Any] = {_KEY: key}
    for number, stage in enumerate(stages, start=1):
        net, chat = opened(model, stage)
        measured = MEASURE[stage.kind](net, chat, stage)
        found |= {f"{number}-{stage.kind} {what}": value for what, value in measured.items()}
    _LOG.info("%s: %s", name, found)
    write_durably(path, json.dumps(table | {name: found}, indent=2))


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
