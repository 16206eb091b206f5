"""Tells open pages that something has changed, by server-sent events; the page asks what."""

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator
from typing import Annotated, Final

from fastapi import APIRouter, Depends, Request
from fastapi.responses import StreamingResponse
from sqlalchemy import func, select

from coordinator.console.desk import SignedOutError, Visit, may, signed_in
from coordinator.store import Store
from coordinator.tables import AUDIT, EVENTS
from protos.errors import CofuseError

MAX_STREAMS: Final = 500
WAKE_S: Final = 1.0
"""Pages hear of a change within this, and not more often."""
COMMENT_S: Final = 15.0
"""A silent stream says something this often: proxies close those that do not."""
Allowed = Annotated[Visit, Depends(may("/cofuse.v1.Research/ListRounds"))]


class News:
    """Watches the store in one thread, for every open page."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._version = ""
        self._changed = asyncio.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="news", daemon=True)
        self._open = 0
        self.router = APIRouter()
        self.router.get("/news")(self.stream)

    def start(self) -> None:
        """Begin to watch."""
        self._thread.start()

    def stop(self) -> None:
        """End every stream."""
        self._stop.set()
        with self._store.changed:
            self._store.changed.notify_all()
        self._thread.join()
        self._wake()

    async def stream(self, request: Request, visit: Allowed) -> StreamingResponse:
        """The stream of one page; its session is looked at again with each news."""
        if self._open >= MAX_STREAMS:
            raise CofuseError("too_many_calls", f"found more than {MAX_STREAMS} open pages")
        self._loop = asyncio.get_running_loop()
        headers = {"x-accel-buffering": "no"}
        return StreamingResponse(
            self._lines(request), media_type="text/event-stream", headers=headers
        )

    async def _lines(self, request: Request) -> AsyncIterator[str]:
        self._open += 1
        told = request.headers.get("last-event-id", self._version)
        try:
            yield "retry: 2000\n\n"
            while not self._stop.is_set():
                changed = self._changed
                if self._version != told:
                    signed_in(request)
                    told = self._version
                    yield f"id: {told}\nevent: news\ndata: {told}\n\n"
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(changed.wait(), COMMENT_S)
                    continue
                yield ": still here\n\n"
        except (SignedOutError, CofuseError):
            return
        finally:
            self._open -= 1

    def _watch(self) -> None:
        while not self._stop.is_set():
            with self._store.changed:
                self._store.changed.wait(WAKE_S)
            with contextlib.suppress(CofuseError):
                version = version_of(self._store)
                if version != self._version:
                    self._version = version
                    self._wake()
            self._stop.wait(WAKE_S)

    def _wake(self) -> None:
        if self._loop is not None:
            with contextlib.suppress(RuntimeError):  # the loop has ended
                self._loop.call_soon_threadsafe(self._swap)

    def _swap(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()


def version_of(store: Store) -> str:
    """What changes with every event of a round and every record of the audit chain."""
    with store.database.read() as db:
        event = db.scalar(select(func.max(EVENTS.c.seq))) or 0
        record = db.scalar(select(func.max(AUDIT.c.seq))) or 0
    return f"{event}-{record}"
