"""Who takes part in benchmarks/fusion.py: the hospitals, their text and models, and the sizes.

Results are files in the seed's folder, so that another process can go on with them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Final

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from cofuse.demo.corpora import Department, Limits, departments, general_text
from fp8.train import TrainConfig, causal_lm_loss, packed_batches, train
from fusion.merge import subtract
from fusion.models import ModelSpec, encode_documents, load_model, parameter_arrays

Made = tuple[PreTrainedModel, PreTrainedTokenizerFast]
THREE: Final = ("cardiology", "neurology", "oncology")
SIX: Final = (*THREE, "ophthalmology", "orthopaedics", "infectious")
GENERAL: Final = "general"
SHA: Final = "0" * 64
"""Nothing travels here, so nothing is named by its hash."""


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Everything that has a size."""

    limits: Limits
    general_bytes: int
    """Public text of what no department owns, which the base is pre-trained on."""
    general_prompts_bytes: int
    """What of it stands among the prompts, so that nobody forgets it."""
    experts: tuple[ModelSpec, ...]
    """By turns over the hospitals."""
    pivot: ModelSpec
    expert_steps: int
    base_steps: int
    fusion_steps: int
    """Of every method, and of each of the runs of a pairwise round."""
    local_steps: int
    """Of each participant in a weights round."""
    regrow_steps: int
    """Of each participant that grows its next expert from the pivot, from the second round on."""
    on_policy: int
    """Documents that the pivot writes for the prompt set of the second and third round."""
    lr: float = 3e-3
    local_lr: float = 1e-3
    regrow_lr: float = 2e-3
    batch_size: int = 8
    seq_len: int = 128
    top_k: int = 16
    diloco_rounds: int = 8


def _spec(architecture: Any, hidden: int, layers: int, heads: int, vocabulary: int) -> ModelSpec:
    return ModelSpec(
        architecture=architecture,
        hidden_size=hidden,
        layers=layers,
        heads=heads,
        vocab_size=vocabulary,
    )


FULL: Final = Sizes(
    limits=Limits(private=300_000, public=50_000, heldout=25_000, questions=1),
    general_bytes=450_000,
    general_prompts_bytes=200_000,
    experts=(
        _spec("llama", 128, 4, 4, 1024),
        _spec("qwen2", 128, 3, 4, 1280),
        _spec("gpt_neox", 128, 4, 4, 896),
    ),
    pivot=_spec("llama", 128, 4, 4, 1024),
    expert_steps=450,
    base_steps=400,
    fusion_steps=450,
    local_steps=100,
    regrow_steps=300,
    on_policy=1500,
)
HELD_OUT_GENERAL_BYTES: Final = 25_000


@dataclass(frozen=True)
class Job:
    """One process's worth of work."""

    what: str
    seed: int
    folder: Path
    sizes: Sizes

    @property
    def kind(self) -> str:
        """What is done."""
        return self.what.partition(":")[0]

    @property
    def argument(self) -> str:
        """To whom, or how; "" for most."""
        return self.what.partition(":")[2]

    def path(self, name: str) -> Path:
        """Return a file or folder of this seed."""
        return self.folder / name.replace(":", "-")


@dataclass(frozen=True)
class Texts:
    """The text of one seed and some departments."""

    departments: tuple[Department, ...]
    prompts: list[str]
    general: list[str]
    general_heldout: list[str]


@cache
def texts_of(seed: int, sizes: Sizes, names: tuple[str, ...] = THREE) -> Texts:
    """Read the text of one seed; the same seed gives the same text."""
    found = departments(names, seed, limits=sizes.limits)
    everything = general_text(seed, sizes.general_bytes + HELD_OUT_GENERAL_BYTES)
    general, heldout = _split(everything, sizes.general_bytes)
    general = shuffled(general, seed)
    some, _ = _split(shuffled(general, seed + 1), sizes.general_prompts_bytes)
    prompts = [*(doc for department in found for doc in department.public), *some]
    return Texts(tuple(found), shuffled(prompts, seed), general, heldout)


def _split(docs: Sequence[str], limit_bytes: int) -> tuple[list[str], list[str]]:
    ends = np.cumsum([len(doc.encode()) + 1 for doc in docs])
    count = int(np.searchsorted(ends, limit_bytes, side="right"))
    return list(docs[:count]), list(docs[count:])


def shuffled(docs: Sequence[str], seed: int) -> list[str]:
    """Return the documents in the order of the seed."""
    return [docs[i] for i in np.random.default_rng(seed).permutation(len(docs))]


def hospitals_of(what: str) -> tuple[str, ...]:
    """Return the hospitals that a job is about: three, but where their number is varied."""
    kind, _, argument = what.partition(":")
    if kind in ("experts", "pooled") and argument:
        return SIX[: int(argument)]
    return SIX if argument in SIX[3:] else THREE


def private_of(job: Job, name: str) -> list[str]:
    """Return what one hospital alone may read."""
    return texts_of(job.seed, job.sizes).departments[THREE.index(name)].private


def delta_of(job: Job, model: PreTrainedModel) -> dict[str, Any]:
    """Return what of the model is not the base's, by parameter."""
    base = parameter_arrays(load_model(job.path("base"))[0])
    return dict(subtract(parameter_arrays(model), base))


def train_on(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    docs: Sequence[str],
    job: Job,
    steps: int,
    lr: float,
) -> None:
    """Train the model on whole documents, packed, in place."""
    stream = np.concatenate([[0], encode_documents(tokenizer, docs)])
    sizes = job.sizes
    batches = packed_batches(
        stream, batch_size=sizes.batch_size, seq_len=sizes.seq_len, seed=job.seed
    )
    train(model, batches, causal_lm_loss, schedule(steps, lr, job.seed))


def schedule(steps: int, lr: float, seed: int) -> TrainConfig:
    """Return the schedule that all runs have: a short warm-up, a decay over the last third."""
    return TrainConfig(
        steps=steps, lr=lr, warmup_steps=max(1, steps // 20), decay_steps=steps // 3, seed=seed
    )
