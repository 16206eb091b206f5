"""One fusion as a job folder and a child process: the server itself never imports torch.

job.json says everything; result/ appears whole, by one rename, when the worker is done.
"""

import contextlib
import json
import os
import signal
import subprocess
import threading
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any, Final

import psutil

from coordinator.standing import Standing
from protos.process import end, give_way, spawn
from protos.spec import RoundSpec
from trust.walls import scratch

BEAT_S: Final = 5.0
TRY_AGAIN: Final = 75
"""The worker's status when the machine failed it, not the job (EX_TEMPFAIL of sysexits.h)."""
OPENED: Final = "opened"
_STDERR_TAIL: Final = 12
OnEvent = Callable[[str, dict[str, Any]], None]


class JobFailedError(RuntimeError):
    """The worker ended without a result; the message holds its last words."""


class JobLostError(JobFailedError):
    """The worker was killed, or the disk was full: another one may make the result."""


@dataclass(frozen=True, kw_only=True)
class FuseJob:
    """Inputs of one fusion. The result is a pure function of these and nothing else."""

    directory: Path
    round_id: str
    pivot_name: str
    spec: RoundSpec
    pivot_files: dict[str, Path]
    contributions: dict[str, Path]
    """By participant, sorted by name. Those of sealed ones are there while the worker runs."""
    reports: dict[str, str]
    prompts: Path | None
    evals: Path | None
    pairs: Path | None = None
    workers: int = 1
    """Training runs side by side, one thread each: small models gain nothing from more."""
    sealed: dict[str, Path] = field(default_factory=dict)
    """By participant: what the worker opens, into `opened`."""
    worker_folder: Path | None = None
    """Holds the key that opens them."""
    standing: dict[str, Standing] = field(default_factory=dict)
    """By participant: what earlier rounds found of it."""

    @property
    def result(self) -> Path:
        """Where the finished pivot directory appears."""
        return self.directory / "result"

    @property
    def opened(self) -> Path:
        """Where contributions lie in the clear, as long as the worker runs."""
        return self.directory / OPENED

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
            for key in ("pivot_files", "contributions", "sealed")
        }
        names = ("prompts", "evals", "pairs", "worker_folder")
        optional = {name: Path(values[name]) if values[name] else None for name in names}
        spec = RoundSpec.model_validate_json(json.dumps(values["spec"]))
        standing = {name: Standing(**one) for name, one in values["standing"].items()}
        own = {"directory": directory, "spec": spec, "standing": standing}
        return cls(**{**values, **paths, **optional, **own})


class Fusion:
    """A worker at one job. Killed at any line, the next one goes on where it was."""

    def __init__(self, job: FuseJob) -> None:
        self._job = job
        self._worker: subprocess.Popen[str] | None = None
        self._stopped = False
        self._lock = threading.Lock()

    def run(self, *, on_event: OnEvent, on_beat: Callable[[], None] = lambda: None) -> bool:
        """Run the worker until it has made the result; do nothing when the result is there.

        Args: on_event: its words, called in another thread. on_beat: every few seconds in which
            it has computed.
        Returns: whether the result is there; False only after stop().
        Raises: JobLostError when it was killed or had no room: another may do better.
            JobFailedError when it failed for good.
        """
        if self._job.result.exists():
            return True
        self._job.save()
        with (self._job.directory / "stderr.log").open("w+", encoding="utf-8") as stderr:
            worker = self._spawn(stderr)
            if worker is None:
                return False
            reader = threading.Thread(target=_relay, args=(worker, on_event), daemon=True)
            reader.start()
            try:
                _watch(worker, on_beat)
                reader.join()
            finally:
                end(worker)
            if self._stopped:
                return False
            if worker.returncode != 0 or not self._job.result.exists():
                raise _error(worker.returncode, stderr)
        return True

    def stop(self) -> None:
        """End the worker and its children at once, from any thread; run() then returns False."""
        with self._lock:
            self._stopped = True
            if self._worker is not None and self._worker.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(self._worker.pid, signal.SIGKILL)

    def _spawn(self, stderr: IO[str]) -> "subprocess.Popen[str] | None":
        with self._lock:
            if self._stopped:
                return None
            place = self._job.directory / "scratch"
            place.mkdir(exist_ok=True)
            self._worker = spawn(
                "coordinator.fuse_worker",
                [str(self._job.directory)],
                stderr=stderr,
                environment={**scratch(place), "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"},
            )
            give_way(self._worker)
            return self._worker


def run_job(job: FuseJob, *, on_event: OnEvent) -> None:
    """Run the worker until it has made the result, in this thread.

    Raises: JobFailedError.
    """
    Fusion(job).run(on_event=on_event)


def _watch(worker: "subprocess.Popen[str]", on_beat: Callable[[], None]) -> None:
    """Wait for the worker's end. One that hangs uses no processor, and has no beat."""
    used_s = 0.0
    while True:
        try:
            worker.wait(BEAT_S)
            return
        except subprocess.TimeoutExpired:
            now_s = _processor_s(worker.pid)
            if now_s != used_s:
                on_beat()
            used_s = now_s


def _processor_s(pid: int) -> float:
    """Seconds of processor time of a process and its children."""
    total = 0.0
    with contextlib.suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        for one in (process, *process.children(recursive=True)):
            with contextlib.suppress(psutil.NoSuchProcess):
                times = one.cpu_times()
                total += times.user + times.system
    return total


def _error(status: int, stderr: IO[str]) -> JobFailedError:
    stderr.seek(0)
    words = " | ".join(stderr.read().strip().splitlines()[-_STDERR_TAIL:])[-1500:]
    if status < 0:
        how = f"was killed by signal {-status}; if nobody did, the machine lacks memory"
        return JobLostError(f"the fusion worker {how}: {words}".rstrip(": "))
    kind = JobLostError if status == TRY_AGAIN else JobFailedError
    return kind(f"the fusion worker ended with status {status}: {words}")


def _relay(worker: "subprocess.Popen[str]", on_event: OnEvent) -> None:
    assert worker.stdout is not None
    for line in worker.stdout:
        try:
            message = json.loads(line)
            kind = message.pop("kind")
        except (json.JSONDecodeError, KeyError, AttributeError, TypeError):
            continue  # some library's own words
        on_event(kind, message)
