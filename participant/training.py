"""Continual training on the institution's own schedule: what is due, and until when."""

import json
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import torch

from fp8.train import Progress, TrainResult
from participant.config import ParticipantConfig
from participant.durable import write_durably
from participant.stages.chain import develop, name_of
from participant.stages.cpt import Expert
from participant.stages.stage_gate import gate_of


class Training:
    """Decides when the expert trains, and how far."""

    def __init__(
        self,
        config: ParticipantConfig,
        expert: Expert,
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self._config = config
        self._schedule = config.schedule
        self._expert = expert
        self._clock = clock
        self._session = config.data_dir / "expert" / "session.json"
        self._session.parent.mkdir(parents=True, exist_ok=True)
        _move_in(config.data_dir / self._session.name, self._session)
        if torch.cuda.is_available():
            for device in range(torch.cuda.device_count()):
                torch.cuda.set_per_process_memory_fraction(self._schedule.gpu_memory_share, device)

    def due(self) -> bool:
        """Whether there is something to train now."""
        opened = self._schedule.window(self._clock())
        if opened is None:
            return False
        facts = self._expert.facts()
        return (
            facts.steps < self._target_steps(opened) or name_of(self._config.stage) != facts.stages
        )

    def run(
        self, *, on_progress: Callable[[Progress], None], should_stop: Callable[[], bool]
    ) -> TrainResult:
        """Train until the target, the end of the window, or should_stop; a checkpoint is kept."""
        opened = self._schedule.window(self._clock())
        assert opened is not None
        steps = self._target_steps(opened)
        torch.set_num_threads(self._schedule.threads or self._config.threads)
        try:
            return develop(
                self._expert,
                self._config.training.model_copy(update={"steps": steps}),
                self._config.stage,
                on_progress=on_progress,
                should_stop=lambda: self._schedule.window(self._clock()) is None or should_stop(),
                gate=gate_of(self._config.policy, self._config.canary_file),
            )
        finally:
            torch.set_num_threads(self._config.threads)

    def next_window(self) -> datetime | None:
        """When training may go on; None: it may now."""
        now = self._clock()
        return None if self._schedule.window(now) else self._schedule.next_window(now)

    def _target_steps(self, opened: datetime) -> int:
        """Steps in all by the end of this window: what was begun, else what the schedule adds."""
        first, more = self._config.training.steps, self._schedule.more_steps
        done = self._expert.facts().steps
        if done < first or not more:
            return first
        window = opened.isoformat()
        session = json.loads(_text(self._session) or "{}")
        if session.get("window") != window:
            # A session that the last window cut short goes on: its steps are not added twice.
            begun = int(session.get("steps", 0))
            session = {"window": window, "steps": begun if begun > done else done + more}
            write_durably(self._session, json.dumps(session))
        return int(session["steps"])


def _move_in(old: Path, new: Path) -> None:
    """Copy what an older release kept beside the folder, which is not ours to write in now."""
    if old.exists() and not new.exists():
        write_durably(new, old.read_text(encoding="utf-8"))


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.exists() else ""
