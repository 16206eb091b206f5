"""Questions that lie open: accepted on disk, each with the connection that waits for its answer."""

from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import Protocol

from participant.engine import Task, TaskLostError
from participant.spool import Entry, Spool
from protos.messages import Assignment, Report


class Tasks(Protocol):
    """Whoever brings tasks."""

    def next_task(self, timeout_s: float) -> Task | None:
        """The next one, or None when timeout_s has passed."""
        ...


class Desk:
    """Takes tasks from the engine into the spool, and answers them."""

    def __init__(
        self,
        engine: Tasks,
        spool: Spool,
        on_change: Callable[[], None],
        waits: Callable[[str], bool] = lambda _: False,
    ) -> None:
        """Args: on_change: called when the rounds in hand have changed.

        waits: whether nothing can be done for a round now, but to wait for somebody.
        """
        self._engine = engine
        self._spool = spool
        self._on_change = on_change
        self._waits = waits
        self._arrived: deque[Task] = deque()  # kept here when the disk has no room for them
        self._tasks: dict[str, Task] = {}

    @property
    def open(self) -> bool:
        """Whether there is anything to work on."""
        return self.next() is not None

    def take_in(self, timeout_s: float = 0.0) -> None:
        """Accept what the engine has brought: from here on it survives a power cut."""
        while (task := self._engine.next_task(timeout_s)) is not None:
            timeout_s = 0.0
            self._arrived.append(task)
        while self._arrived:
            task = self._arrived[0]
            try:
                entry = self._spool.accept(Assignment.model_validate_json(task.payload))
            except ValueError as error:
                self._arrived.popleft()
                _fail(task, f"unreadable assignment: {error}"[:2000])
                continue
            self._arrived.popleft()
            self._tasks[entry.round_id] = task
            self._on_change()

    def next(self) -> Entry | None:
        """Whoever waits for an answer first, then what a crash left."""
        asked = [self._spool.get(round_id) for round_id in self._tasks]
        rest = [one for one in self._spool.unfinished() if not self._waits(one.round_id)]
        return next((entry for entry in [*asked, *rest] if entry), None)

    def drop(self, round_id: str) -> None:
        """Forget a round for which nobody waits any more."""
        self._spool.drop(round_id)
        if (task := self._tasks.pop(round_id, None)) is not None:
            _fail(task, "the coordinator said that this round is over")
        self._on_change()

    def answer(self, entry: Entry, record: Callable[[int], None]) -> None:
        """Reply, if the question's connection still stands; else it will be asked again.

        Args: record: writes the reply, of so many bytes, down before it leaves.
        """
        self.take_in()
        if entry.report is not None:  # else other work came in under this round's name
            self.tell(entry.report, record)

    def tell(self, report: Report, record: Callable[[int], None]) -> None:
        """Reply, and so free the engine for other rounds; the work itself may go on.

        Args: record: as of answer.
        """
        entry, task = self._spool.get(report.round_id), self._tasks.get(report.round_id)
        if entry is not None and task is not None:
            attempt = {"attempt": entry.assignment.attempt}
            payload = report.model_copy(update=attempt).model_dump_json()
            record(len(payload.encode()))
            del self._tasks[entry.round_id]
            with suppress(TaskLostError):
                task.reply(payload)
        self._on_change()


def _fail(task: Task, words: str) -> None:
    with suppress(TaskLostError):
        task.fail(words)
