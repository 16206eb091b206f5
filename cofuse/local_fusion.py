"""A fusion from local directories: what a round does, without a coordinator.

The sources' contributions are made here, in a child process, and fused by the coordinator's own
worker, so that a local fusion and a round are one code path. Everything finished is kept in the
work folder under the digests of what it was made from: started again, a fusion goes on, and
another spec with the same sources does not ask them anew. torch is loaded in children only.
"""

import fcntl
import hashlib
import json
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import yaml

from cofuse.local_spec import FEDERATED, UNTRAINED, LocalSpec
from coordinator.fuse_job import FuseJob, JobFailedError, run_job
from coordinator.pivot_card import json_text, model_card, sums
from fusion.contribution import CODEC_VERSION
from protos.chunks import sha256_of
from protos.messages import Report, Scores
from protos.process import end, spawn
from protos.spec import RoundSpec

if TYPE_CHECKING:
    from cofuse.local_check import Checked, Source

OnEvent = Callable[[str, dict[str, Any]], None]
ROUND: Final = "local"
"""Stands where a round's id stands otherwise."""
MERGED: Final = "weights"
"""The worker's name for a merged pivot: where it finds one, it merges nothing itself."""
SOURCES: Final = "cofuse.local_sources"
_POLL_S: Final = 0.5


class LocalFusionError(RuntimeError):
    """A child process failed; the message holds its last word and where the rest lies."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What is wanted of one source: files, each named by the digests of all it is made from."""

    name: str
    path: Path
    digest: str
    """Of the model, its tokenizer and config; of the contribution file."""
    contribution: Path
    """What the worker reads; of a model to merge, its (first) file of weights."""
    model_sha256: str | None = None
    """None for a contribution file."""
    made: Path | None = None
    """The contribution, when it is to be made here: log-probabilities, or scores of pairs."""
    scores: Path | None = None
    """The model's own scores, JSON; None when nobody asks for them."""

    @property
    def missing(self) -> bool:
        """Whether there is something to make."""
        return any(path is not None and not path.exists() for path in (self.made, self.scores))


def fuse_locally(checked: "Checked", work: Path, *, workers: int, on_event: OnEvent) -> FuseJob:
    """Do the whole fusion below `work`; the pivot directory is the job's result.

    Raises: LocalFusionError when a child fails; BlockingIOError when another fusion is at work
        in the same folder.
    """
    work = work.resolve()
    with _alone(work):
        wanted = [_wanted(checked, source, work / "sources") for source in checked.sources]
        job = _job(checked, work, wanted, workers)
        if not job.result.exists():
            _ask_sources(checked, work, wanted, job, on_event)
        scored = {row.name: row.scores for row in wanted if row.scores is not None}
        job = replace(job, reports={n: _report(p) for n, p in scored.items() if p.exists()})
        try:
            run_job(job, on_event=on_event)
        except JobFailedError as error:
            status = str(error).partition(":")[0]
            log = job.directory / "stderr.log"
            raise LocalFusionError(f"{status}: {last_words(log)}") from error
        return job


def _wanted(checked: "Checked", source: "Source", folder: Path) -> Wanted:
    name, path = source.name, source.path
    model, spec = source.model, checked.spec.round
    if model is None:
        digest = sha256_of(source.path)
        return Wanted(name=name, path=path, digest=digest, contribution=path)
    weights = model.digest()
    # The same weights with another tokenizer or config are another expert.
    names = sorted(n for n in model.files if n.endswith(".json") and "index" not in n)
    digest = _key(weights, *(sha256_of(model.files[name]) for name in names))
    made = None
    if spec.kind == "pairs":
        assert checked.pairs is not None
        made = folder / f"pairs-{_key(digest, checked.pairs.sha256)}.json"
    elif spec.method != "merge":
        made = folder / f"logits-{_asked(checked, spec, digest)}.safetensors"
    scores = None
    if checked.evals_sha256 is not None and model.quantized is None:
        scores = folder / f"scores-{_key(digest, checked.evals_sha256)}.json"
    return Wanted(
        name=name,
        path=path,
        digest=digest,
        model_sha256=weights,
        contribution=made or model.weights[0],
        made=made,
        scores=scores,
    )


def _asked(checked: "Checked", spec: RoundSpec, digest: str) -> str:
    """The key of what is asked of a model about the prompt set."""
    rows = [f"k{spec.top_k}", f"v{CODEC_VERSION}"]
    if spec.sampler == "samples":
        rows.append(f"n{spec.draws} s{spec.seed}")
    if spec.ship_share < 1:
        rows.append(f"{spec.ship_share} over {checked.pivot.digest()}")
    return _key(digest, str(checked.prompts_sha256), *rows)


def _ask_sources(
    checked: "Checked", work: Path, wanted: list[Wanted], job: FuseJob, on_event: OnEvent
) -> None:
    """Make what is missing of the sources; merge them, when they are models to merge."""
    spec = checked.spec
    merged = job.directory / "runs" / MERGED / "model"
    merges = spec.round.method == "merge" and wanted[0].model_sha256 is not None
    if not any(row.missing for row in wanted) and (merged.exists() or not merges):
        return
    task = {
        "pivot": checked.pivot.folder,
        "prompts": spec.prompts,
        "prompts_sha256": checked.prompts_sha256,
        "pairs": spec.pairs,
        "evals": spec.evals,
        "spec": spec.round.model_dump(mode="json"),
        "sources": [asdict(row) for row in wanted if row.model_sha256 is not None],
        "merged": merged if merges else None,
    }
    (work / "sources").mkdir(exist_ok=True)
    path = work / "sources.json"
    path.write_text(json.dumps(task, default=str, indent=1), encoding="utf-8")
    _run_child(SOURCES, path, work / "sources.log", on_event)


def _job(checked: "Checked", work: Path, wanted: list[Wanted], workers: int) -> FuseJob:
    """The fusion as the coordinator's worker takes it, in a folder named by all that decides it."""
    spec = checked.spec
    digests = {"prompts": checked.prompts_sha256, "evals": checked.evals_sha256}
    if spec.pairs is not None:
        digests = {"pairs": sha256_of(spec.pairs), "evals": checked.evals_sha256}
    pinned = {key: value and f"sha256:{value}" for key, value in digests.items()}
    round_spec = spec.round.model_copy(update=pinned)
    files = checked.pivot.files
    identity = {
        "spec": round_spec.model_dump(mode="json"),
        "pivot": {name: sha256_of(path) for name, path in files.items()},
        "sources": {row.name: row.digest for row in wanted},
        "codec": CODEC_VERSION,
    }
    return FuseJob(
        directory=work / f"job-{_key(json_text(identity))}",
        round_id=ROUND,
        pivot_name=spec.round.name,
        spec=round_spec,
        pivot_files=files,
        contributions={row.name: row.contribution for row in wanted},
        reports={},
        prompts=spec.prompts,
        evals=spec.evals,
        pairs=spec.pairs,
        workers=workers,
    )


def _report(path: Path) -> str:
    scores = Scores.model_validate_json(path.read_text(encoding="utf-8"))
    return Report(round_id=ROUND, attempt=1, status="committed", scores=scores).model_dump_json()


def lay_down(checked: "Checked", job: FuseJob, out: Path) -> dict[str, Any]:
    """Copy the job's result to `out`, which is replaced, with the lineage of a local fusion.

    Returns: evals.json.
    """
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.parent.mkdir(parents=True, exist_ok=True)
    shutil.copytree(job.result, partial)
    evals: dict[str, Any] = json.loads((partial / "evals.json").read_text(encoding="utf-8"))
    lineage = json.loads((partial / "lineage.json").read_text(encoding="utf-8"))
    lineage |= {"name": out.name, "parent": checked.pivot.folder.name, "round_id": ROUND}
    lineage["spec"] = _told(checked.spec, lineage["spec"])
    for source in checked.sources:
        if checked.spec.round.method == "merge" and source.model is not None:
            size = sum(path.stat().st_size for path in source.model.weights)
            part = {"sha256": source.model.digest(), "size_bytes": size}
            lineage["contributions"][source.name] = part
    texts = {
        "lineage.json": json_text(lineage),
        "round.yaml": yaml.safe_dump(lineage["spec"], sort_keys=False),
        "README.md": model_card(lineage, evals),
    }
    lines = (partial / "SHA256SUMS").read_text(encoding="utf-8").splitlines()
    digests = {name: digest for digest, name in (line.split("  ", 1) for line in lines)}
    for name, text in texts.items():
        (partial / name).write_text(text, encoding="utf-8")
        digests[name] = sha256_of(partial / name)
    (partial / "SHA256SUMS").write_text(sums(digests), encoding="utf-8")
    if out.exists():
        old = out.with_name(out.name + ".old")
        shutil.rmtree(old, ignore_errors=True)
        out.rename(old)
        partial.rename(out)
        shutil.rmtree(old)
    else:
        partial.rename(out)
    return evals


def _told(spec: LocalSpec, values: dict[str, Any]) -> dict[str, Any]:
    """The spec as lineage tells it: names of folders, digests of files, nothing of this machine."""
    dropped = {*FEDERATED} - {"kind"}
    if values["method"] == "merge" and values["training"].items() >= UNTRAINED.items():
        dropped.add("training")
    kept = {key: value for key, value in values.items() if key not in dropped}
    sources = {name: path.name for name, path in spec.sources.items()}
    return {**kept, "pivot": spec.pivot.name, "sources": sources}


def _key(*parts: str) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


@contextmanager
def _alone(work: Path) -> Iterator[None]:
    """Keep a second fusion out of the folder for as long as this one works in it."""
    work.mkdir(parents=True, exist_ok=True)
    with (work / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield


def _run_child(module: str, argument: Path, log: Path, on_event: OnEvent) -> None:
    with log.open("w+", encoding="utf-8") as stderr:
        child = spawn(module, [str(argument)], stderr=stderr)
        reader = threading.Thread(target=_relay, args=(child, on_event), daemon=True)
        reader.start()
        try:
            while child.poll() is None:
                # In slices: a signal's handler runs between them.
                try:
                    child.wait(_POLL_S)
                except subprocess.TimeoutExpired:
                    continue
            reader.join()
        finally:
            end(child)
    if child.returncode != 0:
        raise LocalFusionError(
            f"reading the sources ended with status {child.returncode}: {last_words(log)}"
        )


def last_words(log: Path) -> str:
    """The last line of a log: what a Python program died of."""
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return f"{lines[-1] if lines else 'without a word'} (all of it: {log})"


def _relay(child: "subprocess.Popen[str]", on_event: OnEvent) -> None:
    assert child.stdout is not None
    for line in child.stdout:
        try:
            message = json.loads(line)
            on_event(message.pop("kind"), message)
        except (json.JSONDecodeError, KeyError, AttributeError):
            continue  # some library's own words
