"""The process that has the network: keys for it, Flower's SuperNode, and what is to be sent.

It sees public files, and what the guard has put into the sealed folder; it opens nothing else, and
decides nothing: the guard says what is fetched, sent and answered.
"""

import base64
import socket
import threading
from contextlib import closing, suppress
from pathlib import Path
from typing import Final

from participant.attendance import Attendance
from participant.client import Client
from participant.config import ParticipantConfig
from participant.engine import Engine, Task
from participant.line import Ask, Body, Line, PeerLostError, Say
from participant.renewal import Renewal
from participant.sandbox import COURIER_CERTIFICATE, SEALED
from protos import VERSION
from protos.messages import FileRef
from protos.retry import Stopped
from protos.tls import TlsFiles
from protos.v1 import fleet_pb2 as pb

_POLL_S: Final = 1.0


class Program:
    """Attends, carries tasks and answers, and transfers what the guard names."""

    def __init__(self, config: ParticipantConfig, end: socket.socket) -> None:
        self._config = config
        self._tls = TlsFiles(
            ca=config.tls.ca,
            certificate=config.data_dir / COURIER_CERTIFICATE,
            key=config.tls.key,
        )
        self._stop = threading.Event()
        self._tasks: dict[str, Task] = {}
        self._joined = False
        self._last_beat = pb.Beat(software_version=VERSION)
        self._engine_address = ""
        self.engine = Engine(
            state_dir=config.data_dir / "engine",
            ca=self._tls.ca,
            certificate=self._tls.certificate,
            key=self._tls.key,
        )
        self.attendance = Attendance(
            config.coordinator,
            self._tls,
            version=VERSION,
            beat=self._beat,
            on_joined=self._on_joined,
            on_summons=self._on_summons,
            on_change=self._say_attending,
        )
        self._renewal = Renewal(config.coordinator, self._tls, on_renewed=self._say_certificate)
        self._line = Line(end, self.stop)

    def stop(self) -> None:
        """Ask it to end."""
        self._stop.set()

    def run(self) -> None:
        """Carry until stopped."""
        asks: dict[tuple[str, str], Ask] = {
            ("guard", "fetch"): self._fetch,
            ("guard", "missing"): self._missing,
            ("guard", "put"): self._put,
            ("guard", "commit"): self._commit,
            ("guard", "answer"): self._answer,
        }
        says: dict[tuple[str, str], Say] = {
            ("guard", "beat"): lambda _: self.attendance.beat_now(),
            ("supervisor", "here"): lambda _: self._greet(),
        }
        self._line.start(asks, says)
        self.engine.start()
        self.attendance.start()
        self._renewal.start()
        try:
            while not self._stop.is_set():
                if (task := self.engine.next_task(_POLL_S)) is not None:
                    self._tasks[task.number] = task
                    self._say_task(task)
        finally:
            self._renewal.stop()
            self.attendance.stop()
            self.engine.stop()
            self._line.close()

    # what the guard asks for

    def _fetch(self, body: Body, halt: threading.Event) -> Body:
        """Bring a public file into the inbox, below its digest."""
        reference = FileRef.model_validate(body)
        with self._client(halt) as client:
            client.fetch(reference, self._config.data_dir / "inbox" / reference.sha256)
        return {}

    def _missing(self, body: Body, halt: threading.Event) -> Body:
        with self._client(halt) as client:
            return {"bytes": client.missing_bytes(self._sealed(body), body["sha256"])}

    def _put(self, body: Body, halt: threading.Event) -> Body:
        with self._client(halt) as client:
            client.put(self._sealed(body), body["sha256"])
        return {}

    def _commit(self, body: Body, halt: threading.Event) -> Body:
        with self._client(halt) as client:
            receipt = client.commit(body["round_id"], body["sha256"], body["size_bytes"])
        return {"receipt": base64.b64encode(receipt.SerializeToString()).decode()}

    def _answer(self, body: Body, _halt: threading.Event) -> Body:
        """Answer a task, if its connection still stands."""
        task = self._tasks.pop(body["task"], None)
        if task is not None:  # else it was answered, and the word of it was lost
            if "error" in body:
                task.fail(body["error"])
            else:
                task.reply(body["json"])
        return {}

    def _client(self, halt: threading.Event) -> "closing[Client]":
        """A connection of its own each time: certificates may have been renewed."""
        return closing(Client(self._config.coordinator, self._tls, halt))

    def _sealed(self, body: Body) -> Path:
        return self._config.data_dir / SEALED / Path(body["file"]).name

    # what the guard is told

    def _greet(self) -> None:
        """Tell a guard that has just come all that it must know."""
        if self._joined:
            self._line.say("guard", "joined")
        self._say_attending()
        for task in list(self._tasks.values()):
            if not task.lost:
                self._say_task(task)

    def _say_task(self, task: Task) -> None:
        self._line.say("guard", "task", {"task": task.number, "payload": task.payload})

    def _say_attending(self) -> None:
        said: Body = {"attending": self.attendance.attending}
        if (refusal := self.attendance.refusal) is not None:
            said |= {"refused": refusal.error_id, "words": str(refusal)}
        self._line.say("guard", "attending", said)

    def _say_certificate(self) -> None:
        pem = self._tls.certificate.read_text(encoding="ascii")
        self._line.say("guard", "certificate", {"pem": pem})

    def _beat(self) -> pb.Beat:
        while not self._stop.is_set():
            with suppress(PeerLostError, Stopped):  # the next guard will say
                body = self._line.call("guard", "beat", should_stop=self._stop.is_set)
                self._last_beat = pb.Beat.FromString(base64.b64decode(body["beat"]))
                break
        return self._last_beat

    def _on_joined(self, engine_address: str) -> None:
        self._joined = True
        self._engine_address = engine_address
        self._line.say("guard", "joined")

    def _on_summons(self, summons: pb.Summons) -> None:
        said = {
            "audit_seq": summons.audit_seq,
            "audit_head": summons.audit_head,
            "ended_rounds": list(summons.ended_rounds),
        }
        self._line.say("guard", "summons", said)
        self.engine.summon(self._engine_address if summons.summoned else None)
