"""Keeps the Fuse duties: one worker at a time, and what it made is published with its round."""

import logging
import shutil
import threading
from collections.abc import Sequence
from errno import ENOSPC
from pathlib import Path
from typing import Any

from coordinator.artifacts import Artifacts
from coordinator.clock import now_unix_ms
from coordinator.fuse_job import OPENED, FuseJob, Fusion, JobFailedError, JobLostError
from coordinator.happenings import Broke, Fused, Worked
from coordinator.round_state import Fuse
from coordinator.rounds import FINAL, IllegalTransitionError, State
from coordinator.signing import Sign
from coordinator.standing import standings
from coordinator.store import PivotRow, Store
from protos.chunks import sha256_of
from protos.messages import FileRef
from protos.spec import PUBLIC_SETS, RoundSpec

_LOG = logging.getLogger(__name__)


class Fusions:
    """Starts and ends fusion workers, so that what goes on is what is wanted. One thread calls it.

    Jobs lie in folders of their own and each is a pure function of its inputs: whatever one
    worker has finished, the next one of the same round finds.
    """

    def __init__(
        self,
        root: Path,
        store: Store,
        artifacts: Artifacts,
        sign: Sign,
        *,
        workers: int,
        worker_folder: Path | None = None,
    ) -> None:
        """Args: sign: completes a new pivot's files with its manifest. worker_folder: of the key
        that opens contributions.
        """
        self._jobs = root / "jobs"
        self._store = store
        self._artifacts = artifacts
        self._sign = sign
        self._workers = workers
        self._worker_folder = worker_folder
        self._begun: set[Fuse] = set()
        self._fusion: Fusion | None = None
        self._thread: threading.Thread | None = None
        self._duty: Fuse | None = None

    def keep(self, wanted: Sequence[Fuse]) -> None:
        """End the worker when it is not wanted any more; begin the next when none is at work.

        Args: wanted: the oldest round's first. A round that has begun goes before it.
        """
        self._begun &= set(wanted)
        if self._thread is not None and self._thread.is_alive():
            if self._duty not in wanted and self._fusion is not None:
                self._fusion.stop()
            return
        new = [duty for duty in wanted if duty not in self._begun]
        if new:
            self._begin(min(new, key=lambda duty: not self._folder(duty.round_id).exists()))

    def stop(self) -> None:
        """End the worker; the next coordinator starts another."""
        self.keep(())
        if self._thread is not None:
            self._thread.join(timeout=10)

    def tidy(self) -> None:
        """Remove job folders that nobody needs: a failed round's stays, to be looked at.

        What a killed worker left in the clear is removed in any case.
        """
        for folder in self._jobs.glob("rnd-*"):
            state = self._store.round(folder.name).state
            if state in FINAL:
                shutil.rmtree(folder / OPENED, ignore_errors=True)
            if state in FINAL and state is not State.FAILED:
                shutil.rmtree(folder, ignore_errors=True)

    def _folder(self, round_id: str) -> Path:
        return self._jobs / round_id

    def _begin(self, duty: Fuse) -> None:
        self._begun.add(duty)
        self._duty, self._fusion = duty, None
        try:
            job = self._job(duty)
        except (OSError, ValueError) as error:
            _LOG.exception("%s has no job", duty.round_id)
            self._store.step(duty.round_id, Broke(duty.attempt, str(error), lost=False))
            return
        self._fusion = Fusion(job)
        self._thread = threading.Thread(
            target=self._run, args=(duty, job, self._fusion), name=f"fuse-{duty.round_id}"
        )
        self._thread.start()

    def _run(self, duty: Fuse, job: FuseJob, fusion: Fusion) -> None:
        try:
            self._store.step(duty.round_id, Worked(duty.attempt))
            made = fusion.run(
                on_event=lambda kind, body: self._hear(duty, kind, body),
                on_beat=lambda: self._hear(duty, "beat", {}),
            )
            if made:
                self._store.step(duty.round_id, Fused(duty.attempt))
                self._publish(duty, job)
        except IllegalTransitionError as error:
            _LOG.info("%s moved on meanwhile: %s", duty.round_id, error)  # cancelled, most likely
        except JobFailedError as error:
            self._break(duty, str(error), lost=isinstance(error, JobLostError))
        except OSError as error:
            self._break(duty, str(error), lost=error.errno == ENOSPC)
        except Exception as error:  # noqa: BLE001 - the one catch-all: a round ends loudly
            _LOG.exception("%s failed", duty.round_id)
            self._break(duty, f"{type(error).__name__}: {error}", lost=False)
        finally:
            shutil.rmtree(job.opened, ignore_errors=True)
            self.tidy()

    def _break(self, duty: Fuse, detail: str, *, lost: bool) -> None:
        _LOG.warning("%s: %s", duty.round_id, detail)
        self._store.step(duty.round_id, Broke(duty.attempt, detail, lost))

    def _hear(self, duty: Fuse, kind: str, body: dict[str, Any]) -> None:
        try:
            self._store.step(duty.round_id, Worked(duty.attempt))
            if kind == "fused":
                self._store.step(duty.round_id, Fused(duty.attempt))
            elif kind != "beat":
                self._store.note(duty.round_id, kind, body)
        except Exception:  # noqa: BLE001 - a word that cannot be kept costs a line, no fusion
            _LOG.exception("%s: a word of the fusion worker is lost", duty.round_id)

    def _job(self, duty: Fuse) -> FuseJob:
        row = self._store.round(duty.round_id)
        spec = RoundSpec.model_validate_json(row.spec_json)
        path = self._artifacts.path
        parts = [p for p in self._store.contributions(row.round_id) if p.status == "committed"]
        pinned = {name: getattr(spec, name) for name in PUBLIC_SETS}
        directory = self._folder(row.round_id)
        opened = {p.participant: directory / OPENED / f"{p.participant}.safetensors" for p in parts}
        public = {
            name: path(value.removeprefix("sha256:")) for name, value in pinned.items() if value
        }
        return FuseJob(
            directory=directory,
            round_id=row.round_id,
            pivot_name=row.pivot_name,
            spec=spec,
            pivot_files={f.name: path(f.sha256) for f in self._store.pivot(spec.pivot).files},
            contributions=opened,
            sealed={p.participant: path(p.sha256) for p in parts},
            worker_folder=self._worker_folder,
            reports={p.participant: p.report_json for p in parts},
            prompts=public.get("prompts"),
            evals=public.get("evals"),
            pairs=public.get("pairs"),
            workers=self._workers,
            standing=standings(list(opened), spec.pivot, {p.name: p for p in self._store.pivots()}),
        )

    def _publish(self, duty: Fuse, job: FuseJob) -> None:
        """Make the new pivot's files durable, then its row and the round's state at once."""
        files = []
        for path in sorted(job.result.iterdir()):
            reference = FileRef(
                name=path.name, sha256=sha256_of(path), size_bytes=path.stat().st_size
            )
            self._artifacts.add(path, reference.sha256)
            self._store.add_artifact(reference.sha256, "coordinator", "PIVOT", reference.size_bytes)
            files.append(reference)
            self._store.step(duty.round_id, Worked(duty.attempt))  # large files take their time
        row = PivotRow(
            name=job.pivot_name,
            parent=job.spec.pivot,
            round_id=duty.round_id,
            files=tuple(files),
            evals_json=(job.result / "evals.json").read_text(encoding="utf-8"),
            created_unix_ms=now_unix_ms(),
        )
        self._store.publish(
            duty.round_id,
            duty.attempt,
            parent=row.parent,
            files=self._sign(row),
            evals_json=row.evals_json,
        )
