"""The process that reads the corpus and holds the expert. It has no network, and asks nobody.

It trains on its own schedule, and computes what the guard asks for into the outbox; what of that
leaves is not for it to say.
"""

import queue
import shutil
import socket
import threading
from collections.abc import Callable
from concurrent.futures import Future, wait
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

import torch

from fp8.train import Progress
from participant.config import ParticipantConfig
from participant.durable import is_full
from participant.export import (
    LocalTraining,
    export_delta,
    export_logits,
    export_pairs,
    grow_expert,
    grown_folder,
    score,
)
from participant.line import Body, Line
from participant.stages.cpt import Expert, describe
from participant.status import paused
from participant.training import Training
from protos.messages import Assignment, Scores
from protos.retry import Stopped

_POLL_S: Final = 1.0
"""Between two looks at the clock, the pause and the disk."""
_RETRY_S: Final = 10.0
_LOOK_S: Final = 0.2
"""Between two looks at whether a job is still wanted."""
_Job = tuple[Callable[[], Body], "Future[Body]"]


class Program:
    """One thread computes: a job of the guard's, else the next steps of training."""

    def __init__(self, config: ParticipantConfig, end: socket.socket) -> None:
        torch.set_num_threads(config.threads)
        self._config = config
        self._outbox = config.data_dir / "outbox"
        self._expert = Expert(
            config.data_dir / "expert", config.corpus, config.model, config.canary_file
        )
        self._training = Training(config, self._expert)
        self._jobs: queue.Queue[_Job] = queue.Queue()
        self._stop = threading.Event()
        # Until the guard says otherwise: it may be at work on what this expert has answered.
        self._held = threading.Event()
        self._held.set()
        self._line = Line(end, self.stop)

    def stop(self) -> None:
        """Ask it to end; training writes a checkpoint first."""
        self._stop.set()

    def run(self) -> None:
        """Compute until stopped. Raises: CorpusError, StageError, OSError."""
        self._line.start(
            {
                ("guard", "hold"): self._hold,
                ("guard", "make"): self._on_make,
                ("guard", "tell"): self._on_tell,
            },
            {
                ("guard", "free"): lambda _: self._held.clear(),
                ("supervisor", "here"): lambda _: self._say_expert(),
                ("supervisor", "lost"): lambda _: self._held.set(),
            },
        )
        try:
            while not self._stop.is_set():
                try:
                    self._step()
                except Exception as error:
                    if not is_full(error):
                        raise
                    self._line.say("guard", "disk", {"problem": str(error)})
                    self._stop.wait(_RETRY_S)
        finally:
            self._line.close()

    def _step(self) -> None:
        if self._jobs.empty() and self._may_train() and self._training.due():
            self._train()
            return
        with suppress(queue.Empty):
            work, answer = self._jobs.get(timeout=_POLL_S)
            if answer.set_running_or_notify_cancel():
                try:
                    answer.set_result(work())
                except Exception as error:  # noqa: BLE001 - it is raised where the answer is awaited
                    answer.set_exception(error)

    def _may_train(self) -> bool:
        free = shutil.disk_usage(self._config.data_dir).free
        room = free >= self._config.min_free_mb * 1_000_000
        return not self._held.is_set() and not self._paused and room

    @property
    def _paused(self) -> bool:
        return paused(self._config.data_dir) is not None

    def _train(self) -> None:
        """Train until it is done, its window closes, or the guard wants the finished expert."""

        def should_stop() -> bool:
            wanted = self._expert.ready and self._held.is_set()
            return wanted or self._stop.is_set() or self._paused

        result = self._training.run(
            on_progress=lambda p: self._line.say("guard", "train", progress_body(p)),
            should_stop=should_stop,
        )
        self._say_expert()
        said = {"losses": result.losses} if result.finished else {}
        self._line.say("guard", "trained", said)

    # what the guard asks

    def _hold(self, _body: Body, halt: threading.Event) -> Body:
        """Train no more until `free`; the answer comes once that is so."""
        self._held.set()
        return self._do(dict, halt)

    def _do(self, work: Callable[[], Body], halt: threading.Event) -> Body:
        """Have the one thread do it, when it comes to it."""
        answer: Future[Body] = Future()
        self._jobs.put((work, answer))
        while not wait([answer], _LOOK_S).done:
            if halt.is_set() and answer.cancel():
                raise Stopped
        return answer.result()

    def _on_make(self, body: Body, halt: threading.Event) -> Body:
        return self._do(lambda: self._make(body, halt), halt)

    def _on_tell(self, body: Body, halt: threading.Event) -> Body:
        return self._do(lambda: self._tell(body), halt)

    def _make(self, body: Body, halt: threading.Event) -> Body:
        """Compute a contribution into the outbox; answer with its name there, and its model's."""
        assignment = Assignment.model_validate(body["assignment"])
        spec, pivot = assignment.spec, self._files(assignment) / "pivot"
        prompts = None
        if assignment.prompts is not None:
            prompts = self._files(assignment) / assignment.prompts.name

        def should_stop() -> bool:
            return halt.is_set() or self._stop.is_set()

        training = LocalTraining(
            corpus=self._config.corpus,
            prompts=prompts if spec.rehearse else None,
            on_progress=lambda p: self._line.say("guard", "adapt", progress_body(p)),
            should_stop=should_stop,
            canaries=self._config.canary_file,
        )
        if spec.kind == "weights":
            return {"file": _made(export_delta(pivot, training, assignment, self._outbox)).name}
        if spec.grow is not None:
            _made(grow_expert(pivot, training, assignment, self._outbox))

        def tell(done: int, total: int) -> None:
            if should_stop():
                raise Stopped
            said = {"round": assignment.round_id, "step": done, "steps": total}
            self._line.say("guard", "logits", said)

        expert = self._asked(assignment)
        if spec.kind == "pairs":
            assert assignment.pairs is not None
            pairs = self._files(assignment) / assignment.pairs.name
            return {"file": export_pairs(expert, pairs, assignment, self._outbox, tell).name}
        assert prompts is not None
        beside = pivot if spec.ship_share < 1 else None
        path = export_logits(expert, prompts, assignment, self._outbox, tell, pivot=beside)
        return {"file": path.name}

    def _tell(self, body: Body) -> Body:
        """Describe the model that a contribution tells of, and score it, where that may leave."""
        assignment = Assignment.model_validate(body["assignment"])
        expert, scores = self._asked(assignment), Scores()
        if body["score"] and assignment.evals is not None:
            evals = self._files(assignment) / assignment.evals.name
            scores = score(expert, evals, self._outbox)
        return {"scores": scores.model_dump(), "model": describe(expert)}

    def _files(self, assignment: Assignment) -> Path:
        """Where the round's public files lie."""
        return self._config.data_dir / "rounds" / assignment.round_id

    def _asked(self, assignment: Assignment) -> Path:
        """The folder of the model that the contribution and the report tell of."""
        grows = assignment.spec.grow is not None
        return grown_folder(assignment, self._outbox) if grows else self._expert.directory

    def _say_expert(self) -> None:
        facts = asdict(self._expert.facts())
        del facts["stages"]  # for training alone
        self._line.say("guard", "expert", {"ready": self._expert.ready, **facts})


def progress_body(progress: Progress) -> dict[str, Any]:
    """Progress of a training as the daemon tells it."""
    return {
        "step": progress.step,
        "steps": progress.steps,
        "loss": progress.loss,
        "tokens_per_s": progress.tokens_per_s,
    }


def _made(made: Path | None) -> Path:
    """Return what training made. Raises: Stopped when it was stopped before the end."""
    if made is None:
        raise Stopped
    return made
