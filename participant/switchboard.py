"""Carries lines between the participant's processes, and says who is there.

Each process has one socket, to here. A line is a name, a space and JSON: the name of whom it is for
on its way in, of whom it is from on its way out, so nobody speaks under another's name; and only
what ROUTES lists is carried. The JSON is not looked into.
"""

import logging
import selectors
import socket
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final

SUPERVISOR: Final = "supervisor"
"""Whom it is from when a process is said to be here, or lost."""
ROUTES: Final = frozenset(
    {("guard", "trainer"), ("trainer", "guard"), ("guard", "courier"), ("courier", "guard")}
)
"""Who may speak to whom: what comes from the network passes the guard, or goes nowhere."""
MAX_LINE_BYTES: Final = 1 << 20
MAX_WAITING_BYTES: Final = 16 << 20
"""Lines that a process has not taken yet; with more, it is taken for dead."""
_LOG = logging.getLogger(__name__)


@dataclass(slots=True)
class _End:
    """One process' socket, and what has not passed it yet."""

    socket: socket.socket
    heard: bytearray = field(default_factory=bytearray)
    waiting: bytearray = field(default_factory=bytearray)


class Switchboard:
    """For one thread: plug, pull and turn."""

    def __init__(self, selector: selectors.BaseSelector) -> None:
        """Args: selector: may hold other files too; turn() leaves them to whoever put them."""
        self._selector = selector
        self._ends: dict[str, _End] = {}

    def plug(self, who: str, end: socket.socket) -> None:
        """Connect a process; whoever it may speak to hears that it is here, and it of them."""
        end.setblocking(False)
        self._ends[who] = _End(end)
        self._selector.register(end, selectors.EVENT_READ, who)
        for other in self._others(who):
            self._tell(other, "here", who)
            self._tell(who, "here", other)

    def pull(self, who: str) -> None:
        """Take a process off; what it said before is still carried, and others hear it went."""
        if who not in self._ends:
            return
        self._listen(who)
        end = self._ends.pop(who)
        self._selector.unregister(end.socket)
        end.socket.close()
        for other in self._others(who):
            self._tell(other, "lost", who)

    def turn(self, who: str, events: int) -> bool:
        """Carry what one socket has, or takes, now; return whether it still stands."""
        if events & selectors.EVENT_WRITE and who in self._ends:
            self._flush(who)
        return who in self._ends and (not events & selectors.EVENT_READ or self._listen(who))

    def _others(self, who: str) -> list[str]:
        return [other for other in self._ends if (who, other) in ROUTES]

    def _listen(self, who: str) -> bool:
        """Take in what there is; return whether the socket still stands."""
        end = self._ends[who]
        try:
            while piece := end.socket.recv(1 << 16):
                end.heard += piece
                for line in _lines(end.heard):
                    self._carry(who, line)
                if len(end.heard) > MAX_LINE_BYTES:
                    _LOG.error("the %s said a line of more than %d bytes", who, MAX_LINE_BYTES)
                    return False
        except BlockingIOError:
            return True
        except OSError:
            return False
        return False

    def _carry(self, who: str, line: bytes) -> None:
        name, _, said = line.partition(b" ")
        other = name.decode("ascii", "replace")
        if (who, other) not in ROUTES:
            _LOG.error("the %s spoke to %r, whom it has no business with", who, other[:40])
        elif other in self._ends:  # else whoever asks learns that the other one is lost
            self._send(other, b"%s %s\n" % (who.encode(), said))

    def _tell(self, who: str, what: str, about: str) -> None:
        self._send(
            who,
            b'%s {"say": "%s", "body": {"who": "%s"}}\n'
            % (SUPERVISOR.encode(), what.encode(), about.encode()),
        )

    def _send(self, who: str, line: bytes) -> None:
        end = self._ends[who]
        end.waiting += line
        self._flush(who)

    def _flush(self, who: str) -> None:
        end = self._ends[who]
        try:
            while end.waiting:
                del end.waiting[: end.socket.send(end.waiting)]
        except BlockingIOError:
            pass
        except OSError:  # it has just ended; its own turn will tell
            end.waiting.clear()
        if len(end.waiting) > MAX_WAITING_BYTES:
            _LOG.error("the %s takes no lines", who)
            end.socket.shutdown(socket.SHUT_RDWR)
        writes = selectors.EVENT_WRITE if end.waiting else 0
        self._selector.modify(end.socket, selectors.EVENT_READ | writes, who)


def _lines(heard: bytearray) -> Iterator[bytes]:
    """Take the whole lines out of what was heard."""
    while (ends := heard.find(b"\n")) >= 0:
        line = bytes(heard[:ends])
        del heard[: ends + 1]
        yield line
