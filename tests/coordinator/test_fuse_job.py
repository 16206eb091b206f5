"""A fusion's process: it ends when it is told to, and how it ended is told apart."""

import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from coordinator import fuse_job
from coordinator.fuse_job import TRY_AGAIN, FuseJob, Fusion, JobFailedError, JobLostError
from tests.coordinator.test_fuse_worker import spec

WAIT = 'import sys; print(\'{"kind": "progress", "step": 1}\', flush=True); sys.stdin.read()'


@pytest.fixture
def fusion(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Fusion]:
    """A fusion whose worker is a few lines of Python, given as text."""

    def make(program: str) -> Fusion:
        def spawn(_module: str, _arguments: list[str], **options: Any) -> Any:
            options.pop("environment")
            command = [sys.executable, "-c", program]
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
            return subprocess.Popen(command, start_new_session=True, **pipes, **options)

        monkeypatch.setattr(fuse_job, "spawn", spawn)
        return Fusion(
            FuseJob(
                directory=tmp_path / "job", round_id="rnd-1", pivot_name="pivot-1", spec=spec(),
                pivot_files={}, contributions={}, reports={}, prompts=None, evals=None,
            )
        )  # fmt: skip

    return make


def ignore(_kind: str, _body: dict[str, Any]) -> None:
    """Words of the worker that a test does not ask for."""


def test_a_worker_is_ended_at_once_when_nobody_wants_it_any_more(
    fusion: Callable[[str], Fusion],
) -> None:
    running, spoken, returned = fusion(WAIT), threading.Event(), []
    thread = threading.Thread(
        target=lambda: returned.append(running.run(on_event=lambda *_: spoken.set()))
    )
    thread.start()
    assert spoken.wait(20)
    running.stop()
    thread.join(5)
    assert returned == [False]


def test_one_that_is_ended_before_it_began_never_begins(fusion: Callable[[str], Fusion]) -> None:
    running = fusion("raise SystemExit(3)")
    running.stop()
    assert not running.run(on_event=ignore)


@pytest.mark.parametrize(
    ("program", "kind", "says"),
    [
        ("raise ValueError('the logits are broken')", JobFailedError, "the logits are broken"),
        ("import os; os.kill(os.getpid(), 9)", JobLostError, "killed by signal 9"),
        (f"import sys; sys.exit({TRY_AGAIN})", JobLostError, "status 75"),
        ("", JobFailedError, "status 0"),  # it ended well, and made nothing
    ],
)
def test_how_a_worker_ended_is_told(
    fusion: Callable[[str], Fusion], program: str, kind: type[JobFailedError], says: str
) -> None:
    with pytest.raises(JobFailedError, match=says) as caught:
        fusion(program).run(on_event=ignore)
    assert type(caught.value) is kind


def test_only_a_worker_that_computes_has_a_beat(
    fusion: Callable[[str], Fusion], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fuse_job, "BEAT_S", 0.2)
    beats = threading.Semaphore(0)
    running = fusion("while True: pass")
    thread = threading.Thread(
        target=running.run, kwargs={"on_event": ignore, "on_beat": beats.release}
    )
    thread.start()
    assert beats.acquire(timeout=20)
    worker = running._worker
    assert worker is not None
    worker.send_signal(signal.SIGSTOP)
    while beats.acquire(timeout=1):  # those that were on the way
        pass
    running.stop()
    thread.join(5)
    assert not thread.is_alive()
