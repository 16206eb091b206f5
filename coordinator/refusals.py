"""Refused calls on the audit chain: each kind from each caller at once, and then a count an hour.

Whoever is refused could ask again a million times, so the chain must not grow with the calls: a
caller's first refusal of a kind is a record, those after it are counted, and the hour's count is
one record more.
"""

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

import grpc

from coordinator.store import Store
from protos.errors import CATALOGUE, CofuseError
from protos.logs import logger
from protos.printable import printable
from trust.chain import Entry

_LOG = logger(__name__)
REFUSED: Final = "rpc.refused"
WINDOW_S: Final = 3600.0
"""How long refusals of one kind are only counted, after the first."""
MAX_OPEN: Final = 2000
"""Kinds that are told apart at once; what comes beyond is counted together."""
_MAX_WHY: Final = 200
_STATUSES: Final = frozenset({grpc.StatusCode.PERMISSION_DENIED, grpc.StatusCode.UNAUTHENTICATED})
AUDITED: Final = frozenset(
    {error_id for error_id, entry in CATALOGUE.items() if entry.status in _STATUSES}
    | {"too_many_calls"}
)
"""Errors that say who may not; what is merely a wrong request is for the log."""


class Kind(NamedTuple):
    """What is one line, however often it happens."""

    caller: str
    method: str
    error_id: str


OTHERS: Final = Kind("others", "others", "others")


@dataclass(slots=True)
class _Open:
    since_s: float
    more: int = 0
    """Refusals since the last record."""
    why: str = ""


class Tally:
    """What is to be written, and when. Pure but for its memory, which is bounded."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """Args: clock: seconds, never backwards."""
        self._clock = clock
        self._open: dict[Kind, _Open] = {}
        self._fresh: list[Entry] = []

    def note(self, kind: Kind, why: str) -> bool:
        """Count one refusal; return whether it is to be written at once."""
        if kind not in self._open and len(self._open) >= MAX_OPEN:
            kind, why = OTHERS, "more kinds of refusals than are told apart"
        if (known := self._open.get(kind)) is not None:
            known.more, known.why = known.more + 1, why
            return False
        self._open[kind] = _Open(self._clock())
        self._fresh.append(_entry(kind, why, 1))
        return True

    def due(self, *, everything: bool = False) -> Sequence[Entry]:
        """Take what is to be written now. Args: everything: also hours that are not over."""
        entries, self._fresh = self._fresh, []
        now = self._clock()
        for kind, seen in list(self._open.items()):
            if everything or now - seen.since_s >= WINDOW_S:
                del self._open[kind]
                if seen.more:
                    entries.append(_entry(kind, seen.why, seen.more))
                    self._open[kind] = _Open(now)  # goes on: its next record is a count again
        return entries

    def wait_s(self) -> float | None:
        """Until when nothing more is due by itself; None: for ever."""
        if not self._open:
            return None
        oldest = min(seen.since_s for seen in self._open.values())
        return max(0.0, oldest + WINDOW_S - self._clock())


def _entry(kind: Kind, why: str, times: int) -> Entry:
    data = {"error": kind.error_id, "times": times}
    return Entry(actor=kind.caller, act=REFUSED, obj=kind.method, res="deny", why=why, data=data)


class Refusals:
    """Writes what the door refuses, in a thread: no caller waits for it, none is slowed by it."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._tally = Tally()
        self._news = threading.Condition()
        self._stopped = False
        self._thread = threading.Thread(target=self._run, name="refusals")

    def start(self) -> None:
        """Write from now on."""
        self._thread.start()

    def stop(self) -> None:
        """Write what was counted so far, and end."""
        with self._news:
            self._stopped = True
            self._news.notify()
        self._thread.join()

    def note(self, method: str, caller: str, refusal: CofuseError) -> None:
        """A call was refused; for the chain only if it is about who may."""
        if refusal.error_id not in AUDITED:
            return
        with self._news:
            if self._tally.note(
                Kind(caller, method, refusal.error_id), printable(refusal.says)[:_MAX_WHY]
            ):
                self._news.notify()

    def _run(self) -> None:
        while True:
            with self._news:
                entries = self._tally.due(everything=self._stopped)
                if not entries:
                    if self._stopped:
                        return
                    self._news.wait(self._tally.wait_s())
                    continue
            self._write(entries)

    def _write(self, entries: Sequence[Entry]) -> None:
        try:
            self._store.record(*entries)
        except CofuseError as error:  # a full disk: the log has each of them too
            _LOG.warning("refusals.unwritten", records=len(entries), says=str(error))
