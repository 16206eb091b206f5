"""Streams are bounded by progress, never by a total: whatever advances may take its time."""

import queue
import threading
from collections.abc import Iterator
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
