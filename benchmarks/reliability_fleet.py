"""Many light participants in a process of their own, and the handle on it."""

import asyncio
import contextlib
import multiprocessing
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from typing import Final

from benchmarks.reliability_light import Identity
from benchmarks.reliability_member import Member, Tally

JOINS_AT_ONCE: Final = 16
THREADS: Final = 96
END_S: Final = 60.0


class Fleet:
    """The handle on the process."""

    def __init__(
        self, identities: Sequence[Identity], address: str, *, ask_every_s: float = 0.0
    ) -> None:
        """Args: ask_every_s: how often each asks for an answer; 0: never."""
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(
            target=_main, args=(tuple(identities), address, ask_every_s, theirs), daemon=True
        )
        self._process.start()
        theirs.close()

    def tell(self, command: str) -> Tally:
        """begin: count from here on; tally; prove: have every beat's arrival proven."""
        self._connection.send(command)
        answer = self._connection.recv()
        assert isinstance(answer, Tally)
        return answer

    def __enter__(self) -> "Fleet":
        return self

    def __exit__(self, *_error: object) -> None:
        self._connection.close()
        self._process.join(END_S)
        self._process.kill()
        self._process.join()


def _main(
    identities: tuple[Identity, ...], address: str, ask_every_s: float, parent: Connection
) -> None:
    with contextlib.suppress(EOFError):  # the parent wants no more
        asyncio.run(_serve(identities, address, ask_every_s, parent))


async def _serve(
    identities: tuple[Identity, ...], address: str, ask_every_s: float, parent: Connection
) -> None:
    joins = asyncio.Semaphore(JOINS_AT_ONCE)
    with ThreadPoolExecutor(THREADS) as threads:
        members = [Member(one, address, joins, threads, ask_every_s) for one in identities]
        attending = [asyncio.create_task(member.run()) for member in members]
        try:
            while True:
                command = await asyncio.to_thread(parent.recv)
                if command == "begin":
                    for member in members:
                        member.begin()
                unproven = 0
                if command == "prove":
                    proofs = await asyncio.gather(*(member.prove() for member in members))
                    unproven = proofs.count(False)
                total = sum((member.tally() for member in members), Tally(missed=unproven))
                parent.send(total)
        finally:
            for member in members:
                member.dismissed.set()
            for task in attending:
                task.cancel()
            await asyncio.gather(*attending, return_exceptions=True)


@contextlib.contextmanager
def fleets(
    identities: Sequence[Identity], address: str, *, askers: int, ask_every_s: float
) -> Iterator[list[Fleet]]:
    """Two processes: most participants in one, a few that ask in the other, which has time."""
    with (
        Fleet(identities[askers:], address) as crowd,
        Fleet(identities[:askers], address, ask_every_s=ask_every_s) as few,
    ):
        yield [crowd, few]
