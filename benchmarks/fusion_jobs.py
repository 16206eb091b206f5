"""The work of benchmarks/fusion.py: hospitals, experts, a pivot, and every way to fuse them.

A job is one process's worth of work, named `kind` or `kind:argument`; its results are files in
the seed's folder, so that another process can go on with them.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Final

import numpy as np
import torch

from benchmarks.fusion_hospitals import (
    GENERAL,
    SHA,
    SIX,
    THREE,
    Job,
    Made,
    delta_of,
    hospitals_of,
    private_of,
    shuffled,
    texts_of,
    train_on,
)
from benchmarks.fusion_variants import ON_POLICY, VARIANTS, fuse_into, fuse_variant
from fp8.convert import convert_to_float8_training
from fp8.recipe import BlockScaling
from fp8.train import TrainConfig, causal_lm_loss, packed_batches, train
from fusion.evaluate import bits_per_byte
from fusion.extract import extract_logits
from fusion.generate import on_policy_prompts
from fusion.merge import State, merge, subtract
from fusion.models import (
    build_model,
    encode_documents,
    load_model,
    load_parameter_arrays,
    parameter_arrays,
    save_model,
    train_tokenizer,
)
from fusion.outer import OuterSettings, OuterState, outer_step


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
    train_on(model, tokenizer, private, job, sizes.expert_steps, sizes.lr)
    save_model(model, tokenizer, job.path(job.what))
    return model, tokenizer


def _base(job: Job) -> Made:
    texts, sizes = texts_of(job.seed, job.sizes), job.sizes
    tokenizer = train_tokenizer([*texts.general, *texts.prompts], sizes.pivot.vocab_size)
    model = build_model(replace(sizes.pivot, vocab_size=len(tokenizer)), 10 * job.seed + 9)
    train_on(model, tokenizer, texts.general, job, sizes.base_steps, sizes.lr)
    save_model(model, tokenizer, job.path("base"))
    return model, tokenizer


def _local(job: Job) -> Made:
    """Train the pivot on one hospital's private text and ship the difference."""
    model, tokenizer = load_model(job.path("base"))
    private = private_of(job, job.argument)
    train_on(model, tokenizer, private, job, job.sizes.local_steps, job.sizes.local_lr)
    np.savez(job.path(f"{job.what}.npz"), **delta_of(job, model))
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
    prompts = shuffled([*public, *own], seed)
    own_set = set(own)
    written = [prompt in own_set for prompt in prompts]
    state, sources = parameter_arrays(made[0]), {}
    for name in THREE:
        load_parameter_arrays(made[0], state)
        grown = replace(job, seed=seed)
        docs = shuffled([*private_of(job, name), *public], seed)
        train_on(*made, docs, grown, sizes.regrow_steps, sizes.regrow_lr)
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
            docs = shuffled([*private_of(job, name), *public], seed)
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
    private = shuffled([doc for d in found for doc in d.private], job.seed)
    train_on(*made, private, job, job.sizes.expert_steps * len(found), job.sizes.lr)
    return made


def _pooled_public(job: Job) -> Made:
    """What pooling gives if the public prompts are read too, for as many steps."""
    made, texts = load_model(job.path("base")), texts_of(job.seed, job.sizes)
    docs = [*(doc for d in texts.departments for doc in d.private), *texts.prompts]
    steps = job.sizes.expert_steps * len(texts.departments)
    train_on(*made, shuffled(docs, job.seed), job, steps, job.sizes.lr)
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
    **dict.fromkeys(VARIANTS, fuse_variant),
}
