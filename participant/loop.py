"""The guard's loop, which a data officer can read: take an assignment, have it done, release it.

It has no network: the courier brings what comes and carries what the guard lets out; the trainer
computes. It listens on nothing but a Unix socket in the data folder. Safe to kill at any line:
started again, it goes on.
"""

import base64
import json
import logging
import shutil
import socket
import sys
import threading
import time
from collections import Counter as Tally
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from typing import Any, Final

from participant.config import ParticipantConfig
from participant.counterparts import Counter, Errands, TrainerLine
from participant.desk import Desk
from participant.durable import is_broken, is_full
from participant.guard import AwaitingApprovalError, Guard
from participant.hearing import Hearing
from participant.line import Body, Line, PeerLostError
from participant.policy import PolicyRefusalError
from participant.sealer import unsealable
from participant.spool import Entry, Spool
from participant.status import StatusServer, paused
from participant.work import Tell, Worker
from protos import VERSION
from protos.errors import RemoteError
from protos.messages import Assignment, Report
from protos.retry import Stopped
from protos.v1 import fleet_pb2 as pb
from trust.pivot_manifest import ManifestError

_POLL_S: Final = 1.0
RETRY_S: Final = 10.0
"""Between two looks at a full disk, or two tries to reach the coordinator."""
_TRIES: Final = 3
"""How often the trainer may die at one round's work before the round is told that it failed."""
_LATER: Final = frozenset({"unreachable", "expired"})  # a renewed certificate counts at a new dial
_LOG = logging.getLogger(__name__)


class Program:
    """What the guard's process does."""

    def __init__(
        self, config: ParticipantConfig, end: socket.socket, tell: Tell | None = None
    ) -> None:
        """Args: tell: hears the events; without it they are JSON lines on stdout."""
        self._config = config
        self._tell_out = tell or _tell_stdout
        self._stop = threading.Event()
        self._line = Line(end, self.stop)
        self._trainer = TrainerLine(self._line, config.data_dir)
        self._counter = Counter(self._line)
        self._spool = Spool(config.data_dir / "spool")
        self._guard = Guard(config, self._spool)
        self._worker = Worker(config, self._guard, self._trainer, self._tell)
        self._heard = Hearing(
            config, self._trainer, self._counter, self._worker.egress, self._tell, self._beat_now
        )
        self._deaths: Tally[str] = Tally()
        self._told_paused = False
        self._doing: dict[str, Any] = {"doing": "starting"}
        self._desk = Desk(self._counter, self._spool, self._beat_now, self._guard.waits)

    def stop(self) -> None:
        """Ask the loop to end at its next step."""
        self._stop.set()

    def run(self) -> None:
        """Serve rounds, and let the expert be trained when there is none to serve, until stopped.

        Raises: RemoteError when the coordinator refuses us for good. OSError when the disk fails:
            what was written before is in doubt.
        """
        status = StatusServer(self._config.data_dir, self.status)
        status.open()
        if words := unsealable(self._config):  # now, not after hours of work for a round
            _LOG.warning("%s", words)
        self._line.start({("courier", "beat"): self._answer_beat}, self._heard.says())
        try:
            while not self._stop.is_set():
                if self._heard.refusal is not None:
                    raise self._heard.refusal
                try:
                    self._step()
                except Exception as error:
                    if not is_full(error):
                        raise
                    self._wait_for_room(error)
        finally:
            self._line.close()
            status.close()
            self._worker.egress.close()

    def status(self) -> dict[str, Any]:
        """How we are; called from the status socket's thread."""
        facts, schedule, now = self._trainer.facts, self._config.schedule, datetime.now(UTC)
        opens = None if schedule.window(now) else schedule.next_window(now)
        return {
            "name": self._config.name,
            **self._doing,
            "paused": self._paused,
            "attending": self._heard.attending,
            "working_rounds": [entry.round_id for entry in self._spool.unfinished()],
            "awaiting_approval": self._guard.waiting(),
            "expert_version": facts.version,
            "expert_steps": facts.steps,
            "next_training": None if opens is None else opens.isoformat(),
            "free_disk_bytes": self._free_bytes(),
            "alarm": self._worker.egress.alarm(),
        }

    # the loop

    def _step(self) -> None:
        """Do one piece of work, or wait for some."""
        self._desk.take_in()
        self._drop_ended()
        if self._told_paused != self._paused:
            self._beat_now()
        if self._paused:
            self._wait("paused", "resume with: cofuse participant resume")
        elif self._free_bytes() < self._config.min_free_mb * 1_000_000:
            self._wait_for_room(None)
        elif self._trainer.facts.ready and (entry := self._desk.next()) is not None:
            try:
                self._serve(entry)
            finally:
                self._trainer.free()
        else:
            self._wait("waiting", "")

    def _drop_ended(self) -> None:
        ended = self._heard.take_ended()
        for entry in self._spool.unfinished():
            if entry.round_id in ended:
                self._tell("round", {"round": entry.round_id, "status": "cancelled"})
                self._desk.drop(entry.round_id)
                self._guard.close(entry.round_id)

    def _serve(self, entry: Entry) -> None:
        """Answer one assignment, whatever it is: the other side must never wait for nothing."""
        assignment = entry.assignment
        record = partial(self._worker.record, assignment, "report")

        def should_stop() -> bool:
            self._desk.take_in()
            over = self._stop.is_set() or entry.round_id in self._heard.ended
            return over or self._paused

        try:
            report = entry.report or self._done(entry, should_stop)
        except AwaitingApprovalError:
            self._desk.tell(self._worker.wait(assignment), record)
            return
        except Stopped:
            return  # it stays in the spool, or is dropped at the next step
        if report is None:
            return
        answered = self._spool.answer(entry, report)
        self._desk.answer(answered, record)
        self._guard.close(assignment.round_id)
        self._deaths.pop(assignment.round_id, None)
        self._tell("round", {"round": assignment.round_id, "status": report.status})

    def _done(self, entry: Entry, should_stop: Callable[[], bool]) -> Report | None:
        """Do the work, and return what is reported of it; None: it is tried again later.

        Raises: Stopped, AwaitingApprovalError, OSError of a full or broken disk.
        """
        assignment = entry.assignment
        try:
            return self._do(entry, should_stop)
        except PolicyRefusalError as error:
            return self._worker.refuse(assignment, error)
        except ManifestError as error:
            return self._worker.disbelieve(assignment, error)
        except (AwaitingApprovalError, Stopped):
            raise
        except PeerLostError as error:
            return self._after_death(assignment, error)
        except Exception as error:
            if is_full(error) or is_broken(error):
                raise
            if isinstance(error, RemoteError) and error.error_id in _LATER:
                self._doing = {"doing": "waiting for the coordinator", "problem": str(error)}
                self._stop.wait(RETRY_S)
                return None
            return self._worker.failure(assignment, error)

    def _do(self, entry: Entry, should_stop: Callable[[], bool]) -> Report:
        self._trainer.hold(should_stop)
        errands = Errands(self._line, self._config.data_dir / "inbox", should_stop)
        return self._worker.do(entry, errands, should_stop)

    def _after_death(self, assignment: Assignment, error: PeerLostError) -> Report | None:
        """Return None to have the work tried again; a report once it has killed too often."""
        self._deaths[assignment.round_id] += error.peer == "trainer"
        _LOG.warning("%s: %s while it was at work", assignment.round_id, error)
        if self._deaths[assignment.round_id] < _TRIES:
            return None
        return self._worker.failure(assignment, error)

    def _wait(self, doing: str, words: str) -> None:
        self._doing = self._heard.training or {"doing": doing, "problem": words}
        self._desk.take_in(_POLL_S)

    def _wait_for_room(self, error: BaseException | None) -> None:
        """Say that the disk is full; what was asked stays asked, and goes on when there is room."""
        wanted = self._config.min_free_mb
        words = (
            f"{self._config.data_dir}: found {self._free_bytes() // 1_000_000} MB free, wanted "
            f"{wanted} MB ({error or 'min_free_mb'}): free some space; the work goes on by itself"
        )
        _LOG.warning("%s", words)
        self._tell("disk", {"problem": words})
        self._doing = {"doing": "waiting for disk space", "problem": words}
        self._stop.wait(RETRY_S)

    # what other threads ask and tell

    @property
    def _paused(self) -> bool:
        return paused(self._config.data_dir) is not None

    def _free_bytes(self) -> int:
        return shutil.disk_usage(self._config.data_dir).free

    def _beat(self) -> pb.Beat:
        facts, now = self._trainer.facts, time.time_ns() // 1_000_000
        audit = self._worker.egress.anchor()
        self._told_paused = self._paused
        return pb.Beat(
            software_version=VERSION,
            clock_unix_ms=now,
            free_disk_bytes=self._free_bytes(),
            paused=self._told_paused,
            expert_version=facts.version,
            expert_steps=facts.steps,
            expert_age_s=max(0, now - facts.finished_unix_ms) // 1000,
            working_rounds=[entry.round_id for entry in self._spool.unfinished()][:16],
            audit_seq=audit.seq,
            audit_head=audit.h if audit.seq else "",
            awaiting_approval=self._guard.waiting()[:16],
        )

    def _beat_now(self) -> None:
        self._line.say("courier", "beat")

    def _answer_beat(self, _body: Body, _halt: threading.Event) -> Body:
        """What the courier's next beat says."""
        return {"beat": base64.b64encode(self._beat().SerializeToString()).decode()}

    def _tell(self, kind: str, body: dict[str, Any]) -> None:
        self._doing = {"doing": kind, **{k: v for k, v in body.items() if k != "losses"}}
        self._tell_out(kind, body)


def _tell_stdout(kind: str, body: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps({"kind": kind, **body}) + "\n")
    sys.stdout.flush()
