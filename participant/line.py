"""One process' end of the line to the others: questions with one answer each, and plain words.

What comes in is checked by whoever handles it: the guard takes nothing for granted.
"""

import errno
import itertools
import json
import logging
import os
import socket
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Final

from participant.corpus import CorpusError
from participant.durable import is_broken, is_full
from participant.engine import TaskLostError
from participant.switchboard import SUPERVISOR
from protos.errors import RemoteError
from protos.retry import Stopped

Body = dict[str, Any]
Ask = Callable[[Body, threading.Event], Body]
"""Answers a question; the event is set once nobody waits for the answer any more."""
Say = Callable[[Body], None]
_LOOK_S: Final = 0.2
"""Between two looks at whether a question is still wanted."""
_LOG = logging.getLogger(__name__)
_NAMED: Final[Mapping[str, type[Exception]]] = {
    "Stopped": Stopped,
    "CorpusError": CorpusError,
    "TaskLostError": TaskLostError,
}


class PeerLostError(Exception):
    """The process that was asked has ended before it answered; a new one is being started."""

    def __init__(self, peer: str) -> None:
        self.peer = peer
        super().__init__(f"the {peer} ended")


class FailedThereError(Exception):
    """The process that was asked could not do it; the message holds its error."""


@dataclass(slots=True)
class _Open:
    """A question that was asked."""

    peer: str
    done: threading.Event = field(default_factory=threading.Event)
    answer: Body = field(default_factory=dict)


class Line:
    """Speaks and listens, for many threads; each question is answered in a thread of its own."""

    def __init__(self, end: socket.socket, on_end: Callable[[], None]) -> None:
        """Args: on_end: called when the supervisor is gone."""
        self._end = end
        self._on_end = on_end
        self._asks: Mapping[tuple[str, str], Ask] = {}
        self._says: Mapping[tuple[str, str], Say] = {}
        self._numbers = itertools.count(1)
        self._writing = threading.Lock()
        self._state = threading.Condition()
        self._here: set[str] = set()
        self._open: dict[str, _Open] = {}
        self._halts: dict[tuple[str, str], threading.Event] = {}
        self._reader = threading.Thread(target=self._read, name="line", daemon=True)

    def start(
        self, asks: Mapping[tuple[str, str], Ask], says: Mapping[tuple[str, str], Say]
    ) -> None:
        """Listen, in a thread.

        Args: by who speaks and what about. The supervisor says who is here, and who is lost.
        """
        self._asks, self._says = asks, says
        self._reader.start()

    def close(self) -> None:
        """Hang up."""
        with suppress(OSError):  # the other side was first
            self._end.shutdown(socket.SHUT_RDWR)
        self._reader.join()
        self._end.close()

    def say(self, peer: str, what: str, body: Body | None = None) -> None:
        """Tell something that nobody answers; a peer that is not there does not hear it."""
        self._write(peer, {"say": what, "body": body or {}})

    def call(
        self,
        peer: str,
        what: str,
        body: Body | None = None,
        should_stop: Callable[[], bool] = lambda: False,
    ) -> Body:
        """Ask, and wait for the answer; for the peer first, while there is none.

        Args: should_stop: once it is true, the peer is told to stop.
        Raises: Stopped, PeerLostError; what the peer raised, where both know it: RemoteError,
            CorpusError, TaskLostError, OSError of a full or broken disk; else FailedThereError.
        """
        # Numbers of another process that had this place must not meet ours.
        number, question = f"{os.getpid()}-{next(self._numbers)}", _Open(peer)
        with self._state:
            while not self._state.wait_for(lambda: peer in self._here, _LOOK_S):
                if should_stop():
                    raise Stopped
            self._open[number] = question
        self._write(peer, {"ask": number, "what": what, "body": body or {}})
        halted = False
        while not question.done.wait(_LOOK_S):
            if not halted and should_stop():
                halted = True
                self._write(peer, {"halt": number})
        answer = question.answer
        if "error" in answer:
            raise _decoded(answer["error"])
        return dict(answer["body"])

    def _write(self, peer: str, message: Body) -> None:
        line = f"{peer} {json.dumps(message)}\n".encode()
        try:
            with self._writing:
                self._end.sendall(line)
        except OSError:  # the supervisor is gone; the reader has noticed
            return

    def _read(self) -> None:
        with self._end.makefile("rb") as lines:
            try:
                for line in lines:
                    who, _, said = line.partition(b" ")
                    self._take(who.decode(), json.loads(said))
            except (OSError, ValueError, KeyError, TypeError) as error:
                _LOG.error("the line broke: %s: %s", type(error).__name__, error)
        for peer in list(self._here):
            self._lose(peer)
        self._on_end()

    def _take(self, who: str, message: Body) -> None:
        if "answer" in message:
            self._answered(who, message)
        elif "halt" in message:
            if (halt := self._halts.get((who, str(message["halt"])))) is not None:
                halt.set()
        elif "ask" in message:
            threading.Thread(target=self._answer, args=(who, message), daemon=True).start()
        else:
            self._heard(who, str(message["say"]), message["body"])

    def _heard(self, who: str, what: str, body: Body) -> None:
        if who == SUPERVISOR:
            if what == "lost":
                self._lose(body["who"])
            else:
                with self._state:
                    self._here.add(body["who"])
                    self._state.notify_all()
        handler = self._says.get((who, what))
        if handler is None:
            if who != SUPERVISOR:
                _LOG.warning("the %s says %r, which means nothing here", who, what[:40])
            return
        try:
            handler(body)
        except Exception:  # noqa: BLE001 - whoever speaks nonsense must not make us deaf
            _LOG.exception("what the %s said of %r could not be taken in", who, what)

    def _answered(self, who: str, message: Body) -> None:
        with self._state:
            question = self._open.get(str(message["answer"]))
            if question is None or question.peer != who:
                return  # of somebody who had this place before
            del self._open[str(message["answer"])]
        question.answer = message
        question.done.set()

    def _lose(self, peer: str) -> None:
        """Nobody answers what this peer was asked, and nobody waits for what it asked."""
        with self._state:
            self._here.discard(peer)
            lost = [number for number, question in self._open.items() if question.peer == peer]
            questions = [self._open.pop(number) for number in lost]
        for question in questions:
            question.answer = {"error": {"kind": "PeerLostError", "words": peer}}
            question.done.set()
        for (who, _), halt in list(self._halts.items()):
            if who == peer:
                halt.set()

    def _answer(self, who: str, message: Body) -> None:
        number, what = str(message["ask"]), str(message["what"])
        halt = self._halts.setdefault((who, number), threading.Event())
        try:
            body = self._asks[who, what](message["body"], halt)
            self._write(who, {"answer": number, "body": body})
        except Exception as error:  # noqa: BLE001 - it is raised where the answer is awaited
            if not isinstance(error, (Stopped, TaskLostError, RemoteError)):
                _LOG.warning("%s: %s: %s", what, type(error).__name__, error, exc_info=error)
            self._write(who, {"answer": number, "error": _encoded(error)})
        finally:
            del self._halts[who, number]


def _encoded(error: Exception) -> Body:
    if is_full(error):
        return {"kind": "full", "words": str(error)}
    if is_broken(error):
        return {"kind": "broken", "words": str(error)}
    if isinstance(error, RemoteError):
        return {"kind": "RemoteError", "words": str(error), "id": error.error_id}
    named = type(error).__name__
    words = str(error) if named in _NAMED else f"{named}: {error}"
    return {"kind": named if named in _NAMED else "", "words": words}


def _decoded(error: Body) -> Exception:
    kind, words = str(error["kind"]), str(error["words"])[:4000]
    if kind in ("full", "broken"):
        return OSError(errno.ENOSPC if kind == "full" else errno.EIO, words)
    if kind == "RemoteError":
        return RemoteError(str(error["id"]), words)
    if kind == "PeerLostError":
        return PeerLostError(words)
    return _NAMED.get(kind, FailedThereError)(words)
