"""Drives each round from its stored state to a final one. Safe to kill and start at any line.

The state on disk says what is next; every step may be done twice. One thread per active round;
fusion jobs run one at a time.
"""

import logging
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from coordinator.artifacts import Artifacts
from coordinator.engine import Engine, EngineError, Reply
from coordinator.fuse_job import FuseJob, JobFailedError, run_job
from coordinator.presence import Presence
from coordinator.rounds import FINAL, Event, IllegalTransitionError, State, outcome
from coordinator.store import ContributionRow, RoundRow, Store, now_unix_ms
from protos.chunks import sha256_of
from protos.messages import Assignment, FileRef, Report
from protos.spec import RoundSpec

_LOG = logging.getLogger(__name__)
_TICK_S: Final = 0.25
_FUSING: Final = (State.FUSING, State.EVALUATING)
_PAUSE_S: Final = 0.5
"""Between two deliveries, so that a node that fails at once is not asked in a tight loop."""
REISSUE_S: Final = 600.0
"""An assignment without an answer goes out again after this: the engine can lose a message."""

REPORT_GRACE_S: Final = 120.0
"""How long reports may trail behind the last contribution before the round goes on without."""


class Scheduler:
    """The coordinator's own loop."""

    def __init__(
        self,
        root: Path,
        store: Store,
        artifacts: Artifacts,
        engine: Engine,
        presence: Presence,
        *,
        fuse_workers: int = 0,
    ) -> None:
        self._root = root
        # One more than cores: of three runs on two cores, none waits for another to end.
        self._fuse_workers = fuse_workers or (os.cpu_count() or 1) + 1
        self._store = store
        self._artifacts = artifacts
        self._engine = engine
        self._presence = presence
        self._stop = threading.Event()
        self._drivers: dict[str, threading.Thread] = {}

    def run(self) -> None:
        """Look after every active round until stop() is called."""
        while not self._stop.is_set():
            for row in self._store.rounds(active_only=True):
                driver = self._drivers.get(row.round_id)
                if driver is None or not driver.is_alive():
                    driver = threading.Thread(
                        target=self._drive, args=(row.round_id,), name=row.round_id, daemon=True
                    )
                    self._drivers[row.round_id] = driver
                    driver.start()
            with self._store.changed:
                self._store.changed.wait(_TICK_S)

    def stop(self) -> None:
        """Ask all drivers to stop and wait for them."""
        self._stop.set()
        for driver in self._drivers.values():
            driver.join(timeout=10)

    def _drive(self, round_id: str) -> None:
        steps: dict[State, Callable[[RoundRow], None]] = {
            State.SUBMITTED: self._expire_or_wait,
            State.APPROVED: self._issue,
            State.COLLECTING: self._collect,
            State.FUSING: self._fuse,
            State.EVALUATING: self._fuse,
        }
        while not self._stop.is_set():
            row = self._store.round(round_id)
            if row.state in FINAL:
                return
            try:
                steps[row.state](row)
            except IllegalTransitionError as error:
                _LOG.info("%s moved on meanwhile: %s", round_id, error)  # cancelled, most likely
            except Exception as error:  # noqa: BLE001 - the one catch-all: a round ends loudly
                _LOG.exception("%s failed", round_id)
                self._fail(round_id, f"{type(error).__name__}: {error}")

    def _fail(self, round_id: str, detail: str) -> None:
        try:
            self._store.advance(round_id, Event.FAIL, detail)
        except IllegalTransitionError:
            _LOG.warning("%s could not be failed in its state: %s", round_id, detail)
            self._stop.wait(_TICK_S)

    def _expire_or_wait(self, row: RoundRow) -> None:
        if now_unix_ms() >= row.deadline_unix_ms:
            self._store.advance(row.round_id, Event.DEADLINE_PASSED, "nobody approved it in time")
        self._stop.wait(_TICK_S)

    def _issue(self, row: RoundRow) -> None:
        if now_unix_ms() >= row.deadline_unix_ms:
            self._store.advance(row.round_id, Event.DEADLINE_PASSED, "the deadline has passed")
            return
        self._store.advance(row.round_id, Event.ISSUE)

    def _collect(self, row: RoundRow) -> None:
        """Send what is open, take answers until all are in or the deadline passes."""
        spec = RoundSpec.model_validate_json(row.spec_json)
        parts = self._store.assign(row.round_id, spec.participants)
        open_parts = [part for part in parts if part.status == "assigned"]
        if open_parts:
            self._deliver(row, spec, open_parts)
        parts = self._store.contributions(row.round_id)
        event = outcome(
            spec.needed,
            sum(part.status == "committed" for part in parts),
            sum(part.status == "assigned" for part in parts),
            deadline_passed=now_unix_ms() >= row.deadline_unix_ms,
        )
        if event is not None and not self._stop.is_set():
            missing = [f"{p.participant} {p.status}: {p.detail}" for p in parts if p.detail]
            late = [p.participant for p in parts if p.status == "assigned"]
            words = [*missing, *([f"no answer from {', '.join(late)}"] if late else [])]
            self._store.advance(row.round_id, event, "; ".join(words))

    def _deliver(self, row: RoundRow, spec: RoundSpec, parts: list[ContributionRow]) -> None:
        nodes = {name: p.node_id for name, p in self._store.participants().items()}
        names = {nodes[part.participant]: part.participant for part in parts}
        messages = {
            nodes[part.participant]: self._assignment(row, spec, part.attempt) for part in parts
        }
        settled = threading.Event()

        def on_reply(node_id: int, reply: Reply) -> None:
            self._take_report(row.round_id, names[node_id], reply)
            self._presence.answered(row.round_id, names[node_id])

        def watch() -> None:
            """End the delivery on cancel, on shutdown, or when only reports are missing."""
            waited_s = 0.0
            while not settled.is_set():
                state = self._store.round(row.round_id).state
                parts = self._store.contributions(row.round_id)
                waited_s += 0.0 if any(p.status == "assigned" for p in parts) else _TICK_S
                lost = waited_s > REPORT_GRACE_S
                if lost or self._stop.is_set() or state is not State.COLLECTING:
                    settled.set()
                with self._store.changed:
                    self._store.changed.wait(_TICK_S)

        watcher = threading.Thread(target=watch, daemon=True)
        watcher.start()
        self._presence.ask(row.round_id, list(names.values()))
        left_s = (row.deadline_unix_ms - now_unix_ms()) / 1000
        try:
            self._engine.deliver(
                messages,
                on_reply=on_reply,
                idle_s=lambda node_id: self._presence.idle_s(names[node_id]),
                stop=settled,
                deadline_s=max(0.0, min(left_s, REISSUE_S)),
            )
        except EngineError as error:
            self._store.note(row.round_id, "note", {"detail": f"{error}; a new attempt follows"})
        finally:
            settled.set()
            self._presence.dismiss(row.round_id)
            watcher.join()
        self._stop.wait(_PAUSE_S)

    def _assignment(self, row: RoundRow, spec: RoundSpec, attempt: int) -> str:
        files = self._store.pivot(spec.pivot).files
        return Assignment(
            round_id=row.round_id,
            attempt=attempt,
            submitted_by=row.submitted_by,
            spec=spec,
            prompts=self._reference("prompts.jsonl", spec.prompts),
            evals=self._reference("evals.json", spec.evals),
            pivot=files,
            pivot_sha256=next(f.sha256 for f in files if f.name == "model.safetensors"),
            deadline_unix_ms=row.deadline_unix_ms,
        ).model_dump_json()

    def _reference(self, name: str, pinned: str | None) -> FileRef | None:
        if pinned is None:
            return None
        sha256 = pinned.removeprefix("sha256:")
        size = self._artifacts.path(sha256).stat().st_size
        return FileRef(name=name, sha256=sha256, size_bytes=size)

    def _take_report(self, round_id: str, participant: str, reply: Reply) -> None:
        if reply.error is not None:
            _LOG.warning("%s: the engine lost %s: %s", round_id, participant, reply.error)
            self._store.note(
                round_id, "note", {"participant": participant, "detail": str(reply.error)}
            )
            return  # the assignment stays open and goes out again
        try:
            report = Report.model_validate_json(reply.payload or "")
        except ValueError as error:
            self._store.report(round_id, participant, "failed", f"unreadable report: {error}", "")
            return
        self._store.report(
            round_id, participant, report.status, report.detail, report.model_dump_json()
        )

    def _fuse(self, row: RoundRow) -> None:
        """Let the worker fuse and evaluate in a process of its own, then publish what it made.

        The worker skips what an earlier one has finished, so a restart costs little.
        """
        job = self._job(row)

        def tell(kind: str, body: dict[str, Any]) -> None:
            if kind == "fused" and self._store.round(row.round_id).state is State.FUSING:
                self._store.advance(row.round_id, Event.FUSED)
            else:
                self._store.note(row.round_id, kind, body)

        if not self._my_turn(row.round_id):
            with self._store.changed:
                self._store.changed.wait(_TICK_S)
            return
        try:
            run_job(job, on_event=tell, should_stop=lambda: self._interrupted(row.round_id))
        except JobFailedError as error:
            self._fail(row.round_id, str(error))
            return
        if not self._interrupted(row.round_id):
            self._publish(row, job)

    def _my_turn(self, round_id: str) -> bool:
        """Fusion jobs run one at a time: the one that has begun, else the oldest round's."""
        rows = [r for r in self._store.rounds(active_only=True) if r.state in _FUSING]
        begun = [r for r in rows if (self._root / "jobs" / r.round_id).exists()]
        return (begun or rows)[:1] == [r for r in rows if r.round_id == round_id]

    def _interrupted(self, round_id: str) -> bool:
        return self._stop.is_set() or self._store.round(round_id).state not in _FUSING

    def _job(self, row: RoundRow) -> FuseJob:
        spec = RoundSpec.model_validate_json(row.spec_json)
        path = self._artifacts.path
        parts = [p for p in self._store.contributions(row.round_id) if p.status == "committed"]
        pinned = {name: getattr(spec, name) for name in ("prompts", "evals")}
        public = {
            name: path(value.removeprefix("sha256:")) for name, value in pinned.items() if value
        }
        return FuseJob(
            directory=self._root / "jobs" / row.round_id,
            round_id=row.round_id,
            pivot_name=row.pivot_name,
            spec=spec,
            pivot_files={f.name: path(f.sha256) for f in self._store.pivot(spec.pivot).files},
            contributions={p.participant: path(p.sha256) for p in parts},
            reports={p.participant: p.report_json for p in parts},
            prompts=public.get("prompts"),
            evals=public.get("evals"),
            workers=self._fuse_workers,
        )

    def _publish(self, row: RoundRow, job: FuseJob) -> None:
        """Store the new pivot's files, then its row, then the state: the order of durability."""
        files = []
        for path in sorted(job.result.iterdir()):
            reference = FileRef(
                name=path.name, sha256=sha256_of(path), size_bytes=path.stat().st_size
            )
            self._artifacts.add(path, reference.sha256)
            self._store.add_artifact(reference.sha256, "coordinator", "PIVOT", reference.size_bytes)
            files.append(reference)
        self._store.add_pivot(
            name=row.pivot_name,
            parent=job.spec.pivot,
            round_id=row.round_id,
            files=files,
            evals_json=(job.result / "evals.json").read_text(encoding="utf-8"),
        )
        self._store.advance(row.round_id, Event.EVALUATED)
