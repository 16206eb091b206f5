"""The one door out: nothing is shipped that release() did not let through, in its order.

One rule of the policy, then the prompt set's checks, then the budget, all before any work is done;
then the work; then a file written anew from the values that were read of it; then, where the rule
says so, a person. Each step can only say no, and each is repeated safely after a crash.
"""

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime
from pathlib import Path

from participant import approvals, budget, canaries, canary_gate, orders
from participant.approvals import Approvals, Release
from participant.budget import Ledger
from participant.config import ParticipantConfig
from participant.policy import (
    Policy,
    PolicyRefusalError,
    PromptRules,
    Rule,
    kind_of,
    load_policy,
    match,
)
from participant.promises import unbudgeted
from participant.prompt_checks import corpus_fingerprints, overlapping, personal
from participant.sandbox import OWN
from participant.sealer import Sealer
from participant.sealing import PLAIN, Asked, Draft, seal
from participant.spool import Entry, Made, Spool
from protos.chunks import sha256_of
from protos.config import ConfigError
from protos.messages import Assignment
from trust.seal import SUFFIX

_LOG = logging.getLogger(__name__)


class AwaitingApprovalError(Exception):
    """A finished release waits for a person; the round's work goes on once there is a decision."""

    def __init__(self, release: Release) -> None:
        super().__init__(f"{release.release_id} waits for: cofuse approve {release.release_id}")
        self.release = release


@dataclass(frozen=True, slots=True, kw_only=True)
class Released:
    """A file that may leave, as it is."""

    path: Path
    made: Made
    rule: str
    """Which one allowed it: its place in policy.toml, and its purpose."""
    approver: str
    """Who let it out; "policy": nobody had to be asked."""
    scores: bool
    """Whether the expert's own scores may go with it."""


class Guard:
    """Holds the policy, the ledger, the approvals, and the folder of what may leave."""

    def __init__(
        self,
        config: ParticipantConfig,
        spool: Spool,
        clock: Callable[[], int] = lambda: time.time_ns() // 1_000_000,
    ) -> None:
        """Args: clock: unix ms."""
        self._config = config
        self._clock = clock
        self._spool = spool
        self._sealed = config.data_dir / "sealed"
        self._scratch = config.data_dir / OWN["guard"][-1]
        for folder in (self._sealed, self._scratch):
            folder.mkdir(parents=True, exist_ok=True)
            for left in folder.glob(f"*{PLAIN}"):  # of a process that was killed
                left.unlink(missing_ok=True)
        self.ledger = Ledger(config.data_dir / budget.FILE, clock)
        self.approvals = Approvals(config.data_dir / approvals.FOLDER, clock)
        self._waiting: dict[str, Release] = {}

    def release(
        self, entry: Entry, prepare: Callable[[], Asked], work: Callable[[Asked], Draft]
    ) -> Released:
        """Let one round's contribution out, or say why not.

        Args: prepare: brings the public files. work: computes; it is not called before the budget
            is reserved, and not again once its result is sealed.
        Raises: PolicyRefusalError, AwaitingApprovalError, ContributionError when the work made
            something else than was asked for, OSError; and what prepare and work raise.
        """
        assignment, policy = entry.assignment, self._policy()
        orders.believe(
            assignment, self._config.tls.ca, self._config.data_dir / orders.FOLDER, self._clock()
        )
        rule = match(policy, assignment, self._today())
        if (path := self._sealed_before(entry)) is None:
            sealer, asked = Sealer.of(self._config), prepare()
            self._check_prompts(assignment.round_id, policy.prompts, asked.texts)
            self._require_whole_budget()
            self.ledger.reserve(asked.question, policy.logits)
            path = self._sealed / f"{assignment.round_id}{SUFFIX}"
            rules = sha256_of(self._config.policy)  # before the work: it may be edited meanwhile
            draft = work(asked)

            measured: list[str] = []

            def inspect(plain: Path) -> None:
                measured.append(self._measure(policy, assignment, asked, draft, plain))

            seal(
                assignment,
                asked,
                draft,
                path,
                sealer,
                scratch=self._scratch,
                policy=rules,
                inspect=inspect,
            )
            entry = self._spool.made(entry, path, sha256_of(path), *measured)
        assert entry.made is not None
        label = f"allow {policy.allow.index(rule) + 1}: {rule.purpose}"
        approver = "policy"
        if rule.approval == "manual":
            approver = self._approver(entry.assignment, entry.made, rule, label)
        scores = "scores" in rule.kinds
        return Released(path=path, made=entry.made, rule=label, approver=approver, scores=scores)

    def lets_score(self, round_id: str, texts: Sequence[str]) -> bool:
        """Whether scores on an evaluation set may be told: its texts are the submitter's as well.

        Raises: CorpusError, OSError.
        """
        try:
            self._check_prompts(round_id, self._policy().prompts, texts)
        except PolicyRefusalError as error:
            _LOG.warning("%s: no scores leave: %s", round_id, error.here or error)
            return False
        return True

    def waits(self, round_id: str) -> bool:
        """Whether a round's release still waits for a person."""
        release = self._waiting.get(round_id)
        if release is None:
            return False
        return self.approvals.decision(release) is None and not self.approvals.expired(release)

    def waiting(self) -> list[str]:
        """Rounds whose releases wait for a person."""
        return [round_id for round_id in list(self._waiting) if self.waits(round_id)]

    def close(self, round_id: str) -> None:
        """Nobody waits for this round any more: ask no approver, and keep no sealed copy."""
        self._waiting.pop(round_id, None)
        self.approvals.close(round_id)
        (self._sealed / f"{round_id}{SUFFIX}").unlink(missing_ok=True)

    def _measure(
        self, policy: Policy, assignment: Assignment, asked: Asked, draft: Draft, plain: Path
    ) -> str:
        """Hold what would leave against the canary gate; return the figures, in words.

        Raises: PolicyRefusalError.
        """
        question = canary_gate.Question(
            kind=kind_of(assignment.spec),
            release=plain,
            model=draft.model,
            canaries=self._config.data_dir / canaries.FILE,
            texts=asked.texts,
        )
        found = canary_gate.check(policy.gates, question)
        return canary_gate.verdict(policy.gates, found).words

    def _require_whole_budget(self) -> None:
        """Raise PolicyRefusalError when the chain tells of releases that the budget has lost."""
        for lost in unbudgeted(self._config.data_dir):
            raise PolicyRefusalError("the budget cannot be believed", f"{lost.says}: {lost.do}")

    def _today(self) -> date:
        return datetime.fromtimestamp(self._clock() / 1000, UTC).date()

    def _policy(self) -> Policy:
        """The policy as it is on disk now: what was taken back holds at once."""
        try:
            return load_policy(self._config.policy)
        except ConfigError as error:
            raise PolicyRefusalError("it cannot be read", str(error)) from error

    def _sealed_before(self, entry: Entry) -> Path | None:
        """The release of an earlier try, if it is still what it was."""
        if entry.made is None:
            return None
        path = self._sealed / entry.made.file
        whole = path.exists() and sha256_of(path) == entry.made.sha256
        return path if whole else None

    def _check_prompts(self, round_id: str, rules: PromptRules, texts: Sequence[str]) -> None:
        """Raise PolicyRefusalError when the texts look private and the policy blocks such.

        The submitter hears that they did not pass, and not which, nor why: an answer on a text of
        the submitter's choice would tell whether it is in the corpus.
        """
        found: list[tuple[str, str]] = []
        if rules.overlap != "off" and texts:
            known = corpus_fingerprints(self._config.corpus, self._config.data_dir / "checks")
            if lines := overlapping(texts, known):
                found.append(
                    (rules.overlap, f"thirteen words in a row of the corpus: {lines[:20]}")
                )
        if rules.phi != "off":
            found += [
                (rules.phi, f"{name}: {lines[:20]}") for name, lines in personal(texts).items()
            ]
        words = "; ".join(what for _, what in found)
        if any(action == "block" for action, _ in found):
            raise PolicyRefusalError(
                "the prompt set did not pass this institution's prompt checks",
                f"{round_id}: texts that look private: {words}",
            )
        if found:
            _LOG.warning("%s: texts that look private: %s", round_id, words)

    def _approver(self, assignment: Assignment, made: Made, rule: Rule, label: str) -> str:
        """Return who approved it. Raises: AwaitingApprovalError, PolicyRefusalError."""
        spec, asked = assignment.spec, self.ledger.question(assignment.round_id)
        release = self.approvals.ask(
            Release(
                round_id=assignment.round_id,
                purpose=spec.purpose,
                submitted_by=assignment.submitted_by,
                kind=kind_of(spec),
                rule=label,
                top_k=spec.top_k if spec.kind == "logits" else 0,
                positions=asked.positions if asked else 0,
                size_bytes=made.size_bytes,
                sha256=made.sha256,
                gates=made.gates,
                scores=assignment.evals is not None and "scores" in rule.kinds,
                asked_unix_ms=self._clock(),
            )
        )
        self._waiting[assignment.round_id] = release
        decision = self.approvals.decision(release)
        if decision is not None and decision.approved:
            return decision.by
        if decision is not None:
            raise PolicyRefusalError(f"an approver said no: {decision.why or 'no reason given'}")
        if self.approvals.expired(release):
            raise PolicyRefusalError("nobody at the institution approved it within 72 hours")
        waits = AwaitingApprovalError(release)
        _LOG.warning("%s", waits)
        raise waits
