"""Every way to fuse that benchmarks/fusion.py compares, as data, and the run of one of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, Final

import numpy as np

from benchmarks.fusion_hospitals import (
    SHA,
    THREE,
    Job,
    Made,
    delta_of,
    hospitals_of,
    schedule,
    texts_of,
)
from fusion.codec import LogitFile
from fusion.contribution import LogitSource
from fusion.extract import Budget, extract_logits, extract_to_file
from fusion.models import load_model, save_model
from fusion.objective import faithful_weight
from fusion.settings import FusionSettings
from fusion.unified import fuse


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


def fuse_variant(job: Job) -> Made:
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
        np.savez(job.path(f"{job.what}.npz"), **delta_of(job, made[0]))
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
        train=schedule(int(sizes.fusion_steps * variant.steps), sizes.lr, seed),
        batch_size=sizes.batch_size,
        seq_len=sizes.seq_len,
        **variant.settings,
    )
    settings = replace(settings, distill_weight=faithful_weight(settings))
    fuse(*made, prompts, sources, settings, written=written)
