"""The fusion worker: `python -m coordinator.fuse_worker JOB_FOLDER`, a child of the coordinator.

Trains the runs the spec asks for (each in a process of its own, one thread each), merges where it
says so, measures every model, and lays the pivot directory down by one rename. Whatever a killed
worker has finished is kept: runs have checkpoints, finished runs are not repeated.
"""

import errno
import fcntl
import json
import multiprocessing
import os
import shutil
import sys
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Final

import torch

from coordinator.distil_run import distil
from coordinator.fuse_job import TRY_AGAIN, FuseJob
from coordinator.fusion_runs import WITHOUT, Run, plan
from coordinator.merging import copies_as_deltas, write_merged
from coordinator.pivot_files import write_pivot
from coordinator.pivot_tasks import MAX_DOMAINS, METRIC
from coordinator.preference_run import prefer, told
from coordinator.sealed import Worker, is_sealed
from coordinator.walls import fusion_wall
from fp8.train import Progress
from fusion.credit import leave_one_out
from fusion.delta_file import read_delta
from fusion.evaluate import rolling_bits_per_byte
from fusion.merge import State
from fusion.models import load_model, save_model
from fusion.scoreboard import scores_of
from protos.files import flush
from protos.messages import Report
from protos.process import PARENT_VARIABLE, die_with_parent
from protos.public_sets import PublicSetError, read_evals, read_prompt_set
from trust.walls import enter

PIVOT_MODEL: Final = {
    **{method: method for method in ("unified", "pairwise", "preference")},
    "merge": "weights",
}
"""What the pivot is called in the tables, by method."""
SHARES: Final = ("accuracy", "letter", "written")
"""Measures that are shares of questions."""
_TELL_EVERY: Final = 5
Tables = dict[str, dict[str, Mapping[str, float]]]
"""By measure, model and domain."""


def train_run(folder: Path, run: Run) -> Path:
    """Fuse one copy of the pivot; return its model folder."""
    job = FuseJob.load(folder)
    out = folder / "runs" / run.name
    if (out / "model").exists():
        return out / "model"
    loaded = load_model(folder / "pivot")
    learn = prefer if job.spec.kind == "pairs" else distil
    losses = learn(job, run, loaded, _teller(run.name))
    (out / "losses.json").write_text(json.dumps(losses), encoding="utf-8")
    _whole(out / "model", lambda partial: save_model(*loaded, partial))
    return out / "model"


def open_contributions(job: FuseJob) -> None:
    """Lay the sealed contributions out in the clear; those of older releases are not sealed.

    Raises: SealError, KeyFileError, OSError.
    """
    shutil.rmtree(job.opened, ignore_errors=True)
    job.opened.mkdir(mode=0o700)
    for name, path in job.sealed.items():
        out = job.contributions[name]
        if job.worker_folder is None or not is_sealed(path):
            out.symlink_to(path.resolve())
        else:
            worker = Worker.at(job.worker_folder)
            worker.open(path, out, round_id=job.round_id, participant=name)


def merge_runs(job: FuseJob) -> Path:
    """Merge the copies of a pairwise round, or the deltas of a weights round, around the pivot."""
    spec, out = job.spec, job.directory / "runs" / PIVOT_MODEL[job.spec.method] / "model"
    if out.exists():
        return out
    pivot = job.directory / "pivot"
    if job.spec.method == "merge":
        deltas: dict[str, State] = {n: read_delta(p)[1] for n, p in job.contributions.items()}
    else:
        runs = {n: job.directory / "runs" / f"pairwise-{n}" / "model" for n in job.contributions}
        deltas = copies_as_deltas(pivot, runs)
    texts = [prompt.text for prompt in read_prompt_set(job.prompts)] if job.prompts else []
    _whole(out, lambda partial: write_merged(spec, pivot, deltas, texts, partial))
    return out


def score(folder: Path, model_folder: Path, evals: Path) -> dict[str, dict[str, float]]:
    """Everything measured of one model, by measure and domain."""
    scores = scores_of(*load_model(model_folder), read_evals(evals).domains)
    _tell("progress", phase="evaluate", model=model_folder.parent.name)
    return scores


def rolling_scores(model_folder: Path, evals: Path) -> dict[str, float]:
    """Bits per byte of one model by domain, as lm-eval counts them."""
    loaded = load_model(model_folder)
    domains = read_evals(evals).domains
    held = {name: domain.documents for name, domain in domains.items() if domain.documents}
    return {name: rolling_bits_per_byte(*loaded, documents) for name, documents in held.items()}


def work(job: FuseJob) -> None:
    """Do the whole job."""
    _lay_out_pivot(job)
    runs = plan(job.spec, tuple(job.contributions))
    # A fork of this process, which has one thread yet, has torch loaded already.
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    with ProcessPoolExecutor(
        min(job.workers, max(2, len(runs))), mp_context=context, initializer=_one_thread
    ) as pool:
        list(pool.map(train_run, [job.directory] * len(runs), runs))
        pivot_model = PIVOT_MODEL[job.spec.method]
        models = {"base": job.directory / "pivot"}
        models |= {
            run.name: job.directory / "runs" / run.name / "model"
            for run in runs
            if run.name in job.spec.controls or run.name.startswith(WITHOUT)
        }
        if pivot_model in {run.name for run in runs}:
            models[pivot_model] = job.directory / "runs" / pivot_model / "model"
        else:
            models[pivot_model] = merge_runs(job)
        _tell("fused")
        evals: Tables = {"bpb": {}, "accuracy": {}}
        rolling: dict[str, float] = {}
        asked_of: dict[str, int] = {}
        if job.evals is not None:
            asked = [job.evals] * len(models)
            asked_of = read_evals(job.evals).counts()
            folders = [job.directory] * len(models)
            results = pool.map(score, folders, models.values(), asked)
            rolled = pool.submit(rolling_scores, models[pivot_model], job.evals)
            evals = _evals(job, dict(zip(models, results, strict=True)))
            rolling = rolled.result()
    credit = _credit(job, evals)
    values = {**evals, "questions": asked_of, "credit": credit, "pivot": pivot_model}
    values |= told(job, runs)
    if 0 < len(rolling) <= MAX_DOMAINS:
        values["lm_eval"] = {METRIC["text"]: rolling}
    _whole(job.result, lambda partial: write_pivot(job, models[pivot_model], values, partial))


def _credit(job: FuseJob, evals: Tables) -> Tables:
    """Who contributed what: routing shares, what tells against whom, the loss without each."""
    credit: Tables = {}
    run = job.directory / "runs" / PIVOT_MODEL[job.spec.method]
    files = {"share": "shares", "suspicion": "suspicion", "judgement": "judgement"}
    for measure, name in files.items():
        if (path := run / f"{name}.json").exists():
            credit[measure] = json.loads(path.read_text(encoding="utf-8"))
    if "suspicion" in credit and job.standing:
        credit["standing"] = {
            name: {**asdict(one), "weight": one.weight} for name, one in job.standing.items()
        }
    without = {
        name.removeprefix(WITHOUT): evals["bpb"].pop(name)
        for name in sorted(evals["bpb"])
        if name.startswith(WITHOUT)
    }
    for measure in SHARES:
        told = evals.get(measure, {})
        evals[measure] = {m: s for m, s in told.items() if not m.startswith(WITHOUT)}
    if without:
        whole = evals["bpb"][PIVOT_MODEL[job.spec.method]]
        lost = leave_one_out(whole, without, evals["bpb"]["base"])
        credit["leave_one_out"] = dict(lost)
    return credit


def _evals(job: FuseJob, results: dict[str, dict[str, dict[str, float]]]) -> Tables:
    """Tables by model: base, experts as they reported themselves, controls, the pivot last."""
    experts = {}
    for participant in job.spec.participants:
        if text := job.reports.get(participant):
            scores = Report.model_validate_json(text).scores
            experts[f"expert:{participant}"] = scores.model_dump()
    ordered = {"base": results.pop("base"), **experts, **results}
    domains = set(ordered["base"]["bpb"])
    return {
        "bpb": {m: s["bpb"] for m, s in ordered.items() if set(s["bpb"]) == domains},
        **{key: {m: s[key] for m, s in ordered.items() if s[key]} for key in SHARES},
    }


def _lay_out_pivot(job: FuseJob) -> None:
    """A folder that transformers can open, made of the store's files."""

    def link(partial: Path) -> None:
        partial.mkdir()
        for name, path in job.pivot_files.items():
            (partial / name).symlink_to(path.resolve())

    _whole(job.directory / "pivot", link)


def _whole(final: Path, write: Callable[[Path], None]) -> None:
    """Make a folder appear complete or not at all."""
    if final.exists():
        return
    partial = final.with_name(final.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    final.parent.mkdir(parents=True, exist_ok=True)
    write(partial)
    # A folder is believed once it has its name, so after a power cut no file in it may be short.
    for path in (*partial.rglob("*"), partial):
        if not path.is_symlink():
            flush(path)
    partial.rename(final)
    flush(final.parent)


def _teller(run: str) -> Callable[[Progress], None]:
    def tell(progress: Progress) -> None:
        if progress.step % _TELL_EVERY == 0 or progress.step == progress.steps:
            body = {"step": progress.step, "steps": progress.steps, "loss": progress.loss}
            _tell("progress", phase="train", run=run, **body)

    return tell


def _tell(kind: str, **body: Any) -> None:
    # One write a line: runs side by side share the pipe.
    os.write(1, (json.dumps({"kind": kind, **body}) + "\n").encode())


def _one_thread() -> None:
    die_with_parent()
    torch.set_num_threads(1)


def main(argv: list[str]) -> int:
    """Run the job of one folder."""
    folder = Path(argv[0])
    for words in enter(fusion_wall(FuseJob.load(folder))).missing:
        sys.stderr.write(f"{words}\n")
    die_with_parent()  # after the wall: a new user namespace may forget it
    os.environ[PARENT_VARIABLE] = str(os.getpid())
    torch.set_num_threads(1)
    with (folder / "lock").open("w") as lock:
        # An older worker that is still dying has it, and so have its children: one at a time.
        fcntl.flock(lock, fcntl.LOCK_EX)
        job = FuseJob.load(folder)
        try:
            open_contributions(job)
            work(replace(job, contributions=dict(sorted(job.contributions.items()))))
        except BrokenProcessPool:
            sys.stderr.write("a training run was killed; the machine may lack memory\n")
            return TRY_AGAIN
        except PublicSetError as error:
            sys.stderr.write(f"{error}\n")
            return 1
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            sys.stderr.write(f"the disk is full: free some of it ({folder})\n")
            return TRY_AGAIN
        finally:
            shutil.rmtree(job.opened, ignore_errors=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
