"""One round's work: compute from the expert what the guard lets out, ship it, say what was done."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from fp8.train import Progress
from participant.client import Client, Stopped
from participant.config import ParticipantConfig
from participant.corpus import CorpusError
from participant.egress import EgressLog
from participant.export import (
    LocalTraining,
    export_delta,
    export_logits,
    grow_expert,
    grown_folder,
    score,
)
from participant.guard import Guard, Released
from participant.pivots import fetch_pivot
from participant.policy import PolicyRefusalError
from participant.receipts import keep as keep_receipt
from participant.sealing import Asked, Draft, question_of
from participant.spool import Entry
from participant.stages.cpt import Expert, describe
from protos.chunks import sha256_of
from protos.messages import Assignment, Report, Scores
from protos.public_sets import read_evals, read_prompts
from trust.pivot_manifest import ManifestError

_LOG = logging.getLogger(__name__)
Status = Literal["committed", "refused", "failed", "waiting"]
Tell = Callable[[str, dict[str, Any]], None]


class Worker:
    """Does what an assignment asks. Every step may be repeated after a crash."""

    def __init__(self, config: ParticipantConfig, guard: Guard, expert: Expert, tell: Tell) -> None:
        self._config = config
        self._guard = guard
        self._expert = expert
        self._tell = tell
        self._outbox = config.data_dir / "outbox"
        self._outbox.mkdir(parents=True, exist_ok=True)
        self.egress = EgressLog(config.data_dir, config.name)

    def do(self, entry: Entry, client: Client, should_stop: Callable[[], bool]) -> Report:
        """Make the contribution unless it is made, ship it, and report.

        Raises: Stopped, when should_stop said so; the work goes on at the next call.
            PolicyRefusalError, AwaitingApprovalError, ManifestError, RemoteError, CorpusError,
            OSError.
        """
        assignment = entry.assignment
        self._tell("round", {"round": assignment.round_id, "status": "working"})
        if self._config.policy.exists():  # the guard reads it anew each time, and may find none
            self.egress.policy(sha256_of(self._config.policy))
        released = self._guard.release(
            entry,
            lambda: self._prepare(assignment, client),
            lambda asked: self._make(assignment, asked, should_stop),
        )
        self._ship(assignment, client, released)
        expert = self._asked(assignment)
        scores = self._scores(assignment, client, expert) if released.scores else Scores()
        return self.report(
            assignment,
            "committed",
            sha256=released.made.sha256,
            size_bytes=released.made.size_bytes,
            scores=scores,
            **describe(expert),
        )

    def report(self, assignment: Assignment, status: Status, **fields: Any) -> Report:
        """What the coordinator is told."""
        return Report(
            round_id=assignment.round_id,
            attempt=assignment.attempt,
            status=status,
            **fields,
        )

    def refuse(self, assignment: Assignment, error: PolicyRefusalError) -> Report:
        """Write down that nothing leaves, and return what the coordinator is told."""
        _LOG.warning("%s: %s%s", assignment.round_id, error, error.here and f" ({error.here})")
        return self._refused(assignment, str(error))

    def disbelieve(self, assignment: Assignment, error: ManifestError) -> Report:
        """The same of a pivot not to be believed; the coordinator hears no paths of ours."""
        _LOG.critical("%s: the pivot is refused: %s", assignment.round_id, error)
        words = "the round's pivot is not to be believed; its keeper finds why in the local log"
        return self._refused(assignment, words)

    def _refused(self, assignment: Assignment, why: str) -> Report:
        self.egress.refuse(round_id=assignment.round_id, what=assignment.spec.kind, why=why)
        return self.report(assignment, "refused", detail=why)

    def wait(self, assignment: Assignment) -> Report:
        """Return what the coordinator is told while a release waits for a person."""
        self._tell("round", {"round": assignment.round_id, "status": "waiting"})
        return self.report(assignment, "waiting", detail="it waits for approval here")

    def failure(self, assignment: Assignment, error: Exception) -> Report:
        """Log what went wrong, and return what the coordinator is told."""
        _LOG.error("assignment %s failed", assignment.round_id, exc_info=error)
        words = f"{type(error).__name__}: {error}"
        if isinstance(error, CorpusError):
            words = "the corpus cannot be read; its keeper finds the line in the local log"
        return self.report(assignment, "failed", detail=words[:2000])

    def record(
        self,
        assignment: Assignment,
        what: str,
        size_bytes: int,
        sha256: str = "",
        *,
        rule: str = "a report is always sent",
        approver: str = "policy",
    ) -> None:
        """Write down what leaves, before it leaves, and who let it."""
        self.egress.append(
            round_id=assignment.round_id,
            what=what,
            size_bytes=size_bytes,
            sha256=sha256,
            rule=rule,
            approver=approver,
        )
        self._tell("egress", {"round": assignment.round_id, "bytes": self.egress.total_bytes()})

    def _prepare(self, assignment: Assignment, client: Client) -> Asked:
        """Bring the public files that the assignment names."""
        files, spec = self._files(assignment), assignment.spec
        if spec.trains_locally or spec.ship_share < 1:
            fetch_pivot(self._config, assignment, client, files / "pivot")
        texts: list[str] = []
        if assignment.prompts is not None:
            texts = read_prompts(client.fetch(assignment.prompts, files))
        reader = files / "pivot" if spec.trains_locally else self._expert.directory
        question = question_of(assignment, reader, texts)
        return Asked(question=question, texts=texts, pivot=files / "pivot")

    def _make(self, assignment: Assignment, asked: Asked, should_stop: Callable[[], bool]) -> Draft:
        """Compute the contribution; nothing of it has left, or will but through the guard."""
        spec, pivot = assignment.spec, self._files(assignment) / "pivot"
        prompts = None
        if assignment.prompts is not None:
            prompts = self._files(assignment) / assignment.prompts.name
        training = LocalTraining(
            corpus=self._config.corpus,
            prompts=prompts if spec.rehearse else None,
            on_progress=lambda p: self._tell("adapt", progress_body(p)),
            should_stop=should_stop,
            canaries=self._config.canary_file,
        )
        expert = self._asked(assignment)
        if spec.kind == "weights":
            delta = _or_stopped(export_delta(pivot, training, assignment, self._outbox))
            return Draft(path=delta, model=pivot)
        if spec.grow is not None:
            _or_stopped(grow_expert(pivot, training, assignment, self._outbox))
        assert prompts is not None

        def tell(done: int, total: int) -> None:
            if should_stop():
                raise Stopped
            self._tell("logits", {"round": assignment.round_id, "step": done, "steps": total})

        beside = pivot if spec.ship_share < 1 else None
        path = export_logits(expert, prompts, assignment, self._outbox, tell, pivot=beside)
        return Draft(path=path, model=expert)

    def _files(self, assignment: Assignment) -> Path:
        """Where the round's public files lie."""
        return self._config.data_dir / "rounds" / assignment.round_id

    def _asked(self, assignment: Assignment) -> Path:
        """The folder of the expert that the contribution and the report tell of."""
        grows = assignment.spec.grow is not None
        return grown_folder(assignment, self._outbox) if grows else self._expert.directory

    def _ship(self, assignment: Assignment, client: Client, released: Released) -> None:
        """Send what the guard let out: written down first, then sent, then receipted."""
        path, sha256 = released.path, released.made.sha256
        leaving = client.missing_bytes(path, sha256)
        self._tell("ship", {"round": assignment.round_id, "size_bytes": leaving})
        self.record(
            assignment,
            assignment.spec.kind,
            leaving,
            sha256,
            rule=released.rule,
            approver=released.approver,
        )
        client.put(path, sha256)
        receipt = client.commit(assignment.round_id, sha256, path.stat().st_size)
        keep_receipt(self._config, receipt)
        self.egress.delivered(
            round_id=receipt.round_id,
            sha256=receipt.sha256,
            size_bytes=receipt.size_bytes,
            receipt_unix_ms=receipt.committed_unix_ms,
        )
        self._guard.ledger.receipt(assignment.round_id, sha256)

    def _scores(self, assignment: Assignment, client: Client, expert: Path) -> Scores:
        if assignment.evals is None:
            return Scores()
        evals = client.fetch(assignment.evals, self._files(assignment))
        sets = read_evals(evals).domains.values()
        texts = [text for one in sets for text in one.documents]
        texts += [" ".join([q.prompt, *q.options]) for one in sets for q in one.questions]
        if not self._guard.lets_score(assignment.round_id, texts):
            return Scores()
        self._tell("score", {"round": assignment.round_id})
        return score(expert, evals, self._outbox)


def _or_stopped(made: Path | None) -> Path:
    """Return what training made. Raises: Stopped when it was stopped before the end."""
    if made is None:
        raise Stopped
    return made


def progress_body(progress: Progress) -> dict[str, Any]:
    """Progress of a training as the daemon tells it."""
    return {
        "step": progress.step,
        "steps": progress.steps,
        "loss": progress.loss,
        "tokens_per_s": progress.tokens_per_s,
    }
