"""One round's work: have computed what the guard lets out, have it shipped, say what was done."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from fusion.pair_file import PreferencePair, read_pairs
from participant.config import ParticipantConfig
from participant.corpus import CorpusError
from participant.counterparts import Errands, TrainerLine
from participant.egress import EgressLog
from participant.guard import Guard, Released
from participant.line import FailedThereError
from participant.pivots import fetch_pivot
from participant.policy import PolicyRefusalError
from participant.receipts import keep as keep_receipt
from participant.sealing import Asked, Draft, question_of
from participant.spool import Entry
from protos.chunks import sha256_of
from protos.messages import Assignment, Report
from protos.public_sets import read_evals, read_prompts
from trust.pivot_manifest import ManifestError

_LOG = logging.getLogger(__name__)
Status = Literal["committed", "refused", "failed", "waiting"]
Tell = Callable[[str, dict[str, Any]], None]


class Worker:
    """Does what an assignment asks. Every step may be repeated after a crash."""

    def __init__(
        self, config: ParticipantConfig, guard: Guard, trainer: TrainerLine, tell: Tell
    ) -> None:
        self._config = config
        self._guard = guard
        self._trainer = trainer
        self._tell = tell
        self.egress = EgressLog(config.data_dir, config.name)

    def do(self, entry: Entry, client: Errands, should_stop: Callable[[], bool]) -> Report:
        """Have the contribution made unless it is, ship it, and report.

        Raises: Stopped, when should_stop said so, and PeerLostError; the work goes on at the next
            call. PolicyRefusalError, AwaitingApprovalError, ManifestError, RemoteError,
            CorpusError, FailedThereError, OSError.
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
        scores = released.scores and self._may_score(assignment, client)
        model = self._trainer.tell(assignment, score=scores, should_stop=should_stop)
        return self.report(
            assignment,
            "committed",
            sha256=released.made.sha256,
            size_bytes=released.made.size_bytes,
            scores=model.scores,
            **model.facts,
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
        there = isinstance(error, FailedThereError)
        words = str(error) if there else f"{type(error).__name__}: {error}"
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
        gates: str = "",
    ) -> None:
        """Write down what leaves, before it leaves, who let it, and what the gate measured."""
        self.egress.append(
            round_id=assignment.round_id,
            what=what,
            size_bytes=size_bytes,
            sha256=sha256,
            rule=rule,
            approver=approver,
            gates=gates,
        )
        self._tell("egress", {"round": assignment.round_id, "bytes": self.egress.total_bytes()})

    def _prepare(self, assignment: Assignment, client: Errands) -> Asked:
        """Bring the public files that the assignment names."""
        files, spec = self._files(assignment), assignment.spec
        if spec.trains_locally or spec.ship_share < 1:
            fetch_pivot(self._config, assignment, client, files / "pivot")
        texts, pairs = list[str](), list[PreferencePair]()
        if (asked := assignment.public_set) is not None and spec.kind == "pairs":
            found = read_pairs(client.fetch(asked, files))
            texts, pairs = found.texts(), found.pairs
        elif asked is not None:
            texts = read_prompts(client.fetch(asked, files))
        reader = files / "pivot" if spec.trains_locally else self._trainer.expert
        question = question_of(assignment, reader, texts, pairs)
        return Asked(question=question, texts=texts, pairs=pairs, pivot=files / "pivot")

    def _make(self, assignment: Assignment, asked: Asked, should_stop: Callable[[], bool]) -> Draft:
        """Have the contribution computed; nothing leaves but through the guard."""
        draft = self._trainer.make(assignment, should_stop)
        if assignment.spec.kind == "weights":
            return Draft(path=draft, model=self._files(assignment) / "pivot")
        return Draft(path=draft, model=self._trainer.asked(assignment))

    def _files(self, assignment: Assignment) -> Path:
        """Where the round's public files lie."""
        return self._config.data_dir / "rounds" / assignment.round_id

    def _ship(self, assignment: Assignment, client: Errands, released: Released) -> None:
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
            gates=released.made.gates,
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

    def _may_score(self, assignment: Assignment, client: Errands) -> bool:
        """Bring the evaluation set; return whether scores on it may be told."""
        if assignment.evals is None:
            return False
        evals = client.fetch(assignment.evals, self._files(assignment))
        sets = read_evals(evals).domains.values()
        texts = [text for one in sets for text in one.documents]
        texts += [" ".join([q.prompt, *q.options]) for one in sets for q in one.questions]
        if not self._guard.lets_score(assignment.round_id, texts):
            return False
        self._tell("score", {"round": assignment.round_id})
        return True
