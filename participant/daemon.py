"""The loop a data officer can read: train, take an assignment, let the guard release it.

`python -m participant.daemon participant.toml`. It dials out and listens on nothing but a Unix
socket in its own folder. Safe to kill at any line: started again, it goes on.
"""

import json
import logging
import shutil
import sys
import threading
import time
from collections.abc import Callable
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any, Final

import torch

from participant.attendance import Attendance
from participant.client import Client, Stopped
from participant.config import ParticipantConfig, load_config
from participant.corpus import CorpusError
from participant.desk import Desk
from participant.durable import is_broken, is_full, only_one
from participant.engine import Engine
from participant.guard import AwaitingApprovalError, Guard
from participant.policy import PolicyRefusalError, load_policy
from participant.renewal import Renewal
from participant.spool import Entry, Spool
from participant.stages.cpt import Expert
from participant.status import PAUSED, StatusServer
from participant.training import Training
from participant.work import Tell, Worker, progress_body
from protos import logs
from protos.config import ConfigError
from protos.errors import RemoteError
from protos.messages import Report
from protos.process import die_with_parent, on_stop_signal
from protos.v1 import fleet_pb2 as pb
from trust.chain import AuditError, Head
from trust.keys import KeyFileError
from trust.pivot_manifest import ManifestError

VERSION: Final = "0.1.0"
_POLL_S: Final = 1.0
RETRY_S: Final = 10.0
"""Between two looks at a full disk, or two tries to reach the coordinator."""
_LATER: Final = frozenset({"unreachable", "expired"})  # a renewed certificate counts at a new dial
_LOG = logging.getLogger(__name__)


class Participant:
    """One institution's daemon."""

    def __init__(self, config: ParticipantConfig, tell: Tell) -> None:
        self._config = config
        self._tell_out = tell
        self._stop = threading.Event()
        self._halt = threading.Event()  # the work in hand must end: stopping, or nobody waits
        self._expert = Expert(
            config.data_dir / "expert", config.corpus, config.model, config.canary_file
        )
        self._training = Training(config, self._expert)
        self._spool = Spool(config.data_dir / "spool")
        self._guard = Guard(config, self._spool)
        self._worker = Worker(config, self._guard, self._expert, self._tell)
        self._ended: frozenset[str] = frozenset()
        self._engine_address = ""
        self._told_paused = False
        self._doing: dict[str, Any] = {"doing": "starting"}
        self._engine = Engine(
            state_dir=config.data_dir / "engine",
            ca=config.tls.ca,
            certificate=config.tls.certificate,
            key=config.tls.key,
        )
        self._attendance = Attendance(
            config.coordinator,
            config.tls.files(),
            version=VERSION,
            beat=self._beat,
            on_joined=self._on_joined,
            on_summons=self._on_summons,
        )
        self._renewal = Renewal(config.coordinator, config.tls.files())
        self._desk = Desk(self._engine, self._spool, self._attendance.beat_now, self._guard.waits)

    def stop(self) -> None:
        """Ask the loop to end at its next step; training writes a checkpoint first."""
        self._stop.set()
        self._halt.set()

    def run(self) -> None:
        """Serve rounds, and train the expert when there is none to serve, until stopped.

        Raises: RemoteError when the coordinator refuses us for good. CorpusError. OSError when
            the disk fails: what was written before is in doubt.
        """
        status = StatusServer(self._config.data_dir, self.status)
        status.open()
        self._engine.start()
        self._attendance.start()
        self._renewal.start()
        try:
            while not self._stop.is_set():
                if self._attendance.refusal is not None:
                    raise self._attendance.refusal
                try:
                    self._step()
                except Exception as error:
                    if not is_full(error):
                        raise
                    self._wait_for_room(error)
        finally:
            self._renewal.stop()
            self._attendance.stop()
            self._engine.stop()
            status.close()
            self._worker.egress.close()

    def status(self) -> dict[str, Any]:
        """How we are; called from the status socket's thread."""
        facts, opens = self._expert.facts(), self._training.next_window()
        return {
            "name": self._config.name,
            **self._doing,
            "paused": self._paused,
            "attending": self._attendance.attending,
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
            self._attendance.beat_now()
        if self._paused:
            self._wait("paused", "resume with: cofuse participant resume")
        elif self._free_bytes() < self._config.min_free_mb * 1_000_000:
            self._wait_for_room(None)
        elif self._expert.ready and (entry := self._desk.next()) is not None:
            self._serve(entry)
        elif self._training.due():
            self._train()
        else:
            self._wait("waiting", "")

    def _drop_ended(self) -> None:
        ended, self._ended = self._ended, frozenset()
        for entry in self._spool.unfinished():
            if entry.round_id in ended:
                self._tell("round", {"round": entry.round_id, "status": "cancelled"})
                self._desk.drop(entry.round_id)
                self._guard.close(entry.round_id)

    def _serve(self, entry: Entry) -> None:
        """Answer one assignment, whatever it is: the other side must never wait for nothing."""
        assignment = entry.assignment
        record = partial(self._worker.record, assignment, "report")
        self._halt.clear()

        def should_stop() -> bool:
            self._desk.take_in()
            over = self._stop.is_set() or entry.round_id in self._ended
            return over or self._paused

        if should_stop():  # it came between the last look and clear()
            return
        try:
            report = entry.report or self._do(entry, should_stop)
        except PolicyRefusalError as error:
            report = self._worker.refuse(assignment, error)
        except ManifestError as error:
            report = self._worker.disbelieve(assignment, error)
        except AwaitingApprovalError:
            self._desk.tell(self._worker.wait(assignment), record)
            return
        except Stopped:
            return  # it stays in the spool, or is dropped at the next step
        except Exception as error:
            if is_full(error) or is_broken(error):
                raise
            if isinstance(error, RemoteError) and error.error_id in _LATER:
                self._doing = {"doing": "waiting for the coordinator", "problem": str(error)}
                self._stop.wait(RETRY_S)
                return
            report = self._worker.failure(assignment, error)
        answered = self._spool.answer(entry, report)
        self._desk.answer(answered, record)
        self._guard.close(assignment.round_id)
        self._tell("round", {"round": assignment.round_id, "status": report.status})

    def _do(self, entry: Entry, should_stop: Callable[[], bool]) -> Report:
        tls = self._config.tls.files()
        with closing(Client(self._config.coordinator, tls, self._halt)) as client:
            return self._worker.do(entry, client, should_stop)

    def _train(self) -> None:
        """Train until it is done, its window closes, or a round wants the finished expert."""

        def should_stop() -> bool:
            self._desk.take_in()
            wanted = self._expert.ready and self._desk.open
            return wanted or self._stop.is_set() or self._paused

        result = self._training.run(
            on_progress=lambda p: self._tell("train", progress_body(p)), should_stop=should_stop
        )
        if result.finished:
            self._tell("trained", {"losses": result.losses})
            self._attendance.beat_now()

    def _wait(self, doing: str, words: str) -> None:
        self._doing = {"doing": doing, "problem": words}
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
        return (self._config.data_dir / PAUSED).exists()

    def _free_bytes(self) -> int:
        return shutil.disk_usage(self._config.data_dir).free

    def _beat(self) -> pb.Beat:
        facts, now = self._expert.facts(), time.time_ns() // 1_000_000
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

    def _on_joined(self, engine_address: str) -> None:
        if not self._engine_address:
            self._tell("joined", {})
        self._engine_address = engine_address

    def _on_summons(self, summons: pb.Summons) -> None:
        self._worker.egress.witness(Head(summons.audit_seq, summons.audit_head))
        self._ended = frozenset(summons.ended_rounds)
        if self._ended:
            self._halt.set()
        self._engine.summon(self._engine_address if summons.summoned else None)

    def _tell(self, kind: str, body: dict[str, Any]) -> None:
        self._doing = {"doing": kind, **{k: v for k, v in body.items() if k != "losses"}}
        self._tell_out(kind, body)


def main(argv: list[str]) -> int:
    """Run the daemon of one participant.toml."""
    die_with_parent()
    logs.configure("participant")
    if len(argv) != 1:
        sys.stderr.write("usage: python -m participant.daemon participant.toml\n")
        return 2
    try:
        config = load_config(Path(argv[0]))
        load_policy(config.policy)  # said now rather than at the first round
    except ConfigError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    torch.set_num_threads(config.threads)
    config.data_dir.mkdir(parents=True, exist_ok=True)
    try:
        with only_one(config.data_dir):
            participant = Participant(config, _tell_stdout)
            on_stop_signal(participant.stop)
            participant.run()
    except Stopped:
        return 0
    except (AuditError, KeyFileError, CorpusError, RemoteError, OSError) as error:
        sys.stderr.write(f"{error}\n")
        return 1
    return 0


def _tell_stdout(kind: str, body: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps({"kind": kind, **body}) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
