"""One call on the event loop, as a handler in a thread of its own sees it."""

import asyncio
import concurrent.futures
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager, suppress
from typing import Any, Final, NoReturn

import grpc

from protos.errors import CATALOGUE, ERROR_KEY, CofuseError
from protos.printable import printable
from trust.identity import Leaf

_CANCEL_POLL_S: Final = 1.0
_LEAVE_S: Final = 2.0
"""How long a handler that is cut may take to clean up."""
END: Final = object()
"""After the last message."""


async def refuse(context: Any, error: CofuseError) -> None:
    """End a call with an error of the catalogue. Raises: grpc's own, which ends the handler."""
    metadata = ((ERROR_KEY, error.error_id),)
    await context.abort(CATALOGUE[error.error_id].status, printable(str(error)), metadata)


class AbortedError(Exception):
    """A blocking handler has ended its call."""

    def __init__(self, code: grpc.StatusCode, details: str) -> None:
        self.code = code
        self.details = details
        super().__init__(details)


class CallerGoneError(Exception):
    """The caller went away while a blocking handler waited for it."""


class Call:
    """What a handler that blocks may ask of its call, from its thread."""

    def __init__(self, context: Any) -> None:
        self.loop = asyncio.get_running_loop()
        self.active = True
        # Asked for now: once the call is over, in the middle of a handler, grpc has freed it, and
        # asking then is a read of freed memory.
        self._auth_context = context.auth_context()
        self._peer = str(context.peer())
        self._metadata = context.invocation_metadata()
        self.trailing: tuple[tuple[str, str], ...] = ()
        self.leaf: Leaf | None = None
        """The caller's certificate, once it is admitted with one."""
        self._context = context
        self._task = asyncio.current_task()
        self._refusal: CofuseError | None = None
        self._told = False
        self._unread_since_s: float | None = None

    @contextmanager
    def unread(self) -> Iterator[None]:
        """Around the hand-over of an answer, which waits for a reader that does not read."""
        self._unread_since_s = self.loop.time()
        try:
            yield
        finally:
            self._unread_since_s = None

    def unread_s(self) -> float:
        """How long the answer at hand has been waiting for its reader; 0 when there is none."""
        since = self._unread_since_s
        return 0.0 if since is None else self.loop.time() - since

    async def cut(self, refusal: CofuseError) -> None:
        """End the call wherever it is; the caller hears why."""
        if self._refusal is not None or self._task is None:
            return
        self._refusal = refusal
        self._task.cancel()
        await asyncio.wait({self._task}, timeout=_LEAVE_S)
        if not self._told:
            # It was not the handler that waited, but grpc, for a reader that does not read. With
            # its task gone the call would stay open: say the end behind what is on its way.
            with suppress(grpc.aio.AbortError, grpc.aio.UsageError):
                await refuse(self._context, refusal)

    @contextmanager
    def cut_as_refusal(self) -> Iterator[None]:
        """A cut reaches the handler as its cancellation; from here on it is a refusal."""
        try:
            yield
        except asyncio.CancelledError:
            if self._refusal is None or self._task is None:
                raise
            self._task.uncancel()
            self._told = True
            raise self._refusal from None

    def auth_context(self) -> Any:
        """What TLS says of the caller."""
        return self._auth_context

    def peer(self) -> str:
        """Where the caller is."""
        return self._peer

    def invocation_metadata(self) -> Any:
        """The caller's metadata."""
        return self._metadata

    def is_active(self) -> bool:
        """Whether anybody still waits for the answer."""
        return self.active

    def set_trailing_metadata(self, trailing: tuple[tuple[str, str], ...]) -> None:
        """Send this after the answer or the refusal."""
        self.trailing = tuple(trailing)
        self._context.set_trailing_metadata(self.trailing)

    def abort(self, code: grpc.StatusCode, details: str) -> NoReturn:
        """End the call."""
        raise AbortedError(code, details)

    def blocking(self, messages: AsyncIterator[Any]) -> Iterator[Any]:
        """The caller's messages, for a thread that waits for each."""

        async def following() -> Any:
            return await anext(messages, END)

        while (one := self._wait(following())) is not END:
            yield one

    def _wait(self, coroutine: Any) -> Any:
        future = asyncio.run_coroutine_threadsafe(coroutine, self.loop)
        while True:
            try:
                return future.result(_CANCEL_POLL_S)
            except concurrent.futures.CancelledError:
                raise CallerGoneError("the caller cancelled") from None
            except TimeoutError:
                if not self.active:
                    future.cancel()
                    raise CallerGoneError("the caller went away") from None
