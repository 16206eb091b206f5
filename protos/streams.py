"""Streams are bounded by progress, never by a total: whatever advances may take its time."""

import queue
import threading
import time
from collections.abc import Callable, Iterator
from typing import Final, TypeVar

from protos.errors import CofuseError

IDLE_S: Final = 120.0
"""A stream on which nothing moves for this long is given up; its bytes so far are kept."""
_T = TypeVar("_T")


def stalled(idle_s: float) -> CofuseError:
    """The error of a stream on which nothing moved for `idle_s`."""
    return CofuseError("stalled", f"nothing moved for {idle_s:g} s")


def read_ahead(items: Iterator[_T], *, idle_s: float = IDLE_S, depth: int = 2) -> Iterator[_T]:
    """Yield `items`, of which the next `depth` are fetched by a thread while the caller works.

    Leaving early does not end `items`: end the call they come from, and the thread goes with it.
    Raises: CofuseError stalled when nothing comes for `idle_s`; what `items` raises.
    """
    box: queue.Queue[_T | BaseException] = queue.Queue(depth)
    left = threading.Event()
    threading.Thread(target=_fetch, args=(items, box, left), name="read-ahead", daemon=True).start()
    try:
        while True:
            try:
                item = box.get(timeout=idle_s)
            except queue.Empty:
                raise stalled(idle_s) from None
            if isinstance(item, StopIteration):
                return
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        left.set()
        while not box.empty():  # a thread that waits to put finds room, and sees that we left
            box.get_nowait()


def _fetch(
    items: Iterator[_T], box: "queue.Queue[_T | BaseException]", left: threading.Event
) -> None:
    try:
        while not left.is_set():
            box.put(next(items))
    except BaseException as error:  # noqa: BLE001 - it is raised again where it is awaited
        box.put(error)


class Progress:
    """When something last moved, for whoever has to decide that nothing does."""

    def __init__(self, idle_s: float = IDLE_S) -> None:
        self.idle_s = idle_s
        self._moved = threading.Condition()
        self._last_s = time.monotonic()
        self._ended = False

    def moved(self) -> None:
        """Something moved now."""
        self._last_s = time.monotonic()

    def left_s(self) -> float:
        """Seconds until it counts as stalled; 0 or less: it does."""
        return self._last_s + self.idle_s - time.monotonic()

    def end(self) -> None:
        """Stop watching."""
        with self._moved:
            self._ended = True
            self._moved.notify_all()

    def watch(self, on_stall: Callable[[], object]) -> None:
        """Call `on_stall` from a thread of its own once nothing moved for idle_s before end()."""

        def wait() -> None:
            with self._moved:
                while not self._ended and (left := self.left_s()) > 0:
                    self._moved.wait(left)
                if self._ended:
                    return
            on_stall()

        threading.Thread(target=wait, name="stall-watch", daemon=True).start()
