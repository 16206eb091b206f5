"""The gRPC server: one event loop for every stream, threads for handlers that block.

A stream that waits (a thousand idle participants) costs no thread; a handler that reads the
database or the disk is an ordinary function and runs in a thread of its service. Every call
passes one door: who may not call is not read, and what goes wrong is an error of the catalogue.
"""

import asyncio
import concurrent.futures
import inspect
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Any, Final, NoReturn

import grpc
from google.protobuf.message import DecodeError

from coordinator.access import require_role
from coordinator.limits import Rates
from coordinator.observe import observing
from protos.bounds import check_bounds
from protos.errors import CATALOGUE, ERROR_KEY, CofuseError
from protos.logs import printable
from protos.tls import SERVER_OPTIONS, TlsFiles, server_credentials

THREADS: Final = 64
"""Per service, so that those who watch rounds never keep an upload waiting."""
CALLS_PER_S: Final = 50.0
"""What one caller may call in the long run; an upload is one call."""
BURST: Final = 500.0
START_TIMEOUT_S: Final = 30.0
_CANCEL_POLL_S: Final = 1.0
_END: Final = object()

Register = Callable[[grpc.aio.Server], None]


class GrpcServer:
    """Serves on a loop of its own, in a thread, until stopped."""

    def __init__(self, listen: str, tls: TlsFiles, services: Sequence[Register]) -> None:
        """Args: listen: host:port; port 0 picks a free one. services: each adds one servicer."""
        self._listen = listen
        self._tls = tls
        self._services = services
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="grpc", daemon=True)
        self._door = _Door()
        self._server: grpc.aio.Server | None = None

    def start(self) -> int:
        """Serve; return the port."""
        self._thread.start()
        return int(self._run(self._start()).result(START_TIMEOUT_S))

    def stop(self, grace_s: float = 1.0) -> None:
        """Take no more calls, give those that run grace_s to end, and end the loop."""
        if self._server is None:
            return
        self._run(self._stop(self._server, grace_s)).result(grace_s + START_TIMEOUT_S)
        self._door.close()
        self._server = None
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _start(self) -> int:
        self._server = grpc.aio.server(interceptors=[self._door], options=SERVER_OPTIONS)
        for register in self._services:
            register(self._server)
        port = self._server.add_secure_port(self._listen, server_credentials(self._tls))
        await self._server.start()
        return int(port)

    async def _stop(self, server: grpc.aio.Server, grace_s: float) -> None:
        await server.stop(grace_s)
        left = asyncio.all_tasks() - {asyncio.current_task()}
        for task in left:
            task.cancel()
        await asyncio.gather(*left, return_exceptions=True)
        await asyncio.get_running_loop().shutdown_asyncgens()

    def _run(self, coroutine: Any) -> "concurrent.futures.Future[Any]":
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)


class _Door(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]
    """Every call comes in here: role and rate first, then the parser, then the handler."""

    def __init__(self) -> None:
        self._pools: dict[str, ThreadPoolExecutor] = {}
        self._rates = Rates(CALLS_PER_S, BURST)

    async def intercept_service(self, continuation: Callable[..., Any], details: Any) -> Any:
        """Wrap the handler; unknown methods stay unknown."""
        handler = await continuation(details)
        if handler is None:
            return None
        service = details.method.rpartition("/")[0].rpartition(".")[2]
        if service not in self._pools:
            self._pools[service] = ThreadPoolExecutor(THREADS, thread_name_prefix=service)
        return self._wrapped(details.method, handler, self._pools[service])

    def _wrapped(self, method: str, handler: Any, pool: ThreadPoolExecutor) -> Any:
        kinds = ("unary_unary", "unary_stream", "stream_unary", "stream_stream")
        kind = next(name for name in kinds if getattr(handler, name))
        behaviour = getattr(handler, kind)
        blocks = not (
            inspect.iscoroutinefunction(behaviour) or inspect.isasyncgenfunction(behaviour)
        )

        def admitted(raw: Any, call: "_Call") -> Any:
            who = require_role(method, call)
            if not self._rates.take(who.uri):
                raise CofuseError(
                    "too_many_calls", f"found more than {CALLS_PER_S:.0f} calls a second"
                )
            parse = handler.request_deserializer
            if not kind.startswith("stream"):
                return _parsed(raw, parse)
            requests = _each_parsed(raw, parse)
            return call.blocking(requests) if blocks else requests

        async def answer(raw: Any, context: Any) -> Any:
            async with _answering(method, context) as call:
                request = admitted(raw, call)
                if not blocks:
                    return await behaviour(request, context)
                return await call.loop.run_in_executor(pool, behaviour, request, call)

        async def answers(raw: Any, context: Any) -> AsyncIterator[Any]:
            async with _answering(method, context) as call:
                request = admitted(raw, call)
                if not blocks:
                    async for each in behaviour(request, context):
                        yield each
                    return
                rest = behaviour(request, call)
                while (one := await call.loop.run_in_executor(pool, next, rest, _END)) is not _END:
                    yield one

        make = getattr(grpc, f"{kind}_rpc_method_handler")
        wrapped = answers if kind.endswith("_stream") else answer
        return make(wrapped, response_serializer=handler.response_serializer)

    def close(self) -> None:
        """Let the threads end; a handler at work finishes first."""
        for pool in self._pools.values():
            pool.shutdown(wait=True, cancel_futures=True)


@asynccontextmanager
async def _answering(method: str, context: Any) -> "AsyncIterator[_Call]":
    """The call for a handler; what the handler raises becomes the call's status."""
    call = _Call(context)
    try:
        with observing(method, call, gone=_GONE):
            yield call
    except _AbortedError as abort:
        await context.abort(abort.code, abort.details, call.trailing)
    except CofuseError as error:
        await _refuse(context, error)
    finally:
        call.active = False


async def _refuse(context: Any, error: CofuseError) -> None:
    metadata = ((ERROR_KEY, error.error_id),)
    await context.abort(CATALOGUE[error.error_id].status, printable(str(error)), metadata)


class _AbortedError(Exception):
    """A blocking handler has ended its call."""

    def __init__(self, code: grpc.StatusCode, details: str) -> None:
        self.code = code
        self.details = details
        super().__init__(details)


class _CallerGoneError(Exception):
    """The caller went away while a blocking handler waited for it."""


_GONE: Final = (
    GeneratorExit,
    asyncio.CancelledError,
    grpc.RpcError,
    grpc.aio.AbortError,
    _CallerGoneError,
)


class _Call:
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
        self._context = context

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
        raise _AbortedError(code, details)

    def blocking(self, messages: AsyncIterator[Any]) -> Iterator[Any]:
        """The caller's messages, for a thread that waits for each."""

        async def following() -> Any:
            return await anext(messages, _END)

        while (one := self._wait(following())) is not _END:
            yield one

    def _wait(self, coroutine: Any) -> Any:
        future = asyncio.run_coroutine_threadsafe(coroutine, self.loop)
        while True:
            try:
                return future.result(_CANCEL_POLL_S)
            except concurrent.futures.CancelledError:
                raise _CallerGoneError("the caller cancelled") from None
            except TimeoutError:
                if not self.active:
                    future.cancel()
                    raise _CallerGoneError("the caller went away") from None


def _parsed(raw: bytes, parse: Callable[[bytes], Any]) -> Any:
    try:
        message = parse(raw)
    except DecodeError as error:
        raise CofuseError("bad_request", "found bytes that are no message of this call") from error
    check_bounds(message)
    return message


async def _each_parsed(
    raw: AsyncIterator[bytes], parse: Callable[[bytes], Any]
) -> AsyncIterator[Any]:
    async for message in raw:
        yield _parsed(message, parse)
