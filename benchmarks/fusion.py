"""The fusion benchmark: how much of what a pooled model would learn does each method recover?

    python benchmarks/fusion.py --json --seeds 0,1,2 --out DIR

Three hospitals (cardiology, neurology, oncology) with private text, tokenizer, size and
architecture of their own, trained in FP8; a pivot pre-trained on public text of other
specialties; every method gets the same public prompts, steps, batches and shipped bytes. `pooled`
is the pivot trained on everybody's private text for as many steps as all experts together: the
bound that no federation may see. On the first seed also: ablations, bytes shipped, two and six
hospitals. Progress goes to stderr; the table and, last, one line of JSON go to stdout.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

# Run as a script, this file's own folder comes first and this file passes for package `fusion`.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.fusion_hospitals import FULL, SIX, THREE, Job, Sizes
from benchmarks.fusion_jobs import needs, run
from benchmarks.fusion_report import (
    ABLATIONS,
    CURVES,
    FIRST_SEED,
    METHODS,
    Results,
    plot,
    summarise,
    table,
)
from benchmarks.fusion_variants import VARIANTS
from protos.process import PARENT_VARIABLE, die_with_parent

FIRST_SEED_ONLY: Final = frozenset(
    [
        *FIRST_SEED.values(),
        *ABLATIONS,
        *(job for points in CURVES.values() for job in points.values()),
    ]
) | {"pooled:2", "pooled:6"}
ORDER: Final = (
    *("base", "expert", "unified", "rounds", "pooled", "sft", "sft_short", "uniform", "minced"),
    *("gold", "infifusion", "minced_doc", "budget05", "k4", "budget20", "sft_3x", "no_alm"),
    *("no_other", "pairwise", "local", "merge", "samples", "pooled_public", "diloco", "k64"),
)
"""Of the jobs that could start, first those that others wait for, that take long, or that count."""


def jobs_of(seed: int, *, extras: bool, only: Sequence[str] = ()) -> set[str]:
    """Return the jobs of one seed with all that they need; `only` narrows them to some methods."""
    wanted = {job for name, job in METHODS.items() if not only or name in only}
    if extras and not only:
        wanted |= FIRST_SEED_ONLY
    wanted |= {"base", "pooled", *(f"expert:{name}" for name in THREE)}
    while missing := {need for what in wanted for need in needs(what)} - wanted:
        wanted |= missing
    return wanted


def measure(jobs: Sequence[Job], workers: int) -> Results:
    """Run all jobs, each as soon as what it needs is done."""
    results: Results = {job.seed: {} for job in jobs}
    waiting = sorted(jobs, key=_rank)
    running: dict[Future[Any], Job] = {}
    context = multiprocessing.get_context("spawn")
    began_s, count = time.perf_counter(), len(jobs)
    with ProcessPoolExecutor(workers, mp_context=context, initializer=die_with_parent) as pool:
        while waiting or running:
            ready = [j for j in waiting if needs(j.what) <= results[j.seed].keys()]
            for job in ready[: workers - len(running)]:
                waiting.remove(job)
                running[pool.submit(run, job)] = job
            done, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                job = running.pop(future)
                if error := future.exception():
                    _say(f"seed {job.seed}  {job.what}: {type(error).__name__}: {error}")
                    waiting = _without(waiting, job)
                    continue
                _, seconds, bpb = future.result()
                results[job.seed][job.what] = bpb
                finished = sum(len(found) for found in results.values())
                mean = statistics.fmean(bpb[domain] for domain in bpb if domain != "general")
                _say(
                    f"{time.perf_counter() - began_s:6.0f} s  {finished:3}/{count}  seed "
                    f"{job.seed}  {job.what:24}{seconds:5.0f} s  {mean:.4f} bits per byte"
                )
    return results


def _without(waiting: Sequence[Job], failed: Job) -> list[Job]:
    """Return the jobs that do not need the one that failed, not even by way of others."""
    lost = {failed.what}
    same = [job.what for job in waiting if job.seed == failed.seed]
    while more := {what for what in same if needs(what) & lost} - lost:
        lost |= more
    return [job for job in waiting if job.seed != failed.seed or job.what not in lost]


def _rank(job: Job) -> tuple[bool, int, int]:
    """What every seed needs comes before what only the first is asked for."""
    kind = job.what.partition(":")[0]
    extra = job.what in FIRST_SEED_ONLY - set(METHODS.values()) or job.what.endswith(SIX[3:])
    extra = extra or kind in ("local", "pairwise", "pairwise_equal")
    place = ORDER.index(kind) if kind in ORDER else len(ORDER)
    return (extra and kind != "rounds", place, job.seed)


def shipped_bytes(folder: Path) -> dict[str, float]:
    """Return the mean size of a source's contribution, by job."""
    found: dict[str, float] = {}
    for job in ("k1", "k4", "unified", "k64", "budget05", "budget20", "budget50"):
        options = {"top_k": FULL.top_k, **VARIANTS[job].ship}
        tag = "-".join(f"{key}{value}" for key, value in sorted(options.items()))
        files = [path for name in THREE for path in folder.glob(f"{name}-{tag}-*.safetensors")]
        if files:
            found[job] = statistics.fmean(path.stat().st_size for path in files)
    return found


def sizes_for(minutes: float, seeds: int) -> Sizes:
    """Scale the steps down to the time there is; an hour carries three full seeds."""
    share = min(1.0, (minutes / 60) * (3 / seeds))
    names = ("expert_steps", "base_steps", "fusion_steps", "local_steps", "regrow_steps")
    names += ("on_policy",)
    return replace(FULL, **{name: max(1, int(getattr(FULL, name) * share)) for name in names})


def main(arguments: Iterable[str] | None = None) -> int:
    """Run the benchmark and print what came out, whatever it is."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", default="0,1,2", help="comma-separated")
    parser.add_argument("--minutes", type=float, default=60, help="scales the steps down")
    parser.add_argument("--methods", default="", help="comma-separated; default: all")
    parser.add_argument("--no-extras", action="store_true", help="no ablations and no curves")
    parser.add_argument("--workers", type=int, default=2, help="processes of one thread each")
    parser.add_argument("--out", type=Path, help="folder for results-table.md, .json and .png")
    parser.add_argument("--work", type=Path, help="folder to keep models in, and to go on from")
    parser.add_argument(
        "--done", action="store_true", help="only tell what the --work folder of a broken run has"
    )
    parser.add_argument(
        "--json", action="store_true", help="the table to stderr, only the JSON to stdout"
    )
    options = parser.parse_args(None if arguments is None else list(arguments))
    seeds = [int(seed) for seed in options.seeds.split(",")]
    only = [name for name in options.methods.split(",") if name]
    if unknown := [name for name in only if name not in METHODS]:
        parser.error(f"--methods: found {', '.join(unknown)}, wanted some of {', '.join(METHODS)}")
    began_s = time.perf_counter()
    os.environ[PARENT_VARIABLE] = str(os.getpid())  # the workers end when this process does
    sizes = sizes_for(options.minutes, len(seeds))
    with tempfile.TemporaryDirectory() as temporary:
        work = options.work or Path(temporary)
        jobs = []
        for seed in seeds:
            (work / str(seed)).mkdir(parents=True, exist_ok=True)
            extras = seed == seeds[0] and not options.no_extras
            wanted = sorted(jobs_of(seed, extras=extras, only=only))
            jobs += [Job(what, seed, work / str(seed), sizes) for what in wanted]
        if options.done:
            jobs = [job for job in jobs if job.path(f"{job.what}.json").exists()]
        results = measure(jobs, options.workers)
        shipped = shipped_bytes(work / str(seeds[0]))
    summary = summarise(results, shipped) | {
        "seeds": seeds,
        "seconds": round(time.perf_counter() - began_s, 1),
    }
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
