"""Keeps the Deliver duties: each attempt of each assignment is given to the engine once.

One engine delivery, in a thread of its own, for all assignments of a round that are new at the
same time. Nothing here is durable: after a restart every open assignment has a new attempt.
"""

import contextlib
import logging
import threading
from collections.abc import Iterable
from dataclasses import dataclass, field

from coordinator.artifacts import Artifacts
from coordinator.clock import now_unix_ms
from coordinator.engine import Engine, EngineError, Reply
from coordinator.happenings import Decided, Event, Happening, Lost, Reported
from coordinator.presence import Presence
from coordinator.round_state import Deliver
from coordinator.rounds import IllegalTransitionError
from coordinator.store import RoundRow, Store
from protos.messages import Assignment, FileRef, Report
from protos.spec import RoundSpec

_LOG = logging.getLogger(__name__)


@dataclass(eq=False, slots=True)
class _Batch:
    """Assignments of one round that went out together."""

    round_id: str
    attempts: dict[str, int]
    """By participant; who has answered is taken out."""
    stop: threading.Event = field(default_factory=threading.Event)


class Deliveries:
    """Starts and ends deliveries, so that what goes on is what is wanted. One thread calls it."""

    def __init__(
        self, store: Store, artifacts: Artifacts, engine: Engine, presence: Presence
    ) -> None:
        self._store = store
        self._artifacts = artifacts
        self._engine = engine
        self._presence = presence
        self._begun: dict[Deliver, _Batch] = {}
        self._threads: list[threading.Thread] = []

    def keep(self, wanted: Iterable[Deliver]) -> None:
        """Begin what is wanted and new; end each delivery of which nothing is wanted any more."""
        wanted = set(wanted)
        before = set(self._begun.values())
        self._begun = {duty: batch for duty, batch in self._begun.items() if duty in wanted}
        for batch in before - set(self._begun.values()):
            batch.stop.set()
        self._threads = [thread for thread in self._threads if thread.is_alive()]
        new = sorted(wanted - self._begun.keys(), key=lambda duty: duty.participant)
        for round_id in sorted({duty.round_id for duty in new}):
            self._begin(round_id, [duty for duty in new if duty.round_id == round_id])

    def stop(self) -> None:
        """End all deliveries."""
        self.keep(())
        for thread in self._threads:
            thread.join(timeout=10)

    def _begin(self, round_id: str, duties: list[Deliver]) -> None:
        batch = _Batch(round_id, {duty.participant: duty.attempt for duty in duties})
        self._begun |= dict.fromkeys(duties, batch)
        thread = threading.Thread(
            target=self._deliver, args=(batch,), name=f"deliver-{round_id}", daemon=True
        )
        self._threads.append(thread)
        thread.start()

    def _deliver(self, batch: _Batch) -> None:
        try:
            self._give_to_engine(batch)
        except EngineError as error:
            for participant, attempt in dict(batch.attempts).items():
                self._tell(batch, Lost(participant, attempt, f"the engine gave up: {error}"))
        except Exception as error:  # noqa: BLE001 - the one catch-all: a round ends loudly
            _LOG.exception("%s cannot be delivered", batch.round_id)
            self._tell(batch, Decided(Event.FAIL, f"{type(error).__name__}: {error}"))

    def _give_to_engine(self, batch: _Batch) -> None:
        row = self._store.round(batch.round_id)
        known = self._store.participants()
        nodes = {known[name].node_id: name for name in batch.attempts}
        assignment = self._assignment(row)
        messages = {
            node: assignment.model_copy(update={"attempt": batch.attempts[name]}).model_dump_json()
            for node, name in nodes.items()
        }
        self._presence.ask(batch.round_id, list(nodes.values()))
        try:
            self._engine.deliver(
                messages,
                on_reply=lambda node, reply: self._take(batch, nodes[node], reply),
                idle_s=lambda node: self._presence.idle_s(nodes[node]),
                stop=batch.stop,
                deadline_s=max(0.0, (row.deadline_unix_ms - now_unix_ms()) / 1000),
            )
        finally:
            self._dismiss(batch)

    def _dismiss(self, batch: _Batch) -> None:
        """Want those who have not answered no longer, unless a newer attempt wants them."""
        newer = {
            duty.participant
            for duty, other in list(self._begun.items())
            if duty.round_id == batch.round_id and other is not batch
        }
        for participant in set(batch.attempts) - newer:
            self._presence.answered(batch.round_id, participant)

    def _assignment(self, row: RoundRow) -> Assignment:
        spec = RoundSpec.model_validate_json(row.spec_json)
        files = self._store.pivot(spec.pivot).files
        return Assignment(
            round_id=row.round_id,
            attempt=1,
            submitted_by=row.submitted_by,
            spec=spec,
            prompts=self._reference("prompts.jsonl", spec.prompts),
            pairs=self._reference("pairs.jsonl", spec.pairs),
            evals=self._reference("evals.json", spec.evals),
            pivot=files,
            pivot_sha256=next(f.sha256 for f in files if f.name == "model.safetensors"),
            deadline_unix_ms=row.deadline_unix_ms,
            order=row.order_json,
        )

    def _reference(self, name: str, pinned: str | None) -> FileRef | None:
        if pinned is None:
            return None
        sha256 = pinned.removeprefix("sha256:")
        size = self._artifacts.path(sha256).stat().st_size
        return FileRef(name=name, sha256=sha256, size_bytes=size)

    def _take(self, batch: _Batch, participant: str, reply: Reply) -> None:
        attempt = batch.attempts.pop(participant)
        self._presence.answered(batch.round_id, participant)
        if reply.error is not None:
            self._tell(batch, Lost(participant, attempt, reply.error))
            return
        try:
            report = Report.model_validate_json(reply.payload or "")
        except ValueError as error:
            unreadable = f"unreadable report: {error}"
            self._tell(batch, Reported(participant, attempt, "failed", unreadable, ""))
            return
        body = report.model_dump_json()
        self._tell(batch, Reported(participant, attempt, report.status, report.detail, body))

    def _tell(self, batch: _Batch, happening: Happening) -> None:
        with contextlib.suppress(IllegalTransitionError):  # it has ended meanwhile
            self._store.step(batch.round_id, happening)
