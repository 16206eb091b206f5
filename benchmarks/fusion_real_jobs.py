"""The work of benchmarks/fusion_real.py: a base, experts, another tokenizer, and fusions of them.

A job is one process's worth of work; its results are files in the seed's folder, so that another
process can go on with them.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import torch

from benchmarks.fusion_real_data import KINDS, Fact, facts_of, paragraphs_of, prompt_set
from benchmarks.fusion_real_models import (
    Healing,
    Made,
    add_lora,
    document_batches,
    merge_lora,
    open_model,
    save_adapters,
    transplant,
)
from benchmarks.fusion_real_sizes import EXPERTS, Sizes, sizes_of
from fp8.train import Progress, TrainConfig, causal_lm_loss, packed_batches, train
from fusion.codec import LogitFile
from fusion.evaluate import bits_per_byte, choice_accuracy
from fusion.extract import extract_to_file
from fusion.models import encode_documents, eos_id, save_model
from fusion.settings import FusionSettings
from fusion.unified import fuse

SHA: Final = "0" * 64
"""Nothing travels here, so nothing is named by its hash."""
NEUTRAL: Final = "Answer:"
"""Before an option that is not asked for: the experts' documents all begin with a name."""


@dataclass(frozen=True)
class Job:
    """One process's worth of work."""

    what: str
    seed: int
    base: Path
    """SmolLM2's folder."""
    work: Path
    sizes: Sizes

    @property
    def folder(self) -> Path:
        """Where this seed's models and contributions lie."""
        return self.work / f"seed-{self.seed}"

    def path(self, suffix: str) -> Path:
        """Return a file or folder of this job."""
        return self.folder / (self.what.replace(":", "-") + suffix)


@dataclass(frozen=True)
class Texts:
    """The facts and the text of one seed."""

    facts: Mapping[str, list[Fact]]
    prompts: list[str]
    heldout: list[str]
    heal: list[str]

    def kind_of(self, prompt: str) -> str:
        """Return whose a prompt is."""
        owners = (k for k, facts in self.facts.items() if any(f.query in prompt for f in facts))
        return next(owners, "wikipedia")


def texts_of(seed: int, sizes: Sizes) -> Texts:
    """Read the text of one seed; the same seed gives the same text."""
    facts = {kind: facts_of(kind, sizes.facts, seed) for kind in KINDS}
    heldout, public, heal = paragraphs_of(
        seed, (sizes.heldout_bytes, sizes.public_bytes, sizes.heal_bytes)
    )
    everything = [fact for kind in KINDS for fact in facts[kind]]
    return Texts(facts, prompt_set(everything, public, seed), heldout, heal)


Scores = dict[str, dict[str, float]]
"""accuracy {kind: x}, bpb {domain: x} and seconds {made, all, cpu: x} of one model."""


def run(job: Job) -> tuple[Job, Scores]:
    """Do one job, or read what an earlier run of it has found at the same sizes and prompts."""
    note, texts = job.path(".json"), texts_of(job.seed, job.sizes)
    prompts = hashlib.sha256("\n".join(texts.prompts).encode()).hexdigest()
    made_of = {"sizes": sizes_of(job.what, job.sizes), "prompts_sha256": prompts}
    if note.is_file():
        kept = json.loads(note.read_text())
        if kept.get("made_of") == made_of:
            return job, kept["scores"]
    os.environ["HF_HUB_OFFLINE"] = "1"
    torch.set_num_threads(1)
    torch.manual_seed(job.seed)
    began_s, cpu_s = time.perf_counter(), time.process_time()
    model, tokenizer = _JOBS[job.what.partition(":")[0]](job, texts)
    made_s = time.perf_counter() - began_s
    accuracy = {
        kind: choice_accuracy(model, tokenizer, [fact.question() for fact in facts], NEUTRAL)
        for kind, facts in texts.facts.items()
    }
    heldout = {kind: [fact.heldout_text() for fact in facts] for kind, facts in texts.facts.items()}
    heldout["wikipedia"] = texts.heldout
    bpb = {domain: bits_per_byte(model, tokenizer, docs) for domain, docs in heldout.items()}
    scores: Scores = {
        "accuracy": accuracy,
        "bpb": bpb,
        "seconds": {
            "made": made_s,
            "all": time.perf_counter() - began_s,
            "cpu": time.process_time() - cpu_s,
        },
    }
    note.write_text(json.dumps({"made_of": made_of, "scores": scores}))
    return job, scores


# ---------------------------------------------------------------------------- jobs
def _base(job: Job, _texts: Texts) -> Made:
    return open_model(job.base)


def _expert(job: Job, texts: Texts) -> Made:
    """Train an expert on its private texts and ship its view of the prompts."""
    kind, sizes = job.what.partition(":")[2], job.sizes
    how = EXPERTS[kind]
    model, tokenizer = open_model(job.base)
    add_lora(model, sizes.rank, job.seed, how.scale)
    docs = [text for fact in texts.facts[kind] for text in fact.private_texts()]
    batches = document_batches(tokenizer, docs, sizes.expert_documents, job.seed)
    steps = sizes.expert_epochs * len(docs) // sizes.expert_documents
    config = _schedule(steps, how.lr, job.seed)
    train(model, batches, causal_lm_loss, config, on_progress=_teller(job))
    save_adapters(model, job.path(".safetensors"))
    model, tokenizer = open_model(job.base)
    merge_lora(model, job.path(".safetensors"))
    extract_to_file(
        job.folder / f"{kind}.logits",
        model,
        tokenizer,
        texts.prompts,
        top_k=sizes.top_k,
        prompt_set_sha256=SHA,
        model_sha256=SHA,
    )
    return model, tokenizer


def _other(job: Job, texts: Texts) -> Made:
    """Give SmolLM2 GPT-2's tokenizer and heal the embeddings on public text; keep the folder."""
    sizes = job.sizes
    model, tokenizer = transplant(*open_model(job.base))
    model.requires_grad_(False)
    # In fp32: in bf16 most updates of this size would round to nothing.
    table_VH = torch.nn.Parameter(model.get_input_embeddings().weight.detach().float())
    healed = Healing(model, table_VH)
    width = min(256, sizes.heal_tokens)
    batches = packed_batches(
        np.concatenate([[eos_id(tokenizer)], encode_documents(tokenizer, texts.heal)]),
        batch_size=sizes.heal_tokens // width,
        seq_len=width,
        seed=job.seed,
    )
    config = _schedule(sizes.heal_steps, sizes.heal_lr, job.seed, weight_decay=0.0)
    train(healed, batches, Healing.loss, config, on_progress=_teller(job))
    with torch.no_grad():
        model.get_input_embeddings().weight.copy_(table_VH)
    save_model(model, tokenizer, job.folder / OTHER)
    return model, tokenizer


def _fuse(job: Job, texts: Texts) -> Made:
    """Fuse all experts into a target, or (sft) train it on the prompts alone, all else alike."""
    method, _, other = job.what.partition("_")
    sizes, folder = job.sizes, job.folder / OTHER if other else job.base
    model, tokenizer = open_model(folder)
    add_lora(model, sizes.rank, job.seed, sizes.scale)
    settings = FusionSettings(
        train=_schedule(sizes.fusion_steps, sizes.lr, job.seed),
        batch_size=sizes.fusion_tokens // sizes.window,
        seq_len=sizes.window,
        apart=sizes.apart,
        loss="none" if method == "sft" else "span_kl",
        distill_weight=sizes.distill_weight,
        alm_weight=sizes.alm_weight,
        decay=sizes.decay,
    )
    files = KINDS if method == "pivot" else ()
    result = fuse(
        model,
        tokenizer,
        texts.prompts,
        {kind: LogitFile(job.folder / f"{kind}.logits", texts.prompts) for kind in files},
        settings,
        checkpoint_dir=job.path("-checkpoints"),
        on_progress=_teller(job),
    )
    if result.routing is not None:
        shares = result.routing.shares([texts.kind_of(prompt) for prompt in texts.prompts])
        job.path("-routing.json").write_text(json.dumps(shares, indent=1) + "\n")
    save_adapters(model, job.path(".safetensors"))
    shutil.rmtree(job.path("-checkpoints"))
    model, tokenizer = open_model(folder)
    merge_lora(model, job.path(".safetensors"))
    return model, tokenizer


OTHER: Final = "base_other_tokenizer"
_JOBS: Final[dict[str, Callable[[Job, Texts], Made]]] = {
    "base": _base,
    "expert": _expert,
    OTHER: _other,
    **dict.fromkeys(("sft", "pivot", "sft_other_tokenizer", "pivot_other_tokenizer"), _fuse),
}


def _schedule(steps: int, lr: float, seed: int, weight_decay: float = 0.01) -> TrainConfig:
    warmup = max(1, steps // 20)
    return TrainConfig(
        steps=steps,
        lr=lr,
        warmup_steps=warmup,
        decay_steps=steps - warmup,
        weight_decay=weight_decay,
        seed=seed,
        checkpoint_every=100,
        keep_stable=False,
    )


def _teller(job: Job) -> Callable[[Progress], None]:
    def tell(progress: Progress) -> None:
        if progress.step % 20 == 0 or progress.step == progress.steps:
            parts = "  ".join(f"{k} {v:.3f}" for k, v in progress.metrics.items())
            print(
                f"    {job.what}: step {progress.step} of {progress.steps}  "
                f"loss {progress.loss:.3f}  {parts}  {progress.tokens_per_s:.0f} tokens/s",
                file=sys.stderr,
                flush=True,
            )

    return tell
