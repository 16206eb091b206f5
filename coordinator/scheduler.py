"""The coordinator's own loop: ticks every active round, and executes what its duties say.

Safe to kill and start at any line: what is stored says what must go on (coordinator/rounds.py),
and every pass derives it anew. Deliveries and fusions do it, in threads and processes of theirs.
"""

import logging
import os
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from coordinator.artifacts import Artifacts
from coordinator.clock import jumped_ms, now_unix_ms
from coordinator.deliveries import Deliveries
from coordinator.engine import Engine
from coordinator.fusions import Fusions
from coordinator.happenings import Heard, Restarted, Tick
from coordinator.presence import Presence
from coordinator.recurring import Standing
from coordinator.round_state import Deliver, Fuse
from coordinator.rounds import duties
from coordinator.signing import Sign
from coordinator.store import Store

_LOG = logging.getLogger(__name__)
PASS_S: Final = 0.25
"""How late a pass may notice that a time has come; news wakes it at once."""
HEAR_S: Final = 10.0
"""How often the beats are looked at: far more often than an assignment's lease ends."""
TOLD_JUMP_S: Final = 60
"""A wall clock that moves further than this at once is told in the log."""


class Scheduler:
    """Drives rounds from their stored state to a final one."""

    def __init__(
        self,
        root: Path,
        store: Store,
        artifacts: Artifacts,
        engine: Engine,
        presence: Presence,
        sign: Sign,
        *,
        fuse_workers: int = 0,
        worker_folder: Path | None = None,
    ) -> None:
        self._store = store
        self._stop = threading.Event()
        self._told_jump_s = 0
        self._presence = presence
        self._hear_s = 0.0
        self._experts: dict[str, str] = {}
        """Versions that the store knows of already."""
        self._deliveries = Deliveries(store, artifacts, engine, presence)
        # One more than cores: of three runs on two cores, none waits for another to end.
        workers = fuse_workers or (os.cpu_count() or 1) + 1
        self._fusions = Fusions(
            root, store, artifacts, sign, workers=workers, worker_folder=worker_folder
        )

    def run(self) -> None:
        """Look after every active round until stop() is called."""
        restarted = False
        while not self._stop.is_set():
            begun = time.monotonic()
            try:
                if not restarted:
                    self._restart()
                    restarted = True
                self._pass()
            except Exception:  # noqa: BLE001 - a full disk must not end the loop: it passes
                _LOG.exception("a pass of the scheduler failed; the next one follows")
            took_s = time.monotonic() - begun
            with self._store.changed:
                self._store.changed.wait(PASS_S)
            # News comes in crowds, and one pass takes them all: passes are a tenth of the time.
            self._stop.wait(min(9 * took_s, 1.0))
        self._deliveries.stop()
        self._fusions.stop()

    def stop(self) -> None:
        """Ask the loop to end: run() then ends what goes on, and returns."""
        self._stop.set()
        with self._store.changed:
            self._store.changed.notify_all()

    def _restart(self) -> None:
        for row in self._store.rounds(active_only=True):
            self._store.step(row.round_id, Restarted())
        self._fusions.tidy()

    def _pass(self) -> None:
        jump_s = round(jumped_ms() / 1000)
        if abs(jump_s - self._told_jump_s) > TOLD_JUMP_S:
            self._told_jump_s = jump_s
            _LOG.warning(
                "the wall clock has moved by %d s since the start; deadlines have not moved with "
                "it: restart the coordinator if the wall clock is right now", jump_s
            )  # fmt: skip
        for recurring in self._store.recurring():
            if recurring.state is Standing.ACTIVE and recurring.due_unix_ms <= now_unix_ms():
                self._store.repeat(recurring.recurring_id)
        rounds = [
            self._store.step(row.round_id, Tick()) for row in self._store.rounds(active_only=True)
        ]
        wanted = [duty for round_ in rounds for duty in duties(round_)]
        self._deliveries.keep(duty for duty in wanted if isinstance(duty, Deliver))
        self._fusions.keep([duty for duty in wanted if isinstance(duty, Fuse)])
        if time.monotonic() >= self._hear_s:
            self._hear_s = time.monotonic() + HEAR_S
            self._hear([duty for duty in wanted if isinstance(duty, Deliver)])

    def _hear(self, wanted: Sequence[Deliver]) -> None:
        """Take from the beats who works on what, and whose expert is another one now."""
        seen = {name: beat for name, beat in self._presence.attending().items() if beat}
        for duty in wanted:
            beat = seen.get(duty.participant)
            if beat is not None and duty.round_id in beat.working:
                self._store.step(duty.round_id, Heard(duty.participant, duty.attempt))
        for name, beat in seen.items():
            version = f"{beat.expert_version}/{beat.expert_steps}"
            if beat.expert_version and self._experts.get(name) != version:
                self._store.note_expert(name, version)
                self._experts[name] = version
