"""What the guard hears from the other processes, each word taken for no more than it is."""

from collections.abc import Callable
from functools import partial
from typing import Any

from participant.config import ParticipantConfig
from participant.counterparts import Counter, TrainerLine
from participant.durable import write_durably
from participant.egress import EgressLog
from participant.line import Body, Say
from participant.renewal import check_renewed
from participant.work import Tell
from protos.errors import RemoteError
from trust.chain import Head


class Hearing:
    """How the others are, as far as the guard knows; written by the line's thread alone."""

    def __init__(
        self,
        config: ParticipantConfig,
        trainer: TrainerLine,
        counter: Counter,
        egress: EgressLog,
        tell: Tell,
        beat_now: Callable[[], None],
    ) -> None:
        """Args: tell: hears the events. beat_now: called when the coordinator should know."""
        self._config = config
        self._trainer = trainer
        self._counter = counter
        self._egress = egress
        self._tell = tell
        self._beat_now = beat_now
        self._joined = False
        self.attending = False
        """Whether the coordinator has us on its stream."""
        self.refusal: RemoteError | None = None
        """Set once, when the coordinator has refused us for good."""
        self.ended: frozenset[str] = frozenset()
        """Rounds of ours that are over, as the coordinator said last."""
        self.training: dict[str, Any] | None = None
        """How far the trainer is; None: it does not train."""

    def take_ended(self) -> frozenset[str]:
        """The rounds that are over, once."""
        ended, self.ended = self.ended, frozenset()
        return ended

    def says(self) -> dict[tuple[str, str], Say]:
        """What is listened to, by who says it and what about."""
        return {
            ("courier", "task"): self._counter.laid,
            ("courier", "joined"): self._on_joined,
            ("courier", "attending"): self._on_attending,
            ("courier", "summons"): self._on_summons,
            ("courier", "certificate"): self._on_certificate,
            ("trainer", "expert"): self._trainer.heard,
            ("trainer", "train"): self._on_train,
            ("trainer", "trained"): self._on_trained,
            ("trainer", "adapt"): partial(self._tell, "adapt"),
            ("trainer", "logits"): partial(self._tell, "logits"),
            ("trainer", "disk"): partial(self._tell, "disk"),
            ("supervisor", "here"): self._on_here,
            ("supervisor", "lost"): self._on_lost,
        }

    def _on_here(self, body: Body) -> None:
        if body["who"] == "trainer":
            self._trainer.came()

    def _on_lost(self, body: Body) -> None:
        if body["who"] == "courier":
            self.attending = False
            self._counter.courier_lost()
        else:
            self.training = None

    def _on_joined(self, _body: Body) -> None:
        if not self._joined:
            self._joined = True
            self._tell("joined", {})

    def _on_attending(self, body: Body) -> None:
        self.attending = bool(body["attending"])
        if "refused" in body:
            self.refusal = RemoteError(str(body["refused"]), str(body["words"]))

    def _on_summons(self, body: Body) -> None:
        self._egress.witness(Head(int(body["audit_seq"]), str(body["audit_head"])))
        self.ended = frozenset(map(str, body["ended_rounds"]))

    def _on_certificate(self, body: Body) -> None:
        """Put a renewed certificate in the old one's place, if it is ours."""
        place, pem = self._config.tls.certificate, str(body["pem"])
        check_renewed(pem.encode(), place.read_bytes())
        write_durably(place, pem)

    def _on_train(self, body: Body) -> None:
        self.training = {"doing": "train", **body}
        self._tell("train", body)

    def _on_trained(self, body: Body) -> None:
        self.training = None
        if "losses" in body:  # else it was stopped before its end
            self._tell("trained", body)
            self._beat_now()
