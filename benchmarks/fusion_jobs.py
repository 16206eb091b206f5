"""The work of benchmarks/fusion.py: hospitals, experts, a pivot, and every way to fuse them.

A job is one process's worth of work, named `kind` or `kind:argument`; its results are files in
the seed's folder, so that another process can go on with them.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from cofuse.demo.corpora import Department, Limits, departments, general_text
from fp8.convert import convert_to_float8_training
from fp8.recipe import BlockScaling
from fp8.train import TrainConfig, causal_lm_loss, packed_batches, train
from fusion.codec import LogitFile
from fusion.contribution import LogitSource
from fusion.evaluate import bits_per_byte
from fusion.extract import Budget, extract_logits, extract_to_file
from fusion.generate import on_policy_prompts
from fusion.merge import State, merge, subtract
from fusion.models import (
    ModelSpec,
    build_model,
    encode_documents,
    load_model,
    load_parameter_arrays,
    parameter_arrays,
    save_model,
    train_tokenizer,
)
from fusion.objective import faithful_weight
from fusion.outer import OuterSettings, OuterState, outer_step
from fusion.settings import FusionSettings
from fusion.unified import fuse

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
    general = _shuffled(general, seed)
    some, _ = _split(_shuffled(general, seed + 1), sizes.general_prompts_bytes)
    prompts = [*(doc for department in found for doc in department.public), *some]
    return Texts(tuple(found), _shuffled(prompts, seed), general, heldout)


def _split(docs: Sequence[str], limit_bytes: int) -> tuple[list[str], list[str]]:
    ends = np.cumsum([len(doc.encode()) + 1 for doc in docs])
    count = int(np.searchsorted(ends, limit_bytes, side="right"))
    return list(docs[:count]), list(docs[count:])


def _shuffled(docs: Sequence[str], seed: int) -> list[str]:
    return [docs[i] for i in np.random.default_rng(seed).permutation(len(docs))]


# ---------------------------------------------------------------------------- jobs
Made = tuple[PreTrainedModel, PreTrainedTokenizerFast]


def run(job: Job) -> tuple[Job, float, dict[str, float]]:
    """Do one job; return it with its seconds and bits per byte by domain of what it made.

    A job of a broken run that was done before, at the same sizes, is not done again.
    """
    torch.set_num_threads(1)
    began_s = time.perf_counter()
    note, sizes = job.path(f"{job.what}.json"), repr(job.sizes)
    if note.exists():
        kept = json.loads(note.read_text(encoding="utf-8"))
        if kept["sizes"] == sizes:
            return job, 0.0, kept["bpb"]
    made = JOBS[job.kind](job)
    # The base is what six hospitals' recovery is measured from, too.
    measured = SIX if job.what == "base" else hospitals_of(job.what)
    texts = texts_of(job.seed, job.sizes, measured)
    heldout = {d.name: d.heldout for d in texts.departments} | {GENERAL: texts.general_heldout}
    bpb = {name: bits_per_byte(*made, docs) for name, docs in heldout.items()}
    note.write_text(json.dumps({"sizes": sizes, "bpb": bpb}), encoding="utf-8")
    return job, time.perf_counter() - began_s, bpb


def hospitals_of(what: str) -> tuple[str, ...]:
    """Return the hospitals that a job is about: three, but where their number is varied."""
    kind, _, argument = what.partition(":")
    if kind in ("experts", "pooled") and argument:
        return SIX[: int(argument)]
    return SIX if argument in SIX[3:] else THREE


def needs(what: str) -> set[str]:
    """Return the jobs whose files this one reads."""
    kind, _, argument = what.partition(":")
    if kind in ("expert", "base"):
        return set()
    alone = ("local", "pooled", "pooled_public", "diloco", "fedavg", "sft", "sft_short", "sft_3x")
    if kind in alone:
        return {"base"}
    if kind == "merge":
        source, names = _MERGED[argument]
        return {f"{source}:{name}" for name in names}
    if kind == "rounds":
        return {"unified" if argument == "2" else f"rounds:{int(argument) - 1}"}
    return {"base", *(f"expert:{name}" for name in hospitals_of(what))}


_MERGED: Final = {
    "pairwise": ("pairwise", THREE),
    "pairwise_equal": ("pairwise_equal", THREE),
    "weights": ("local", THREE),
}


def _expert(job: Job) -> Made:
    """Train one hospital's expert in FP8 on its private text, and export its contribution."""
    name, sizes = job.argument, job.sizes
    place = SIX.index(name)
    texts = texts_of(job.seed, sizes, hospitals_of(job.what))
    private = texts.departments[place].private
    spec = sizes.experts[place % len(sizes.experts)]
    tokenizer = train_tokenizer(private, spec.vocab_size)
    model = build_model(replace(spec, vocab_size=len(tokenizer)), 10 * job.seed + place)
    convert_to_float8_training(model, BlockScaling())
    _train(model, tokenizer, private, job, sizes.expert_steps, sizes.lr)
    save_model(model, tokenizer, job.path(job.what))
    return model, tokenizer


def _base(job: Job) -> Made:
    texts, sizes = texts_of(job.seed, job.sizes), job.sizes
    tokenizer = train_tokenizer([*texts.general, *texts.prompts], sizes.pivot.vocab_size)
    model = build_model(replace(sizes.pivot, vocab_size=len(tokenizer)), 10 * job.seed + 9)
    _train(model, tokenizer, texts.general, job, sizes.base_steps, sizes.lr)
    save_model(model, tokenizer, job.path("base"))
    return model, tokenizer


@dataclass(frozen=True)
class Variant:
    """One way to fuse: what differs from the recommended method."""

    settings: Mapping[str, Any] = field(default_factory=dict)
    """Fields of FusionSettings."""
    steps: float = 1.0
    """Share of the fusion steps."""
    ship: Mapping[str, Any] = field(default_factory=dict)
    """How the experts' logits are shipped: top_k, share (of positions), sampler, draws."""


VARIANTS: Final[Mapping[str, Variant]] = MappingProxyType(
    {
        "sft": Variant({"loss": "none"}),
        "sft_short": Variant({"loss": "none"}, steps=1 / 3),
        "sft_3x": Variant({"loss": "none"}, steps=3.0),
        "infifusion": Variant({"loss": "infifusion"}),
        "infigfusion": Variant({"loss": "infigfusion"}),
        "uld": Variant({"loss": "uld"}),
        "minced": Variant({"loss": "minced"}),
        "gold": Variant({"loss": "gold"}),
        "p_kl": Variant({"loss": "p_kl"}),
        "uniform": Variant({"routing": "uniform"}),
        "minced_doc": Variant({"routing": "document"}),
        "unified": Variant(),
        "unified_3x": Variant(steps=3.0),
        "pairwise": Variant(),
        "pairwise_equal": Variant(steps=1 / len(THREE)),
        "experts": Variant(),
        "gated": Variant({"gate_nats": 0.0}),
        "no_alm": Variant({"alm_weight": 0.0}),
        "no_other": Variant({"other": False}),
        "fp8": Variant({"fp8": True}),
        "samples": Variant(ship={"sampler": "samples", "top_k": 32, "draws": 50}),
        "k1": Variant(ship={"top_k": 1}),
        "k4": Variant(ship={"top_k": 4}),
        "k64": Variant({"kept": 64}, ship={"top_k": 64}),
        "budget05": Variant(ship={"share": 0.05}),
        "budget20": Variant(ship={"share": 0.2}),
        "budget50": Variant(ship={"share": 0.5}),
    }
)


ON_POLICY: Final = Variant({"distill_weight": 1.0})
"""The experts teach alone: the text was learnt in the first round, or is the pivot's own."""


def _fuse(job: Job) -> Made:
    """Fuse all experts, or the one named, by a variant of the method."""
    variant = VARIANTS[job.kind]
    texts = texts_of(job.seed, job.sizes, hospitals_of(job.what))
    names = [d.name for d in texts.departments]
    if job.kind.startswith("pairwise"):
        names = [job.argument]
    if job.kind.startswith("sft"):
        names = []
    made = load_model(job.path("base"))
    sources = {name: contribution(job, texts.prompts, name, variant.ship) for name in names}
    fuse_into(made, job, texts.prompts, sources, variant)
    if job.argument in THREE:
        np.savez(job.path(f"{job.what}.npz"), **_delta(job, made[0]))
    if job.kind == "unified":
        save_model(*made, job.path("unified"))
    return made


def contribution(
    job: Job, prompts: Sequence[str], name: str, ship: Mapping[str, Any]
) -> LogitSource:
    """Return what this hospital ships, from the file if it was asked for before."""
    options: dict[str, Any] = {"top_k": job.sizes.top_k, **ship}
    tag = "-".join(f"{key}{value}" for key, value in sorted(options.items()))
    path = job.path(f"{name}-{tag}-{len(prompts)}.safetensors")
    if not path.exists():
        share = options.pop("share", None)
        if share is not None:
            base = load_model(job.path("base"))
            options["budget"] = Budget(share)
            options["pivot"] = extract_logits(
                *base, prompts, top_k=1, prompt_set_sha256=SHA, model_sha256=SHA
            )
        expert = load_model(job.path(f"expert:{name}"))
        extract_to_file(path, *expert, prompts, prompt_set_sha256=SHA, model_sha256=SHA, **options)
    return LogitFile(path, prompts)


def fuse_into(
    made: Made,
    job: Job,
    prompts: Sequence[str],
    sources: Mapping[str, LogitSource],
    variant: Variant,
    *,
    written: Sequence[bool] | None = None,
    round_number: int = 0,
) -> None:
    """Fuse the sources into this model."""
    sizes, seed = job.sizes, 1000 * round_number + job.seed
    settings = FusionSettings(
        train=_schedule(int(sizes.fusion_steps * variant.steps), sizes.lr, seed),
        batch_size=sizes.batch_size,
        seq_len=sizes.seq_len,
        **variant.settings,
    )
    settings = replace(settings, distill_weight=faithful_weight(settings))
    fuse(*made, prompts, sources, settings, written=written)


def _local(job: Job) -> Made:
    """Train the pivot on one hospital's private text and ship the difference."""
    model, tokenizer = load_model(job.path("base"))
    private = _private(job, job.argument)
    _train(model, tokenizer, private, job, job.sizes.local_steps, job.sizes.local_lr)
    np.savez(job.path(f"{job.what}.npz"), **_delta(job, model))
    return model, tokenizer


def _rounds(job: Job) -> Made:
    """One more round, on-policy: the second goes on from unified, the third from the second.

    From the second round on a hospital grows its expert from the pivot it has pulled, on its
    private text and the public prompts, and ships that one's logits. The prompts of the round are
    the public ones and what the pivot writes on from their openings.
    """
    number, sizes = int(job.argument), job.sizes
    made = load_model(job.path("unified" if number == 2 else f"rounds:{number - 1}"))
    public, seed = texts_of(job.seed, sizes).prompts, 1000 * number + job.seed
    own = on_policy_prompts(
        *made,
        public,
        share_of_document=(0.0, 0.5),
        count=sizes.on_policy,
        temperature=0.8,
        seed=seed,
    )
    prompts = _shuffled([*public, *own], seed)
    own_set = set(own)
    written = [prompt in own_set for prompt in prompts]
    state, sources = parameter_arrays(made[0]), {}
    for name in THREE:
        load_parameter_arrays(made[0], state)
        grown = replace(job, seed=seed)
        docs = _shuffled([*_private(job, name), *public], seed)
        _train(*made, docs, grown, sizes.regrow_steps, sizes.regrow_lr)
        sources[name] = extract_logits(
            *made, prompts, top_k=sizes.top_k, prompt_set_sha256=SHA, model_sha256=SHA
        )
    load_parameter_arrays(made[0], state)
    fuse_into(made, job, prompts, sources, ON_POLICY, written=written, round_number=number)
    save_model(*made, job.path(job.what))
    return made


WEIGHT_ROUNDS: Final[Mapping[str, OuterSettings]] = MappingProxyType(
    {
        "diloco": OuterSettings(method="diloco", lr=0.5, momentum=0.6),
        "fedavg": OuterSettings(method="fedavg"),
    }
)
"""Eight rounds are few for the momentum of 0.9 that DiLoCo was published with (docs/log.md)."""


def _weight_rounds(job: Job) -> Made:
    """Weights rounds: each hospital trains the pivot, the outer optimizer steps on the mean.

    Hospitals rehearse the public prompts beside their own text, unless asked `alone`.
    """
    made, sizes = load_model(job.path("base")), job.sizes
    base: State = parameter_arrays(made[0])
    public = [] if job.argument == "alone" else texts_of(job.seed, sizes).prompts
    outer: OuterState | None = None
    steps = sizes.expert_steps // sizes.diloco_rounds
    for number in range(sizes.diloco_rounds):
        deltas = {}
        for name in THREE:
            load_parameter_arrays(made[0], dict(base))
            seed = 1000 * number + job.seed
            docs = _shuffled([*_private(job, name), *public], seed)
            stream = np.concatenate([[0], encode_documents(made[1], docs)])
            batches = packed_batches(
                stream, batch_size=sizes.batch_size, seq_len=sizes.seq_len, seed=seed
            )
            # The inner rate decays over the rounds, not within one: the next goes on from here.
            lr = sizes.lr * min(1.0, 2 * (1 - number / sizes.diloco_rounds))
            config = TrainConfig(steps=steps, lr=lr, warmup_steps=5, decay_steps=0, seed=seed)
            train(made[0], batches, causal_lm_loss, config)
            deltas[name] = subtract(parameter_arrays(made[0]), base)
        base, outer = outer_step(base, deltas, WEIGHT_ROUNDS[job.kind], outer)
    load_parameter_arrays(made[0], dict(base))
    return made


def _pooled(job: Job) -> Made:
    made = load_model(job.path("base"))
    found = texts_of(job.seed, job.sizes, hospitals_of(job.what)).departments
    private = _shuffled([doc for d in found for doc in d.private], job.seed)
    _train(*made, private, job, job.sizes.expert_steps * len(found), job.sizes.lr)
    return made


def _pooled_public(job: Job) -> Made:
    """What pooling gives if the public prompts are read too, for as many steps."""
    made, texts = load_model(job.path("base")), texts_of(job.seed, job.sizes)
    docs = [*(doc for d in texts.departments for doc in d.private), *texts.prompts]
    steps = job.sizes.expert_steps * len(texts.departments)
    _train(*made, _shuffled(docs, job.seed), job, steps, job.sizes.lr)
    return made


def _merge(job: Job) -> Made:
    """Merge the copies of a pairwise round, or the deltas of a weights round."""
    model, tokenizer = load_model(job.path("base"))
    kind, names = _MERGED[job.argument]
    deltas = {name: dict(np.load(job.path(f"{kind}:{name}.npz"))) for name in names}
    merged = merge(parameter_arrays(model), list(deltas.values()), "task_arithmetic")
    load_parameter_arrays(model, merged)
    return model, tokenizer


JOBS: Final[dict[str, Callable[[Job], Made]]] = {
    "expert": _expert,
    "base": _base,
    "local": _local,
    "pooled": _pooled,
    "pooled_public": _pooled_public,
    "merge": _merge,
    "rounds": _rounds,
    **dict.fromkeys(WEIGHT_ROUNDS, _weight_rounds),
    **dict.fromkeys(VARIANTS, _fuse),
}


def _private(job: Job, name: str) -> list[str]:
    return texts_of(job.seed, job.sizes).departments[THREE.index(name)].private


def _delta(job: Job, model: PreTrainedModel) -> dict[str, Any]:
    base = parameter_arrays(load_model(job.path("base"))[0])
    return dict(subtract(parameter_arrays(model), base))


def _train(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    docs: Sequence[str],
    job: Job,
    steps: int,
    lr: float,
) -> None:
    stream = np.concatenate([[0], encode_documents(tokenizer, docs)])
    sizes = job.sizes
    batches = packed_batches(
        stream, batch_size=sizes.batch_size, seq_len=sizes.seq_len, seed=job.seed
    )
    train(model, batches, causal_lm_loss, _schedule(steps, lr, job.seed))


def _schedule(steps: int, lr: float, seed: int) -> TrainConfig:
    return TrainConfig(
        steps=steps, lr=lr, warmup_steps=max(1, steps // 20), decay_steps=steps // 3, seed=seed
    )
