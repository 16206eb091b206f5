"""One light participant on the loop of its process: attends over mutual TLS, works when summoned.

Every beat goes out on time and in order on the one stream. A beat says nothing of whether it was
taken; but a beat that names a round which nobody knows is answered at once (that round is over),
and since a stream keeps its order, the answer proves every beat before it.
"""

import asyncio
import contextlib
import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Final

import grpc

from benchmarks.reliability_light import Identity, Taken, serve
from protos.tls import OPTIONS
from protos.v1 import fleet_pb2 as pb
from protos.v1 import fleet_pb2_grpc

VERSION: Final = "light"
AWAY_S: Final = 2.0
"""Before a lost stream is opened again, with some spread."""
ANSWER_S: Final = 30.0
JOIN_S: Final = 60.0
UNKNOWN: Final = "rnd-9{:08d}"
"""Rounds that no store will ever hold."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tally:
    """What a fleet has seen since its last `begin`."""

    attending: int = 0
    beats: int = 0
    missed: int = 0
    """Beats that were due while there was no stream, or that came to no answer."""
    latencies_s: tuple[float, ...] = ()
    """From writing a beat that must be answered to its answer."""
    receipts: tuple[Taken, ...] = ()
    retries: int = 0
    failures: tuple[str, ...] = ()

    def __add__(self, other: "Tally") -> "Tally":
        """Both fleets together."""
        return Tally(
            **{name: getattr(self, name) + getattr(other, name) for name in self.__slots__}
        )


@dataclass
class _Asked:
    """A beat that must be answered."""

    round_id: str
    since: float
    answered: asyncio.Event = field(default_factory=asyncio.Event)


class Member:
    """One light participant; everything but `serve` runs on the loop."""

    def __init__(
        self,
        identity: Identity,
        address: str,
        joins: asyncio.Semaphore,
        threads: ThreadPoolExecutor,
        ask_every_s: float,
    ) -> None:
        self._identity = identity
        self._address = address
        self._joins = joins
        self._threads = threads
        self._ask_every_s = ask_every_s
        self._loop = asyncio.get_running_loop()
        self._due = asyncio.Event()
        self._asked: _Asked | None = None
        self._asks = 0
        self._working: tuple[str, ...] = ()
        self._interval_s = 10.0
        self._engine = ""
        self._visit: asyncio.Task[None] | None = None
        self._receipts: list[Taken] = []
        self._failures: list[str] = []
        self._retries = 0
        self._open = False
        self.dismissed = threading.Event()
        self.begin()

    def begin(self) -> None:
        """Count from here on."""
        self._beats = self._missed = 0
        self._latencies_s: list[float] = []

    def tally(self) -> Tally:
        """What was counted."""
        return Tally(
            attending=int(self._open),
            beats=self._beats,
            missed=self._missed,
            latencies_s=tuple(self._latencies_s),
            receipts=tuple(self._receipts),
            retries=self._retries,
            failures=tuple(self._failures),
        )

    async def prove(self) -> bool:
        """Whether the coordinator has taken every beat so far."""
        asked = self._ask()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(asked.answered.wait(), ANSWER_S)
        return asked.answered.is_set()

    async def run(self) -> None:
        """Attend, and come back when the stream is lost, until cancelled."""
        asking = asyncio.create_task(self._ask_now_and_then()) if self._ask_every_s else None
        left = None
        try:
            while True:
                try:
                    async with self._channel() as channel:
                        await self._attend(fleet_pb2_grpc.FleetStub(channel), left)
                except grpc.aio.AioRpcError as error:
                    self._failures.append(f"{self._identity.name}: {error.details()}")
                if self._open:
                    self._open, left = False, self._loop.time()
                await asyncio.sleep(AWAY_S * random.uniform(0.5, 1.5))
        finally:
            if asking is not None:
                asking.cancel()

    @contextlib.asynccontextmanager
    async def _channel(self) -> Any:
        ca, certificate, key = self._identity.tls.read()
        credentials = grpc.ssl_channel_credentials(ca, key, certificate)
        options = [*OPTIONS, ("grpc.use_local_subchannel_pool", 1)]
        channel = grpc.aio.secure_channel(self._address, credentials, options=options)
        try:
            yield channel
        finally:
            await channel.close()

    async def _attend(self, fleet: Any, left: float | None) -> None:
        async with self._joins:
            joined = await fleet.Join(pb.JoinRequest(software_version=VERSION), timeout=JOIN_S)
            self._engine = joined.engine_address
            stream = fleet.Attend()
            await stream.write(self._beat())
            first = await stream.read()
        self._open = True
        if left is not None:
            self._missed += 1 + int((self._loop.time() - left) / self._interval_s)
        beating = asyncio.create_task(self._keep_beating(stream))
        try:
            summons = first
            while summons is not grpc.aio.EOF:
                self._hear(summons)
                summons = await stream.read()
        finally:
            beating.cancel()
            stream.cancel()

    async def _keep_beating(self, stream: Any) -> None:
        # The first pause is any part of the interval, so that a thousand beats spread evenly.
        pause_s = self._interval_s * random.random()
        while True:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._due.wait(), pause_s)
            self._due.clear()
            pause_s = self._interval_s
            await stream.write(self._beat())

    def _beat(self) -> pb.Beat:
        self._beats += 1
        asked = [self._asked.round_id] if self._asked else []
        return pb.Beat(
            software_version=VERSION,
            clock_unix_ms=time.time_ns() // 1_000_000,
            free_disk_bytes=1 << 40,
            expert_version=1,
            expert_steps=1,
            working_rounds=[*self._working, *asked],
        )

    def _hear(self, summons: pb.Summons) -> None:
        self._interval_s = float(summons.beat_interval_s)
        if self._asked is not None and self._asked.round_id in summons.ended_rounds:
            self._latencies_s.append(self._loop.time() - self._asked.since)
            self._asked.answered.set()
            self._asked = None
        if not summons.summoned:
            self.dismissed.set()
        elif self._visit is None or self._visit.done():
            self.dismissed = threading.Event()
            self._visit = asyncio.create_task(self._visit_engine())

    async def _visit_engine(self) -> None:
        dismissed = self.dismissed
        while not dismissed.is_set():
            try:
                serving = self._loop.run_in_executor(self._threads, self._serve, dismissed)
                self._retries += await serving
            except Exception as error:  # noqa: BLE001 - whatever it is, the report must name it
                self._failures.append(f"{self._identity.name}: {type(error).__name__}: {error}")
                await asyncio.sleep(AWAY_S)

    def _serve(self, dismissed: threading.Event) -> int:
        return serve(
            self._identity,
            self._address,
            self._engine,
            working=lambda rounds: self._tell(tuple(rounds)),
            taken=self._receipts.append,
            dismissed=dismissed,
        )

    def _tell(self, working: tuple[str, ...]) -> None:
        self._working = working
        self._loop.call_soon_threadsafe(self._due.set)

    def _ask(self) -> _Asked:
        self._asks += 1
        self._asked = _Asked(UNKNOWN.format(self._asks), self._loop.time())
        self._due.set()
        return self._asked

    async def _ask_now_and_then(self) -> None:
        await asyncio.sleep(self._ask_every_s * random.random())
        while True:
            await asyncio.sleep(self._ask_every_s)
            if self._asked is None and self._open:
                self._ask()
