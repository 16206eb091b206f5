"""What the demo says while it works: bars on a terminal, plain lines elsewhere. On stderr."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock
from typing import Final, Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

_EVERY_S: Final = 10.0


class Screen(Protocol):
    """One line for each thing said, one bar for each task."""

    def say(self, text: str) -> None:
        """Say one line that stays."""

    def show(self, task: str, done: float, total: float, note: str = "") -> None:
        """Say how far a task is."""


class PlainScreen:
    """Lines for logs and pipes: at most one a task in ten seconds, and its first and last."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._lock = Lock()
        self._last: dict[str, float] = {}
        self._start = time.monotonic()

    def say(self, text: str) -> None:
        """Print with the seconds since the start."""
        with self._lock:
            self._console.print(
                f"[{time.monotonic() - self._start:5.0f}s] {text}", markup=False, highlight=False
            )

    def show(self, task: str, done: float, total: float, note: str = "") -> None:
        """Print when there is news worth a line."""
        now = time.monotonic()
        finished = done >= total
        if not finished and now - self._last.get(task, -_EVERY_S) < _EVERY_S:
            return
        if self._last.get(task) == float("inf"):
            return
        self._last[task] = float("inf") if finished else now
        self.say(f"{task}  {done:.0f}/{total:.0f}  {note}".rstrip())


class BarScreen:
    """Bars that stay when they are full."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._lock = Lock()
        self._tasks: dict[str, TaskID] = {}

    def say(self, text: str) -> None:
        """Print above the bars."""
        self._progress.console.print(text, markup=False, highlight=False)

    def show(self, task: str, done: float, total: float, note: str = "") -> None:
        """Move a bar, making it first when it is new."""
        with self._lock:
            if task not in self._tasks:
                self._tasks[task] = self._progress.add_task(task, total=total, note=note)
        self._progress.update(self._tasks[task], completed=done, total=total, note=note)


@contextmanager
def screen(*, quiet: bool = False) -> Iterator[Screen]:
    """The screen that fits stderr. Args: quiet: it shows nothing."""
    console = Console(stderr=True, quiet=quiet)
    if not console.is_terminal:
        yield PlainScreen(Console(stderr=True, quiet=quiet, width=160, soft_wrap=True))
        return
    columns = (
        TextColumn("{task.description:<34}", markup=False),
        BarColumn(bar_width=28),
        TextColumn("{task.completed:>5.0f}/{task.total:<5.0f}"),
        TimeElapsedColumn(),
        TextColumn("{task.fields[note]}", markup=False),
    )
    with Progress(*columns, console=console, refresh_per_second=5) as progress:
        yield BarScreen(progress)
