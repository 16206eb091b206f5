"""One fusion as a job folder and a child process: the server itself never imports torch.

job.json says everything; result/ appears whole, by one rename, when the worker is done.
"""

import json
import subprocess
import threading
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from protos.process import end, spawn
from protos.spec import RoundSpec

_POLL_S = 0.5
_STDERR_TAIL = 12


class JobFailedError(RuntimeError):
    """The worker ended without a result; the message holds its last words."""


@dataclass(frozen=True, kw_only=True)
class FuseJob:
    """Inputs of one fusion. The result is a pure function of these and nothing else."""

    directory: Path
    round_id: str
    pivot_name: str
    spec: RoundSpec
    pivot_files: dict[str, Path]
    contributions: dict[str, Path]
    """By participant, sorted by name."""
    reports: dict[str, str]
    prompts: Path | None
    evals: Path | None
    workers: int = 1
    """Training runs side by side, one thread each: small models gain nothing from more."""

    @property
    def result(self) -> Path:
        """Where the finished pivot directory appears."""
        return self.directory / "result"

    def save(self) -> None:
        """Write job.json."""
        self.directory.mkdir(parents=True, exist_ok=True)
        values = {**asdict(self), "spec": json.loads(self.spec.model_dump_json())}
        text = json.dumps(values, default=str, indent=1, sort_keys=True)
        (self.directory / "job.json").write_text(text, encoding="utf-8")

    @classmethod
    def load(cls, directory: Path) -> "FuseJob":
        """Read job.json back."""
        values = json.loads((directory / "job.json").read_text(encoding="utf-8"))
        paths = {
            key: {name: Path(path) for name, path in values[key].items()}
            for key in ("pivot_files", "contributions")
        }
        optional = {k: Path(values[k]) if values[k] else None for k in ("prompts", "evals")}
        spec = RoundSpec.model_validate_json(json.dumps(values["spec"]))
        return cls(**{**values, **paths, **optional, "directory": directory, "spec": spec})


def run_job(
    job: FuseJob,
    *,
    on_event: Callable[[str, dict[str, Any]], None],
    should_stop: Callable[[], bool],
) -> None:
    """Run the worker until it has made the result; do nothing when the result is there.

    Raises: JobFailedError. Returns early, without a result, when should_stop() says so.
    """
    if job.result.exists():
        on_event("fused", {})
        return
    job.save()
    with (job.directory / "stderr.log").open("w+", encoding="utf-8") as stderr:
        worker = spawn(
            "coordinator.fuse_worker",
            [str(job.directory)],
            stderr=stderr,
            environment={"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"},
        )
        reader = threading.Thread(target=_relay, args=(worker, on_event), daemon=True)
        reader.start()
        try:
            while not should_stop():
                try:
                    worker.wait(_POLL_S)
                    break
                except subprocess.TimeoutExpired:
                    continue
            else:
                return
            reader.join()
        finally:
            end(worker)
        if worker.returncode != 0 or not job.result.exists():
            stderr.seek(0)
            words = " | ".join(stderr.read().strip().splitlines()[-_STDERR_TAIL:])
            raise JobFailedError(
                f"the fusion worker ended with status {worker.returncode}: {words[-1500:]}"
            )


def _relay(
    worker: "subprocess.Popen[str]", on_event: Callable[[str, dict[str, Any]], None]
) -> None:
    assert worker.stdout is not None
    for line in worker.stdout:
        try:
            message = json.loads(line)
            on_event(message.pop("kind"), message)
        except (json.JSONDecodeError, KeyError, AttributeError):
            continue  # some library's own words
