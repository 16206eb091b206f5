"""One round's work: ask the policy, compute from the expert, let it out, say what was done."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from fp8.train import Progress
from participant.client import Client, Stopped
from participant.config import ParticipantConfig
from participant.egress import EgressLog
from participant.export import (
    LocalTraining,
    export_delta,
    export_logits,
    grow_expert,
    grown_folder,
    score,
)
from participant.pivots import fetch_pivot
from participant.policy import Policy, check_positions
from participant.spool import Entry, Spool
from participant.stages.cpt import Expert, describe
from protos.chunks import sha256_of
from protos.messages import Assignment, Report, Scores

Status = Literal["committed", "refused", "failed"]
Tell = Callable[[str, dict[str, Any]], None]


class Worker:
    """Does what an assignment asks. Every step may be repeated after a crash."""

    def __init__(
        self, config: ParticipantConfig, policy: Policy, expert: Expert, spool: Spool, tell: Tell
    ) -> None:
        self._config = config
        self._policy = policy
        self._expert = expert
        self._spool = spool
        self._tell = tell
        self._outbox = config.data_dir / "outbox"
        self._outbox.mkdir(parents=True, exist_ok=True)
        self.egress = EgressLog(config.data_dir, config.name)

    def do(self, entry: Entry, client: Client, should_stop: Callable[[], bool]) -> Report:
        """Make the contribution unless it is made, ship it, and report.

        Raises: Stopped, when should_stop said so; the work goes on at the next call.
            PolicyRefusalError, ManifestError, RemoteError, CorpusError, OSError.
        """
        assignment = entry.assignment
        self._tell("round", {"round": assignment.round_id, "status": "working"})
        if (path := self._made_before(entry)) is None:
            path = self._make(assignment, client, should_stop)
            entry = self._spool.made(entry, path, sha256_of(path))
        if (made := entry.made) is None:
            raise Stopped  # other work came in under this round's name
        self._release(assignment, client, path, made.sha256)
        expert = self._asked(assignment)
        scores = self._scores(assignment, client, expert)
        return self.report(
            assignment,
            "committed",
            sha256=made.sha256,
            size_bytes=made.size_bytes,
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

    def refuse(self, assignment: Assignment, why: str) -> Report:
        """Write down that nothing leaves, and return what the coordinator is told."""
        kind = assignment.spec.kind
        self.egress.refuse(round_id=assignment.round_id, what=kind, why=why)
        return self.report(assignment, "refused", detail=why)

    def record(
        self,
        assignment: Assignment,
        what: str,
        size_bytes: int,
        sha256: str = "",
        rule: str = "a report is always sent",
    ) -> None:
        """Write down what leaves, before it leaves."""
        self.egress.append(
            round_id=assignment.round_id,
            what=what,
            size_bytes=size_bytes,
            sha256=sha256,
            rule=rule,
        )
        self._tell("egress", {"round": assignment.round_id, "bytes": self.egress.total_bytes()})

    def _made_before(self, entry: Entry) -> Path | None:
        """The contribution of an earlier try, if it is still what it was."""
        if entry.made is None:
            return None
        path = self._outbox / entry.made.file
        whole = path.exists() and sha256_of(path) == entry.made.sha256
        return path if whole else None

    def _make(
        self, assignment: Assignment, client: Client, should_stop: Callable[[], bool]
    ) -> Path:
        """Compute the contribution from the public files the assignment names."""
        files = self._config.data_dir / "rounds" / assignment.round_id
        spec, prompts = assignment.spec, None
        if spec.trains_locally or spec.ship_share < 1:
            fetch_pivot(self._config, assignment, client, files / "pivot")
        if assignment.prompts is not None:
            prompts = client.fetch(assignment.prompts, files)
        training = LocalTraining(
            corpus=self._config.corpus,
            prompts=prompts if spec.rehearse else None,
            on_progress=lambda p: self._tell("adapt", progress_body(p)),
            should_stop=should_stop,
        )
        if spec.kind == "weights":
            return _or_stopped(export_delta(files / "pivot", training, assignment, self._outbox))
        if spec.grow is not None:
            _or_stopped(grow_expert(files / "pivot", training, assignment, self._outbox))
        assert prompts is not None

        def tell(done: int, total: int) -> None:
            check_positions(self._policy, total)
            if should_stop():
                raise Stopped
            self._tell("logits", {"round": assignment.round_id, "step": done, "steps": total})

        pivot = files / "pivot" if spec.ship_share < 1 else None
        expert = self._asked(assignment)
        return export_logits(expert, prompts, assignment, self._outbox, tell, pivot=pivot)

    def _asked(self, assignment: Assignment) -> Path:
        """The folder of the expert that the contribution and the report tell of."""
        grows = assignment.spec.grow is not None
        return grown_folder(assignment, self._outbox) if grows else self._expert.directory

    def _release(self, assignment: Assignment, client: Client, path: Path, sha256: str) -> None:
        """The one door out for bulk bytes: written down first, then sent, then receipted."""
        leaving = client.missing_bytes(path, sha256)
        self._tell("ship", {"round": assignment.round_id, "size_bytes": leaving})
        kind = assignment.spec.kind
        self.record(assignment, kind, leaving, sha256, rule=f"policy.toml: ship_{kind}")
        client.put(path, sha256)
        receipt = client.commit(assignment.round_id, sha256, path.stat().st_size)
        self.egress.delivered(
            round_id=receipt.round_id,
            sha256=receipt.sha256,
            size_bytes=receipt.size_bytes,
            receipt_unix_ms=receipt.committed_unix_ms,
        )

    def _scores(self, assignment: Assignment, client: Client, expert: Path) -> Scores:
        if assignment.evals is None or not self._policy.ship_scores:
            return Scores()
        folder = self._config.data_dir / "rounds" / assignment.round_id
        evals = client.fetch(assignment.evals, folder)
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
