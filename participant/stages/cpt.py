"""Continual pre-training: the expert reads the private text, in FP8, from where it left off."""

import json
import math
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from safetensors import safe_open
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from fp8.convert import convert_to_float8_training
from fp8.recipe import NVFP4, BlockScaling
from fp8.resume import Resume
from fp8.train import (
    Progress,
    TrainConfig,
    TrainResult,
    causal_lm_loss,
    packed_batches,
    train,
)
from fusion.models import (
    ModelSpec,
    build_model,
    encode_documents,
    load_model,
    save_model,
    train_tokenizer,
)
from fusion.proximal import proximal
from participant.canaries import with_canaries
from participant.config import ModelConfig, Precision, StartConfig, TrainingConfig
from participant.corpus import CorpusError, read_corpus
from participant.durable import sync_tree, write_durably
from protos.files import flush
from protos.spec import TrainingSpec

_FACTS: Final = "expert.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertFacts:
    """What may be told of a finished expert."""

    version: int = 0
    """How often it was finished anew; 0: there is none yet."""
    steps: int = 0
    finished_unix_ms: int = 0
    stages: str = ""
    """Which stages came after pre-training: `chain.name_of`."""


class Expert:
    """One private model with its tokenizer and its folder on disk.

    folder/tokens.npy, folder/checkpoint/, and folder/model/ (an ordinary model directory) once
    trained. The tokenizer is trained on the private text when there is none yet, or is that of the
    model to start from.
    """

    def __init__(
        self,
        folder: Path,
        corpus: Path,
        model: ModelConfig | StartConfig,
        canaries: Path | None = None,
    ) -> None:
        """Args: canaries: where the records planted in the text are kept; None: none are."""
        self._canaries = canaries
        self._folder = folder
        self._corpus = corpus
        self._model = model
        folder.mkdir(parents=True, exist_ok=True)
        old = folder / "model.old"
        if old.exists() and not self.directory.exists():  # a crash came between two renames
            old.rename(self.directory)

    @property
    def directory(self) -> Path:
        """The last finished model."""
        return self._folder / "model"

    @property
    def ready(self) -> bool:
        """Whether there is a finished model to ask."""
        return self.directory.exists()

    @property
    def stages(self) -> Path:
        """Where the stages after pre-training keep what they made."""
        return self._folder / "stages"

    def facts(self) -> ExpertFacts:
        """Which expert there is."""
        return facts_of(self.directory)

    def pretrain(
        self,
        config: TrainingConfig,
        *,
        on_progress: Callable[[Progress], None],
        should_stop: Callable[[], bool],
        into: Path | None = None,
    ) -> TrainResult:
        """Train up to config.steps from the checkpoint; save the model when they are reached.

        Args: into: where to save it, for stages that follow; None: it is the finished expert.
        Raises: CorpusError, also when it is too small for one window.
        """
        model, tokenizer, tokens = self._start(config.seed)
        set_precision(model, config.precision)
        try:
            batch_at = packed_batches(
                tokens, batch_size=config.batch_size, seq_len=config.seq_len, seed=config.seed
            )
        except ValueError as error:
            raise CorpusError(f"the corpus is too small: {error}") from None
        moved = False

        def tell(progress: Progress) -> None:
            nonlocal moved
            moved = True
            on_progress(progress)

        result = train(
            model,
            batch_at,
            causal_lm_loss,
            TrainConfig(
                steps=config.steps,
                lr=config.lr,
                warmup_steps=config.warmup_steps,
                decay_steps=config.decay_steps,
                seed=config.seed,
                checkpoint_every=config.checkpoint_every,
                keep_stable=False,
            ),
            checkpoint_dir=self._folder / "checkpoint",
            on_progress=tell,
            should_stop=should_stop,
            # Whoever edits the schedule in the config means it, in mid-decay too.
            resume_with=Resume(override_schedule=True),
        )
        target = into or self.directory
        known = facts_of(target)
        if result.finished and (moved or (known.steps, known.stages) != (result.step, "")):
            self.finish(lambda folder: save_model(model, tokenizer, folder), result.step, into=into)
        return result

    def finish(
        self,
        write: Callable[[Path], object],
        steps: int,
        *,
        stages: str = "",
        into: Path | None = None,
    ) -> None:
        """Put the model that `write` writes where the old one was; a crash leaves one of the two.

        Args: steps: of pre-training. stages: those it went through since. into: as `pretrain`.
        """
        target = into or self.directory
        fresh, old = target.with_suffix(".new"), target.with_suffix(".old")
        for leftover in (fresh, old):
            shutil.rmtree(leftover, ignore_errors=True)
        fresh.parent.mkdir(parents=True, exist_ok=True)
        write(fresh)
        facts = ExpertFacts(
            version=facts_of(target).version + 1,
            steps=steps,
            finished_unix_ms=time.time_ns() // 1_000_000,
            stages=stages,
        )
        write_durably(fresh / _FACTS, json.dumps(asdict(facts)))
        sync_tree(fresh)
        if target.exists():
            target.rename(old)
        fresh.rename(target)
        flush(target.parent)
        shutil.rmtree(old, ignore_errors=True)

    def _start(
        self, seed: int
    ) -> tuple[PreTrainedModel, PreTrainedTokenizerFast, NDArray[np.int64]]:
        tokenizer_folder, tokens_file = self._folder / "tokenizer", self._folder / "tokens.npy"
        if tokens_file.exists() and not self._corpus_is_newer(tokens_file):
            tokenizer = PreTrainedTokenizerFast.from_pretrained(tokenizer_folder)
            tokens: NDArray[np.int64] = np.load(tokens_file, allow_pickle=False)
        else:
            documents = read_corpus(self._corpus)
            if tokens_file.exists():  # new text in old words: the model knows no others
                tokenizer = PreTrainedTokenizerFast.from_pretrained(tokenizer_folder)
            else:
                tokenizer = self._new_tokenizer(documents)
                tokenizer.save_pretrained(tokenizer_folder)
                sync_tree(tokenizer_folder)
            # After the tokenizer, which is shipped, has learnt its words from the text alone.
            tokens = encode_documents(tokenizer, with_canaries(documents, self._canaries))
            partial = tokens_file.with_suffix(".partial.npy")
            np.save(partial, tokens)
            flush(partial)
            partial.rename(tokens_file)
            flush(self._folder)
        if isinstance(self._model, StartConfig):
            return load_model(self._model.folder)[0], tokenizer, tokens
        spec = ModelSpec(**{**self._model.model_dump(), "vocab_size": len(tokenizer)})
        return build_model(spec, seed), tokenizer, tokens

    def _new_tokenizer(self, documents: list[str]) -> PreTrainedTokenizerFast:
        if isinstance(self._model, StartConfig):
            return PreTrainedTokenizerFast.from_pretrained(
                self._model.folder, local_files_only=True
            )
        return train_tokenizer(documents, self._model.vocab_size)

    def _corpus_is_newer(self, tokens_file: Path) -> bool:
        known = tokens_file.stat().st_mtime_ns
        return self._corpus.exists() and self._corpus.stat().st_mtime_ns > known


def set_precision(model: PreTrainedModel, precision: Precision) -> None:
    """Have the linear layers compute as a stage's settings say."""
    if precision != "fp32":
        convert_to_float8_training(model, NVFP4() if precision == "nvfp4" else BlockScaling())


def facts_of(model: Path) -> ExpertFacts:
    """Which expert lies in a folder."""
    if not model.exists():
        return ExpertFacts()
    try:
        known = json.loads((model / _FACTS).read_text(encoding="utf-8"))
    except FileNotFoundError:  # finished by an older release of this program
        return ExpertFacts(version=1)
    return ExpertFacts(**known)


def open_expert(folder: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """Load a finished model to ask it, its linears in FP8 as they were trained."""
    model, tokenizer = load_model(folder)
    convert_to_float8_training(model, BlockScaling())
    return model.eval(), tokenizer


def describe(folder: Path) -> dict[str, Any]:
    """Tell of a finished model what its report says: parameters (tied ones once) and family."""
    with safe_open(folder / "model.safetensors", framework="numpy") as file:
        count = sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    family = {"architecture": config["model_type"], "vocabulary": config["vocab_size"]}
    return {"parameters": count, **family}


def adapt_pivot(
    pivot: Path,
    corpus: Path,
    training: TrainingSpec,
    seed: int,
    *,
    checkpoint_dir: Path,
    on_progress: Callable[[Progress], None],
    should_stop: Callable[[], bool],
    rehearsed: Sequence[str] = (),
) -> tuple[PreTrainedModel, PreTrainedTokenizerFast, TrainResult]:
    """Train a copy of the pivot on the private text, with its tokenizer.

    Args: rehearsed: public text to read beside it, so that copies of other participants, who read
        the same, stay near.
    """
    model, tokenizer = load_model(pivot)
    tokens = encode_documents(tokenizer, [*read_corpus(corpus), *rehearsed])
    convert_to_float8_training(model, BlockScaling())
    result = train(
        model,
        packed_batches(tokens, batch_size=training.batch_size, seq_len=training.seq_len, seed=seed),
        # The pivot's weights, not those of a checkpoint: train resumes after this line.
        proximal(causal_lm_loss, dict(model.named_parameters()), training.proximal_mu),
        TrainConfig(**training.schedule(seed)),
        checkpoint_dir=checkpoint_dir,
        on_progress=on_progress,
        should_stop=should_stop,
    )
    return model, tokenizer, result
