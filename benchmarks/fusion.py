"""The fusion benchmark: how much of what a pooled model would learn does each method recover?

    python benchmarks/fusion.py --json --seeds 0,1,2 --out DIR

Three hospitals (cardiology, neurology, oncology) with private text, tokenizer, size and
architecture of their own, trained in FP8; a pivot pre-trained on public text of other
specialties; every method gets the same public prompts, steps and batches. `pooled` is the pivot
trained on everybody's private text for as many steps as all experts together: the bound that no
federation may see. Progress goes to stderr; the table and, last, one line of JSON go to stdout.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

# Run as a script, this file's own folder comes first and this file passes for package `fusion`.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from cofuse.demo.corpora import Department, Limits, departments, general_text
from fp8.convert import convert_to_float8_training
from fp8.recipe import BlockScaling
from fp8.train import TrainConfig, causal_lm_loss, packed_batches, train
from fusion.codec import read_delta, read_logits, write_delta, write_logits
from fusion.evaluate import bits_per_byte, recovery
from fusion.extract import extract_logits
from fusion.merge import merge, subtract
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
from fusion.pairwise import merge_copies, one_source
from fusion.settings import FusionSettings
from fusion.unified import fuse

NAMES: Final = ("cardiology", "neurology", "oncology")
METHODS: Final = (
    "sft",
    "sft_short",
    "infifusion",
    "uniform",
    "unified",
    "pairwise",
    "weights",
    "pooled",
)
"""sft_short is the control with a third of the steps: where text is scarce, it overfits later."""
SHA: Final = "0" * 64
"""Nothing travels here, so nothing is named by its hash."""


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Everything that has a size."""

    limits: Limits
    general_bytes: int
    """Public text of what no department owns, which the base is pre-trained on."""
    experts: tuple[ModelSpec, ...]
    pivot: ModelSpec
    expert_steps: int
    base_steps: int
    fusion_steps: int
    """Of sft, infifusion, uniform, unified, and each pairwise run."""
    local_steps: int
    """Of each participant in a weights round."""
    lr: float = 3e-3
    local_lr: float = 1e-3
    batch_size: int = 8
    seq_len: int = 128
    top_k: int = 16
    distill_weight: float = 0.7
    """lambda of uniform, unified and pairwise; infifusion keeps its own 0.5."""


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
)
QUICK: Final = replace(
    FULL,
    limits=Limits(private=300_000, public=30_000, heldout=20_000, questions=1),
    expert_steps=300,
    base_steps=250,
    fusion_steps=250,
    local_steps=60,
)
"""The demo's sizes."""


@dataclass(frozen=True)
class Job:
    """One process's worth of work."""

    what: str
    seed: int
    folder: Path
    sizes: Sizes


@dataclass(frozen=True)
class Texts:
    """The text of one seed."""

    departments: list[Department]
    prompts: list[str]
    general: list[str]


def texts_of(seed: int, sizes: Sizes) -> Texts:
    """Read the text of one seed; the same seed gives the same text."""
    found = departments(NAMES, seed, limits=sizes.limits)
    general = general_text(seed, sizes.general_bytes)
    prompts = [doc for department in found for doc in department.public]
    return Texts(found, _shuffled(prompts, seed), _shuffled(general, seed))


def _shuffled(docs: Sequence[str], seed: int) -> list[str]:
    return [docs[i] for i in np.random.default_rng(seed).permutation(len(docs))]


# ---------------------------------------------------------------------------- jobs
def run(job: Job) -> tuple[Job, float, dict[str, float]]:
    """Do one job; return it with its seconds and, if it made a model, bits per byte by domain."""
    torch.set_num_threads(1)
    began_s = time.perf_counter()
    kind, _, name = job.what.partition(":")
    texts = texts_of(job.seed, job.sizes)
    made = _JOBS[kind](job, texts, name)
    bpb = (
        {} if made is None else {d.name: bits_per_byte(*made, d.heldout) for d in texts.departments}
    )
    return job, time.perf_counter() - began_s, bpb


Made = tuple[PreTrainedModel, PreTrainedTokenizerFast]


def _expert(job: Job, texts: Texts, name: str) -> Made:
    """Train one hospital's expert in FP8 on its private text, and export its contribution."""
    place, sizes = NAMES.index(name), job.sizes
    private = texts.departments[place].private
    tokenizer = train_tokenizer(private, sizes.experts[place].vocab_size)
    spec = replace(sizes.experts[place], vocab_size=len(tokenizer))
    model = build_model(spec, 10 * job.seed + place)
    convert_to_float8_training(model, BlockScaling())
    _train(model, tokenizer, private, job, sizes.expert_steps, sizes.lr)
    contribution = extract_logits(
        model,
        tokenizer,
        texts.prompts,
        top_k=sizes.top_k,
        prompt_set_sha256=SHA,
        model_sha256=SHA,
    )
    write_logits(job.folder / f"{name}.logits", contribution)
    return model, tokenizer


def _base(job: Job, texts: Texts, _name: str) -> Made:
    sizes = job.sizes
    tokenizer = train_tokenizer([*texts.general, *texts.prompts], sizes.pivot.vocab_size)
    model = build_model(replace(sizes.pivot, vocab_size=len(tokenizer)), 10 * job.seed + 9)
    _train(model, tokenizer, texts.general, job, sizes.base_steps, sizes.lr)
    save_model(model, tokenizer, job.folder / "base")
    return model, tokenizer


def _fuse(job: Job, texts: Texts, name: str) -> Made:
    """Fuse all experts, or the one named, or (sft) none."""
    model, tokenizer = load_model(job.folder / "base")
    method = job.what.partition(":")[0]
    steps = job.sizes.fusion_steps // (3 if method == "sft_short" else 1)
    settings = FusionSettings(
        train=_schedule(steps, job.sizes.lr, job.seed),
        batch_size=job.sizes.batch_size,
        seq_len=job.sizes.seq_len,
        distill_weight=job.sizes.distill_weight,
    )
    if method == "infifusion":  # its code base's own default for the share of distillation
        settings = replace(settings, loss="infifusion", distill_weight=0.5)
    elif method == "uniform":
        settings = replace(settings, routing="uniform")
    elif method.startswith("sft"):
        settings = replace(settings, loss="none")
    contributions = {n: read_logits(job.folder / f"{n}.logits") for n in NAMES}
    if method.startswith("sft"):
        contributions = {}
    if name:
        contributions = one_source(contributions)[name]
    fuse(model, tokenizer, texts.prompts, contributions, settings)
    if name:
        _ship(job, model)
    return model, tokenizer


def _local(job: Job, texts: Texts, name: str) -> Made:
    """Train the pivot on one hospital's private text and ship the difference."""
    model, tokenizer = load_model(job.folder / "base")
    private = texts.departments[NAMES.index(name)].private
    _train(model, tokenizer, private, job, job.sizes.local_steps, job.sizes.local_lr)
    _ship(job, model)
    return model, tokenizer


def _pooled(job: Job, texts: Texts, _name: str) -> Made:
    model, tokenizer = load_model(job.folder / "base")
    private = _shuffled([doc for d in texts.departments for doc in d.private], job.seed)
    _train(model, tokenizer, private, job, job.sizes.expert_steps * len(NAMES), job.sizes.lr)
    return model, tokenizer


def _merge(job: Job, _texts: Texts, name: str) -> Made:
    """Merge the copies of a pairwise round, or the deltas of a weights round."""
    model, tokenizer = load_model(job.folder / "base")
    base = parameter_arrays(model)
    if name == "weights":
        deltas = [read_delta(job.folder / f"local-{n}.delta")[1] for n in NAMES]
        load_parameter_arrays(model, merge(base, deltas, "task_arithmetic"))
        return model, tokenizer
    copies = {}
    for source in NAMES:
        delta = read_delta(job.folder / f"pairwise-{source}.delta")[1]
        copies[source] = {n: base[n] + delta[n] for n in base}
    merge_copies(model, copies)
    return model, tokenizer


_JOBS: Final[dict[str, Callable[[Job, Texts, str], Made]]] = {
    "expert": _expert,
    "base": _base,
    "local": _local,
    "pooled": _pooled,
    "merge": _merge,
    **dict.fromkeys(("sft", "sft_short", "infifusion", "uniform", "unified", "pairwise"), _fuse),
}


def _ship(job: Job, model: PreTrainedModel) -> None:
    base = parameter_arrays(load_model(job.folder / "base")[0])
    delta = subtract(parameter_arrays(model), base)
    path = job.folder / f"{job.what.replace(':', '-')}.delta"
    write_delta(path, delta, pivot_sha256=SHA, steps=0, tokens=0)


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


# ---------------------------------------------------------------------------- the whole
Results = dict[int, dict[str, dict[str, float]]]
"""Bits per byte by seed, model and domain."""

STAGES: Final = (
    [*(f"expert:{name}" for name in NAMES), "base"],
    [
        *("sft", "sft_short", "infifusion", "uniform", "unified", "pooled"),
        *(f"{kind}:{name}" for kind in ("pairwise", "local") for name in NAMES),
    ],
    ["merge:pairwise", "merge:weights"],
)


def measure(seeds: Sequence[int], sizes: Sizes, workers: int, work: Path) -> Results:
    """Run every job of every seed; two at a time by default."""
    results: Results = {seed: {} for seed in seeds}
    for seed in seeds:
        (work / str(seed)).mkdir(parents=True, exist_ok=True)
    context = multiprocessing.get_context("spawn")
    began_s = time.perf_counter()
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        for stage in STAGES:
            jobs = [Job(w, seed, work / str(seed), sizes) for seed in seeds for w in stage]
            for done in as_completed([pool.submit(run, job) for job in jobs]):
                job, seconds, bpb = done.result()
                results[job.seed][job.what.removeprefix("merge:")] = bpb
                mean = statistics.fmean(bpb.values())
                _say(
                    f"{time.perf_counter() - began_s:6.0f} s  seed {job.seed}  {job.what:22}"
                    f"{seconds:5.0f} s  {mean:.4f} bits per byte"
                )
    return results


def summarise(results: Results) -> dict[str, Any]:
    """Mean and spread of recovery by method, and mean bits per byte by model."""
    recovered: dict[str, Any] = {}
    for method in METHODS:
        by_domain = {
            domain: [
                recovery(r["base"][domain], r[method][domain], r["pooled"][domain])
                for r in results.values()
            ]
            for domain in NAMES
        }
        by_seed = [statistics.fmean(values) for values in zip(*by_domain.values(), strict=True)]
        recovered[method] = {
            "mean": statistics.fmean(by_seed),
            "sd": statistics.stdev(by_seed) if len(by_seed) > 1 else 0.0,
            "domains": {d: statistics.fmean(values) for d, values in by_domain.items()},
        }
    models = ["base", *(f"expert:{name}" for name in NAMES), *METHODS]
    bpb = {
        model: {d: statistics.fmean(r[model][d] for r in results.values()) for d in NAMES}
        for model in models
    }
    return {"recovery": recovered, "bpb": bpb}


def table(summary: dict[str, Any]) -> str:
    """Lay out the summary as a Markdown table."""
    head = ["model", *NAMES, "mean bits per byte", "recovery", "sd"]
    rows = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    for model, by_domain in summary["bpb"].items():
        cells = [model, *(f"{x:.3f}" for x in by_domain.values())]
        cells.append(f"{statistics.fmean(by_domain.values()):.3f}")
        found = summary["recovery"].get(model)
        cells += [f"{found['mean']:.2f}", f"{found['sd']:.2f}"] if found else ["", ""]
        rows.append("| " + " | ".join(cells) + " |")
    return "\n".join(rows)


def plot(summary: dict[str, Any], path: Path) -> None:
    """Draw recovery by method, with its spread over seeds."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    methods = [m for m in METHODS if m != "pooled"]
    found = [summary["recovery"][m] for m in methods]
    figure, axes = pyplot.subplots(figsize=(7, 3.2), layout="constrained")
    colours = ["#2a6f97" if m == "unified" else "#a9b4c2" for m in methods]
    axes.bar(methods, [f["mean"] for f in found], yerr=[f["sd"] for f in found], color=colours)
    axes.axhline(0, color="black", linewidth=0.8)
    axes.axhline(1, color="black", linewidth=0.8, linestyle="--")
    axes.set_ylabel("recovery (1 = pooled text)")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def sizes_for(quick: bool, minutes: float, seeds: int) -> Sizes:
    """Scale the steps down to the time there is; 40 minutes carry three full seeds."""
    sizes = QUICK if quick else FULL
    share = min(1.0, (minutes / 40) * (3 / seeds))
    return replace(
        sizes,
        expert_steps=max(1, int(sizes.expert_steps * share)),
        base_steps=max(1, int(sizes.base_steps * share)),
        fusion_steps=max(1, int(sizes.fusion_steps * share)),
        local_steps=max(1, int(sizes.local_steps * share)),
    )


def main(arguments: Iterable[str] | None = None) -> int:
    """Run the benchmark and print what came out, whatever it is."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", default="0,1,2", help="comma-separated")
    parser.add_argument("--minutes", type=float, default=40, help="scales the steps down")
    parser.add_argument(
        "--quick", action="store_true", help="the demo's sizes: a third of the time"
    )
    parser.add_argument("--distill-weight", type=float, default=FULL.distill_weight)
    parser.add_argument("--workers", type=int, default=2, help="processes of one thread each")
    parser.add_argument("--out", type=Path, help="folder for results-table.md, .json and .png")
    parser.add_argument("--work", type=Path, help="folder to keep models and contributions in")
    parser.add_argument(
        "--json", action="store_true", help="the table to stderr, only the JSON to stdout"
    )
    options = parser.parse_args(None if arguments is None else list(arguments))
    seeds = [int(seed) for seed in options.seeds.split(",")]
    began_s = time.perf_counter()
    sizes = replace(
        sizes_for(options.quick, options.minutes, len(seeds)),
        distill_weight=options.distill_weight,
    )
    with tempfile.TemporaryDirectory() as temporary:
        results = measure(seeds, sizes, options.workers, options.work or Path(temporary))
    summary = summarise(results) | {"seconds": round(time.perf_counter() - began_s, 1)}
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "results.json").write_text(json.dumps(summary, indent=1) + "\n")
        (options.out / "results-table.md").write_text(table(summary) + "\n")
        plot(summary, options.out / "results.png")
    print(table(summary), file=sys.stderr if options.json else sys.stdout)
    print(json.dumps(summary))
    return 0


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
