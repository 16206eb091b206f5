"""Who attends, and who is asked to come: an idle participant holds one stream and nothing else.

A participant dials the engine only while it is summoned. Pure but for a lock: no wire, no
database, and the clock is an argument. Everything here is forgotten at a restart and comes back
with the next beats.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from typing import Final

BEAT_S: Final = 10
WAVE: Final = 64
"""Participants that may be on their way to the engine at once."""
BEGIN_S: Final = 60.0
"""A summoned one that has begun nothing by then no longer keeps others from being summoned."""
DOUBLED: Final = 5
DOUBLED_S: Final = 600.0
"""So many attendances within so long that took the place of one still here: two of them take turns,
or one loses its connection again and again."""
TICK_S: Final = 1.0
DEBOUNCE_S: Final = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """A participant as its last beat shows it."""

    software_version: str
    clock_skew_ms: int
    """Its clock less ours."""
    free_disk_bytes: int
    paused: bool
    expert_version: int
    expert_steps: int
    expert_unix_ms: int
    """When its expert was finished, by our clock; 0: it has none."""
    working: frozenset[str]
    """Rounds it has taken and not answered yet."""
    seen_unix_ms: int
    awaiting: frozenset[str] = frozenset()
    """Of these, whose finished releases wait for a person there."""
    certificate_ends_unix_s: float = 0.0
    """Of the one it calls under; 0: not known."""
    doubled: bool = False
    """Whether attendances of its name keep taking each other's place; the roll knows, no beat."""


@dataclass(frozen=True, slots=True)
class Call:
    """What one participant should hear now."""

    summoned: bool = False
    ended: frozenset[str] = frozenset()
    news: int = 0
    """Counts changes of `ended`: a round may end, be dropped, and come up and end again."""


@dataclass(slots=True)
class _Attendee:
    notify: Callable[[], None]
    seen: Seen | None = None
    idle_since: float | None = None
    ended: frozenset[str] = frozenset()
    news: int = 0


class Presence:
    """The roll. `ask`, `answered` and `dismiss` may be repeated; none of them waits."""

    def __init__(
        self,
        named: Callable[[str], Collection[str]],
        *,
        wave: int = WAVE,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Args: named: whom a round waits for; nobody when it is over or unknown."""
        self._named = named
        self._wave = wave
        self._clock = clock
        self._lock = threading.Lock()
        self._attendees: dict[str, _Attendee] = {}
        self._asked: dict[str, set[str]] = {}  # participant -> rounds; in the order of asking
        self._summoned: dict[str, float] = {}  # participant -> since when
        self._displaced: dict[str, deque[float]] = {}  # participant -> when, the last ones
        self._stop = threading.Event()

    # what the wire tells

    def arrive(self, name: str, notify: Callable[[], None]) -> object:
        """Begin an attendance, ending an older one of the same name.

        Args: notify: called, from any thread, when `call` may have changed.
        Returns: the attendance, for `leave` and `current`.
        """
        attendee = _Attendee(notify)
        with self._lock:
            older = self._attendees.pop(name, None)
            self._attendees[name] = attendee
            if older:
                self._displaced.setdefault(name, deque(maxlen=DOUBLED)).append(self._clock())
            woken = self._fill()
        for wake in [*woken, *([older.notify] if older else [])]:
            wake()
        return attendee

    def beat(self, name: str, seen: Seen) -> frozenset[str]:
        """Take a beat; it counts for the latest attendance.

        Returns: the rounds that it names and the one before did not, for tell_ended.
        """
        with self._lock:
            attendee = self._attendees.get(name)
            if attendee is None:
                return frozenset()
            if seen.working:
                attendee.idle_since = None
            elif attendee.idle_since is None:
                attendee.idle_since = self._clock()
            before, attendee.seen = attendee.seen, seen
            attendee.ended &= seen.working
            same = before and (before.working, before.paused) == (seen.working, seen.paused)
            woken = [] if same else self._fill()
        _wake(woken)
        return seen.working - (before.working if before else frozenset())

    def tell_ended(self, name: str, new: Collection[str]) -> None:
        """Say at once which of a participant's new rounds are over; it reads the rounds."""
        over = frozenset(one for one in new if name not in self._named(one))
        with self._lock:
            attendee = self._attendees.get(name)
            if attendee is None or attendee.seen is None:
                return
            if not (over := over & attendee.seen.working):
                return
            attendee.ended |= over
            attendee.news += 1
        attendee.notify()

    def leave(self, name: str, attendance: object) -> None:
        """End an attendance; a newer one of the same name stays."""
        with self._lock:
            if self._attendees.get(name) is attendance:
                del self._attendees[name]
            woken = self._fill()
        _wake(woken)

    def current(self, name: str, attendance: object) -> bool:
        """Whether no newer attendance has taken this one's place, and anybody is wanted at all."""
        with self._lock:
            return not self._stop.is_set() and self._attendees.get(name) is attendance

    def call(self, name: str) -> Call:
        """What the participant should hear now."""
        with self._lock:
            attendee = self._attendees.get(name)
            if attendee is None:
                return Call()
            return Call(name in self._summoned, attendee.ended, attendee.news)

    # what a round wants

    def ask(self, round_id: str, names: Collection[str]) -> None:
        """Want these participants at the engine, each as soon as it attends and there is room."""
        with self._lock:
            for name in names:
                self._asked.setdefault(name, set()).add(round_id)
            woken = self._fill()
        _wake(woken)

    def answered(self, round_id: str, name: str) -> None:
        """Want one participant no longer."""
        with self._lock:
            self._withdraw(round_id, name)
            woken = self._fill()
        _wake(woken)

    def idle_s(self, name: str) -> float:
        """How long a participant is known to have nothing in hand, in seconds.

        A message it was given before that is lost. 0 while it works, is away, or is unknown.
        """
        with self._lock:
            attendee = self._attendees.get(name)
            if attendee is None or attendee.idle_since is None:
                return 0.0
            return self._clock() - attendee.idle_since

    def attending(self) -> Mapping[str, Seen | None]:
        """Everybody here, with the last beat."""
        with self._lock:
            doubled = {name for name in self._displaced if self._is_doubled(name)}
            return {
                name: replace(one.seen, doubled=True) if one.seen and name in doubled else one.seen
                for name, one in self._attendees.items()
            }

    # what time brings

    def run(self, changed: threading.Condition) -> None:
        """Follow the rounds until stop(), looking again whenever `changed` is notified."""
        while not self._stop.is_set():
            with changed:
                changed.wait(TICK_S)
            self.refresh()
            self._stop.wait(DEBOUNCE_S)  # a busy round notifies many times a second

    def stop(self) -> None:
        """Let run() return, and everybody who attends go."""
        self._stop.set()
        with self._lock:
            notices = [attendee.notify for attendee in self._attendees.values()]
        _wake(notices)

    def refresh(self) -> None:
        """Find out which rounds in hand are over, and whom there is room for now."""
        with self._lock:
            held = {
                name: a.seen.working if a.seen else frozenset[str]()
                for name, a in self._attendees.items()
                if a.ended or (a.seen and a.seen.working)  # of a thousand, few
            }
        named = {one: self._named(one) for one in frozenset().union(*held.values())}
        woken = []
        with self._lock:
            for name, rounds in held.items():
                if (attendee := self._attendees.get(name)) is None:
                    continue
                # Not named and unknown sound the same: neither tells about others' rounds.
                ended = frozenset(one for one in rounds if name not in named[one])
                if ended != attendee.ended:
                    attendee.ended = ended
                    attendee.news += 1
                    woken.append(attendee.notify)
            woken += self._fill()
        _wake(woken)

    def _withdraw(self, round_id: str, name: str) -> None:
        rounds = self._asked.get(name, set())
        rounds.discard(round_id)
        if not rounds:
            self._asked.pop(name, None)

    def _fill(self) -> list[Callable[[], None]]:
        """Summon whom there is room for; return the notices to give once the lock is free."""
        now, before = self._clock(), set(self._summoned)
        for name in before:
            if name not in self._asked or name not in self._attendees:
                del self._summoned[name]
        coming = sum(self._is_coming(name, since, now) for name, since in self._summoned.items())
        for name in self._asked:
            if coming >= self._wave:
                break
            attendee = self._attendees.get(name)
            ready = attendee is not None and attendee.seen is not None and not attendee.seen.paused
            if ready and name not in self._summoned:
                self._summoned[name] = now
                coming += 1
        changed = before ^ set(self._summoned)
        return [self._attendees[name].notify for name in changed if name in self._attendees]

    def _is_doubled(self, name: str) -> bool:
        times = self._displaced[name]
        return len(times) == DOUBLED and self._clock() - times[0] < DOUBLED_S

    def _is_coming(self, name: str, since: float, now: float) -> bool:
        seen = self._attendees[name].seen
        return now - since < BEGIN_S and not (seen is not None and seen.working)


def _wake(notices: Collection[Callable[[], None]]) -> None:
    for notify in notices:
        notify()
