"""The loop a data officer can read: train, take an assignment, ask the policy, release.

`python -m participant.daemon participant.toml`. It dials out and listens on nothing but the
engine's loopback port. Safe to kill at any line: started again, it goes on.
"""

import json
import logging
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, Literal

import torch

from fp8.train import Progress
from participant.client import Client, Stopped
from participant.config import ParticipantConfig, load_config
from participant.corpus import CorpusError
from participant.egress import EgressLog
from participant.engine import Engine, Task
from participant.export import export_delta, export_logits, score
from participant.policy import (
    Policy,
    PolicyRefusalError,
    check,
    check_positions,
    load_policy,
)
from participant.stages.cpt import Expert
from protos import logs
from protos.chunks import sha256_of
from protos.config import ConfigError
from protos.errors import RemoteError
from protos.messages import Assignment, Report, Scores
from protos.process import die_with_parent, on_stop_signal

VERSION: Final = "0.1.0"
_POLL_S: Final = 1.0
_LOG = logging.getLogger(__name__)

Status = Literal["committed", "refused", "failed"]
Tell = Callable[[str, dict[str, Any]], None]


class Participant:
    """One institution's daemon."""

    def __init__(self, config: ParticipantConfig, policy: Policy, tell: Tell) -> None:
        self._config = config
        self._policy = policy
        self._tell = tell
        self._stop = threading.Event()
        self._outbox = config.data_dir / "outbox"
        self._outbox.mkdir(parents=True, exist_ok=True)
        self._expert = Expert(config.data_dir / "expert", config.corpus, config.model)
        self._egress = EgressLog(config.data_dir / "egress.jsonl")
        self._client = Client(config.coordinator, config.tls.files(), self._stop)

    def stop(self) -> None:
        """Ask the loop to end at its next step; training writes a checkpoint first."""
        self._stop.set()

    def run(self) -> None:
        """Serve rounds, and train the expert whenever there is none to serve, until stopped."""
        engine = Engine(
            state_dir=self._config.data_dir / "engine",
            superlink_address=self._client.join(VERSION),
            ca=self._config.tls.ca,
            certificate=self._config.tls.certificate,
            key=self._config.tls.key,
        )
        engine.start()
        self._tell("joined", {})
        trained = False
        task: Task | None = None

        def interrupted() -> bool:
            """Training gives way to a round once there is an expert to ask."""
            nonlocal task
            if task is None and self._expert.ready:
                task = engine.next_task(0)
            return task is not None or self._stop.is_set()

        try:
            while not self._stop.is_set():
                if not trained and task is None:
                    trained = self._train(interrupted)
                task = task or engine.next_task(_POLL_S)
                if task is not None and not self._stop.is_set():
                    self._serve(task)
                    task = None
        finally:
            engine.stop()
            self._client.close()

    def _train(self, interrupted: Callable[[], bool]) -> bool:
        result = self._expert.pretrain(
            self._config.training,
            on_progress=lambda p: self._tell_training("train", p),
            should_stop=interrupted,
        )
        if result.finished:
            self._tell("trained", {"losses": result.losses})
        return result.finished

    def _serve(self, task: Task) -> None:
        """Answer one assignment, whatever it is: the other side must never wait for nothing."""
        try:
            assignment = Assignment.model_validate_json(task.payload)
        except ValueError as error:
            task.fail(f"unreadable assignment: {error}")
            return
        try:
            report = self._work(assignment)
        except PolicyRefusalError as error:
            report = self._report(assignment, "refused", detail=str(error))
        except Stopped:
            task.fail("the participant is stopping; send it again")
            return
        except Exception as error:  # noqa: BLE001 - the one catch-all: the round must hear of it
            _LOG.exception("assignment %s failed", assignment.round_id)
            words = f"{type(error).__name__}: {error}"
            if isinstance(error, CorpusError):
                words = "the corpus cannot be read; its keeper finds the line in the local log"
            report = self._report(assignment, "failed", detail=words[:2000])
        payload = report.model_dump_json()
        self._record(assignment, "report", len(payload.encode()), "")
        task.reply(payload)
        self._tell("round", {"round": assignment.round_id, "status": report.status})

    def _work(self, assignment: Assignment) -> Report:
        check(self._policy, assignment)
        self._tell("round", {"round": assignment.round_id, "status": "working"})
        path = self._make(assignment)
        sha256, size = sha256_of(path), path.stat().st_size
        self._release(assignment, path, sha256, size)
        return self._report(assignment, "committed", sha256=sha256, size_bytes=size)

    def _make(self, assignment: Assignment) -> Path:
        """Compute the contribution from the public files the assignment names."""
        files = self._config.data_dir / "rounds" / assignment.round_id
        spec = assignment.spec
        if spec.kind == "weights" or spec.ship_share < 1:
            for reference in assignment.pivot:
                self._client.fetch(reference, files / "pivot")
        if spec.kind == "weights":
            path = export_delta(
                files / "pivot",
                self._config.corpus,
                assignment,
                self._outbox,
                on_progress=lambda p: self._tell_training("adapt", p),
                should_stop=self._stop.is_set,
            )
            if path is None:
                raise Stopped
            return path
        assert assignment.prompts is not None
        prompts = self._client.fetch(assignment.prompts, files)

        def tell(done: int, total: int) -> None:
            check_positions(self._policy, total)
            self._tell("logits", {"round": assignment.round_id, "step": done, "steps": total})

        pivot = files / "pivot" if spec.ship_share < 1 else None
        return export_logits(self._expert, prompts, assignment, self._outbox, tell, pivot=pivot)

    def _release(self, assignment: Assignment, path: Path, sha256: str, size: int) -> None:
        """The one door out for bulk bytes: written down first, then sent, then receipted."""
        leaving = self._client.missing_bytes(path, sha256)
        self._tell("ship", {"round": assignment.round_id, "size_bytes": leaving})
        self._record(assignment, assignment.spec.kind, leaving, sha256)
        self._client.put(path, sha256)
        self._client.commit(assignment.round_id, sha256, size)

    def _record(self, assignment: Assignment, what: str, size: int, sha256: str) -> None:
        self._egress.append(round_id=assignment.round_id, what=what, size_bytes=size, sha256=sha256)
        self._tell("egress", {"round": assignment.round_id, "bytes": self._egress.total_bytes()})

    def _report(self, assignment: Assignment, status: Status, **fields: Any) -> Report:
        scores = Scores()
        if assignment.evals is not None and self._policy.ship_scores and status == "committed":
            folder = self._config.data_dir / "rounds" / assignment.round_id
            evals = self._client.fetch(assignment.evals, folder)
            self._tell("score", {"round": assignment.round_id})
            scores = score(self._expert, evals, self._outbox)
        return Report(
            round_id=assignment.round_id,
            attempt=assignment.attempt,
            status=status,
            scores=scores,
            parameters=self._expert.parameters() if status == "committed" else 0,
            architecture=self._config.model.architecture,
            vocabulary=self._config.model.vocab_size,
            **fields,
        )

    def _tell_training(self, kind: str, progress: Progress) -> None:
        body = {"step": progress.step, "steps": progress.steps, "loss": progress.loss}
        self._tell(kind, {**body, "tokens_per_s": progress.tokens_per_s})


def main(argv: list[str]) -> int:
    """Run the daemon of one participant.toml."""
    die_with_parent()
    logs.configure("participant")
    if len(argv) != 1:
        sys.stderr.write("usage: python -m participant.daemon participant.toml\n")
        return 2
    try:
        config = load_config(Path(argv[0]))
        policy = load_policy(config.policy)
    except ConfigError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    torch.set_num_threads(config.threads)
    participant = Participant(config, policy, _tell_stdout)
    on_stop_signal(participant.stop)
    try:
        participant.run()
    except Stopped:
        return 0
    except (CorpusError, RemoteError) as error:
        sys.stderr.write(f"{error}\n")
        return 1
    return 0


def _tell_stdout(kind: str, body: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps({"kind": kind, **body}) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
