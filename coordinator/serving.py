"""The gRPC server: one event loop for every stream, threads for handlers that block.

A stream that waits (a thousand idle participants) costs no thread; a handler that reads the
database or the disk is an ordinary function and runs in a thread of its service. Every call
passes one door: who may not call is not read, and what goes wrong is an error of the catalogue.
"""

import asyncio
import concurrent.futures
import inspect
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Any, Final

import grpc
from google.protobuf.message import DecodeError

from coordinator.admission import SWEEP_S, Members, Strangers
from coordinator.calls import END, AbortedError, Call, CallerGoneError, refuse
from coordinator.observe import OnRefusal, observing, unheard
from protos.bounds import check_bounds
from protos.errors import CofuseError
from protos.streams import IDLE_S
from protos.tls import SERVER_OPTIONS, TlsFiles, server_credentials

THREADS: Final = 64
"""Per service, so that those who watch rounds never keep an upload waiting."""
START_TIMEOUT_S: Final = 30.0

Register = Callable[[grpc.aio.Server], None]
_GONE: Final = (
    GeneratorExit,
    asyncio.CancelledError,
    grpc.RpcError,
    grpc.aio.AbortError,
    CallerGoneError,
)


class GrpcServer:
    """Serves on a loop of its own, in a thread, until stopped."""

    def __init__(
        self,
        listen: str,
        tls: TlsFiles,
        services: Sequence[Register],
        admission: Members | Strangers | None = None,
        on_refusal: OnRefusal = unheard,
        *,
        idle_s: float = IDLE_S,
    ) -> None:
        """Args: listen: host:port; port 0 picks a free one. services: each adds one servicer.

        admission: who comes in; by default whoever has a certificate of the authority.
        on_refusal: is told of every call that is refused, on the event loop.
        idle_s: how long a caller may leave an answer unread before the call ends.
        """
        self._listen = listen
        self._tls = tls
        self._admission = admission or Members()
        self._services = services
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="grpc", daemon=True)
        self._door = _Door(self._admission, on_refusal, idle_s)
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

    @property
    def open_calls(self) -> int:
        """Calls that are being answered now."""
        return len(self._door.open)

    async def _start(self) -> int:
        self._server = grpc.aio.server(interceptors=[self._door], options=SERVER_OPTIONS)
        for register in self._services:
            register(self._server)
        credentials = server_credentials(self._tls, mutual=self._admission.mutual)
        port = self._server.add_secure_port(self._listen, credentials)
        await self._server.start()
        self._sweeping = asyncio.create_task(self._door.sweep())
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
    """Every call comes in here: admission first, then the parser, then the handler."""

    def __init__(
        self, admission: Members | Strangers, on_refusal: OnRefusal, idle_s: float
    ) -> None:
        self._pools: dict[str, ThreadPoolExecutor] = {}
        self._idle_s = idle_s
        self._admission = admission
        self._on_refusal = on_refusal
        self.open: set[Call] = set()

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

        def admitted(raw: Any, call: Call) -> Any:
            call.leaf = self._admission.admit(method, call)
            parse = handler.request_deserializer
            if not kind.startswith("stream"):
                return parse_request(raw, parse)
            requests = _each_parsed(raw, parse)
            return call.blocking(requests) if blocks else requests

        async def answer(raw: Any, context: Any) -> Any:
            async with self._answering(method, context) as call:
                request = admitted(raw, call)
                if not blocks:
                    return await behaviour(request, context)
                return await call.loop.run_in_executor(pool, behaviour, request, call)

        async def answers(raw: Any, context: Any) -> AsyncIterator[Any]:
            async with self._answering(method, context) as call:
                request = admitted(raw, call)
                if not blocks:
                    async for each in behaviour(request, context):
                        with call.unread():
                            yield each
                    return
                rest = behaviour(request, call)
                while (one := await call.loop.run_in_executor(pool, next, rest, END)) is not END:
                    with call.unread():
                        yield one

        make = getattr(grpc, f"{kind}_rpc_method_handler")
        wrapped = answers if kind.endswith("_stream") else answer
        return make(wrapped, response_serializer=handler.response_serializer)

    @asynccontextmanager
    async def _answering(self, method: str, context: Any) -> "AsyncIterator[Call]":
        """The call for a handler; what the handler raises becomes the call's status."""
        call = Call(context)
        self.open.add(call)
        try:
            with observing(method, call, _GONE, self._on_refusal), call.cut_as_refusal():
                yield call
        except AbortedError as abort:
            await context.abort(abort.code, abort.details, call.trailing)
        except CofuseError as error:
            await refuse(context, error)
        finally:
            call.active = False
            self.open.discard(call)

    async def sweep(self) -> None:
        """Keep ending the open calls of those who may not be here any more, or do not read."""
        while True:
            await asyncio.sleep(SWEEP_S)
            await asyncio.to_thread(self._admission.refresh)
            due = [call.cut(why) for call in self.open if (why := self._objection(call))]
            await asyncio.gather(*due)

    def _objection(self, call: Call) -> CofuseError | None:
        """Why an open call must end, if it must."""
        if call.leaf and (refusal := self._admission.refusal(call.leaf)):
            return refusal
        if call.unread_s() > self._idle_s:
            return CofuseError("stalled", f"an answer was not read for {self._idle_s:g} s")
        return None

    def close(self) -> None:
        """Let the threads end; a handler at work finishes first."""
        for pool in self._pools.values():
            pool.shutdown(wait=True, cancel_futures=True)


def parse_request(raw: bytes, parse: Callable[[bytes], Any]) -> Any:
    """A message as its call reads it, within the bounds of protos/bounds.py.

    Raises: CofuseError bad_request.
    """
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
        yield parse_request(message, parse)
