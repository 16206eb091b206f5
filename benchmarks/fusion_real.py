"""Fusion of a real pretrained model: experts on SmolLM2-135M, fused by their logits alone.

    python benchmarks/fusion_real.py --json --out DIR

Each expert is SmolLM2 trained on facts of its own (brand and generic names of drugs; diseases and
their genes), each told in three wordings. The public prompts are question stems in six other
wordings with every one of the four options, unanswered, and some Wikipedia paragraphs.
Targets: a fresh SmolLM2, and SmolLM2's body with GPT-2's tokenizer. `sft` is the control: the same
prompts, steps, learning rate and batches without the experts. Accuracy is asked in a wording that
nobody has seen. The sizes were fixed before any seed but 0 was run, and 0 is no default. Progress
goes to stderr; the table and, last, one line of JSON go to stdout.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import asdict
from pathlib import Path
from typing import Final

# Run as a script, this file's own folder comes first and its files pass for packages.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.fusion_real_data import LICENCES, MissingPackageError
from benchmarks.fusion_real_jobs import Job, Scores, run, texts_of
from benchmarks.fusion_real_models import smollm2
from benchmarks.fusion_real_report import ORDER, Results, summarise, table
from benchmarks.fusion_real_sizes import Sizes
from protos.process import PARENT_VARIABLE, die_with_parent

_EXPERTS: Final = ("expert:pharmacy", "expert:genetics")
NEEDS: Final[Mapping[str, tuple[str, ...]]] = {
    **dict.fromkeys(_EXPERTS, ()),
    "base_other_tokenizer": (),
    "pivot": _EXPERTS,
    "sft": (),
    "pivot_other_tokenizer": (*_EXPERTS, "base_other_tokenizer"),
    "sft_other_tokenizer": ("base_other_tokenizer",),
    "base": (),
}
"""Every job, in the order in which they start, and what must be done before."""


def measure(jobs: Sequence[Job], workers: int) -> Results:
    """Run the jobs, `workers` at a time, each as soon as what it needs of them is done."""
    results: Results = {job.seed: {} for job in jobs}
    waiting, running = list(jobs), dict[Future[tuple[Job, Scores]], Job]()
    wanted = {job.what for job in jobs}
    context, began_s = multiprocessing.get_context("spawn"), time.perf_counter()
    # A fresh process for each job: what a model has used goes back to the machine.
    with ProcessPoolExecutor(
        workers, mp_context=context, max_tasks_per_child=1, initializer=die_with_parent
    ) as pool:
        while waiting or running:
            ready = [
                job for job in waiting if set(NEEDS[job.what]) & wanted <= results[job.seed].keys()
            ]
            for job in ready[: workers - len(running)]:
                waiting.remove(job)
                running[pool.submit(run, job)] = job
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                job, scores = future.result()
                del running[future]
                results[job.seed][job.what] = scores
                _say(
                    f"{time.perf_counter() - began_s:6.0f} s  seed {job.seed}  {job.what:22}"
                    f"{_shown(scores)}  {len(waiting) + len(running)} jobs left"
                )
    return results


def _shown(scores: Scores) -> str:
    parts = [f"{kind} {x:.2f}" for kind, x in scores["accuracy"].items()]
    return "  ".join([*parts, f"wikipedia {scores['bpb']['wikipedia']:.4f}"])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], epilog=LICENCES)
    parser.add_argument("--seeds", default="1,2,3", help="comma-separated; 0 chose the sizes")
    parser.add_argument("--only", default=",".join(NEEDS), help="models, comma-separated")
    parser.add_argument("--workers", type=int, default=2, help="processes of one thread each")
    parser.add_argument(
        "--cache",
        type=Path,
        default=Path.home() / ".cache" / "cofuse-benchmarks",
        help="folder for the converted weights, by sha256",
    )
    parser.add_argument("--work", type=Path, help="folder to resume from; models are kept there")
    parser.add_argument("--out", type=Path, help="folder for fusion_real.json and -table.md")
    parser.add_argument(
        "--set", default=[], nargs="*", metavar="NAME=VALUE", help="change a size, as in Sizes"
    )
    parser.add_argument(
        "--json", action="store_true", help="the table to stderr, only the JSON to stdout"
    )
    return parser


def main(arguments: Iterable[str] | None = None) -> int:
    """Run the benchmark and print what came out, whatever it is."""
    parser = _parser()
    options = parser.parse_args(None if arguments is None else list(arguments))
    only = options.only.split(",")
    if unknown := [name for name in only if name not in NEEDS]:
        parser.error(f"--only: found {', '.join(unknown)}, wanted some of {', '.join(ORDER)}")
    began_s = time.perf_counter()
    os.environ[PARENT_VARIABLE] = str(os.getpid())  # the workers end when this process does
    sizes = Sizes(
        **{name: json.loads(value) for name, value in (s.split("=") for s in options.set)}
    )
    seeds = [int(seed) for seed in options.seeds.split(",")]
    try:
        base = smollm2(options.cache)
        for seed in seeds:
            texts_of(seed, sizes)
    except MissingPackageError as error:
        _say(f"cannot run: {error}")
        return 2
    with tempfile.TemporaryDirectory() as temporary:
        work = options.work or Path(temporary)
        jobs = [Job(w, s, base, work, sizes) for s in seeds for w in NEEDS if w in only]
        for job in jobs:
            job.folder.mkdir(parents=True, exist_ok=True)
        summary = summarise(measure(jobs, options.workers))
    text = table(summary, sizes.facts * len(seeds))
    found = summary | {"seconds_in_all": round(time.perf_counter() - began_s, 1)}
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
        told = found | {"sizes": asdict(sizes), "seeds": seeds}
        (options.out / "fusion_real.json").write_text(json.dumps(told, indent=1) + "\n")
        (options.out / "fusion_real-table.md").write_text(text + "\n")
    print(text, file=sys.stderr if options.json else sys.stdout)
    print(json.dumps(found))
    return 0


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
