"""The SDK for programs with an event loop: every call of Coordinator, awaited.

A call runs in a thread, so the loop never waits; the connection is the same one.
"""

import asyncio
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from types import TracebackType

from cofuse.evals import Evals
from cofuse.fusion_round import FusionRound, RoundFailedError
from cofuse.sdk import Coordinator
from cofuse.sdk_rows import Event, Finding, Pivot, Round


class AsyncCoordinator:
    """A connection under one identity, for asyncio."""

    def __init__(self, coordinator: Coordinator) -> None:
        """Args: coordinator: is closed with it."""
        self.sync = coordinator
        """What has no twin here: run it with asyncio.to_thread."""

    @classmethod
    def from_login(cls, at: str = "", identity: Path | str | None = None) -> "AsyncCoordinator":
        """As Coordinator.from_login."""
        return cls(Coordinator.from_login(at, identity))

    async def __aenter__(self) -> "AsyncCoordinator":
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await asyncio.to_thread(self.sync.close)

    async def submit(self, asked: FusionRound, *, request_id: str = "") -> str:
        """Upload files, submit; return the round's id. Raises: as Coordinator.submit."""
        return await asyncio.to_thread(self.sync.submit, asked, request_id=request_id)

    async def round(self, round_id: str) -> Round:
        """Return one round."""
        return await asyncio.to_thread(self.sync.round, round_id)

    async def rounds(self) -> list[Round]:
        """Return all rounds, oldest first."""
        return await asyncio.to_thread(self.sync.rounds)

    async def approve(self, round_id: str) -> Round:
        """Let a submitted round run (operators)."""
        return await asyncio.to_thread(self.sync.approve, round_id)

    async def cancel(self, round_id: str) -> Round:
        """End a round."""
        return await asyncio.to_thread(self.sync.cancel, round_id)

    async def why(self, name: str) -> list[Finding]:
        """Say why something is as it is."""
        return await asyncio.to_thread(self.sync.why, name)

    async def pivots(self) -> list[Pivot]:
        """Return all pivots, oldest first."""
        return await asyncio.to_thread(self.sync.pivots)

    async def download_pivot(self, name: str, folder: Path) -> Path:
        """Bring a pivot here. Raises: as Coordinator.download_pivot."""
        return await asyncio.to_thread(self.sync.download_pivot, name, folder)

    async def watch(
        self, round_id: str, *, after_seq: int = 0, timeout_s: float | None = None
    ) -> AsyncIterator[Event]:
        """Yield the round's events until it is final. Raises: as Coordinator.watch."""
        events = self.sync.watch(round_id, after_seq=after_seq, timeout_s=timeout_s)
        while (event := await asyncio.to_thread(_next, events)) is not None:
            yield event

    async def wait(self, round_id: str, *, timeout_s: float | None = None) -> Round:
        """Return the round once it is published. Raises: RoundFailedError, WaitTimedOutError."""
        events = [event async for event in self.watch(round_id, timeout_s=timeout_s)]
        final = await self.round(round_id)
        if final.state != "PUBLISHED":
            raise RoundFailedError(final, events)
        return final

    async def evals(self, pivot: str) -> Evals:
        """How a pivot and the models beside it did."""
        found = await asyncio.to_thread(self.sync.pivot, pivot)
        return Evals.of(found.evals)


def _next(events: Iterator[Event]) -> Event | None:
    """The next one, or None: StopIteration cannot leave a thread of asyncio."""
    return next(events, None)
