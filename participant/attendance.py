"""The one stream an idle participant holds: it says how it is and hears whether it is wanted."""

import logging
import random
import threading
import time
from collections.abc import Callable, Iterator
from typing import Final

import grpc

from protos.errors import RemoteError, remote_errors
from protos.tls import TlsFiles, dial, reason
from protos.v1 import fleet_pb2 as pb
from protos.v1 import fleet_pb2_grpc
from trust.certificate_check import fault_of

_LOG = logging.getLogger(__name__)
FIRST_PAUSE_S: Final = 0.5
LONGEST_PAUSE_S: Final = 30.0
HEALTHY_S: Final = 60.0
JOIN_S: Final = 30.0
FIRST_BEAT_S: Final = 10.0
_HOPELESS: Final = frozenset({"not_allowed", "no_identity", "revoked", "wrong_authority"})
"""Refusals that no waiting cures: the daemon ends with the other side's words."""


class Attendance:
    """Joins, attends, and comes back by itself, for as long as it is started."""

    def __init__(
        self,
        address: str,
        tls: TlsFiles,
        *,
        version: str,
        beat: Callable[[], pb.Beat],
        on_joined: Callable[[str], None],
        on_summons: Callable[[pb.Summons], None],
        on_change: Callable[[], None] = lambda: None,
    ) -> None:
        """Args: beat, on_joined (with the engine's address), on_summons, on_change (of attending
        or refusal): called in threads.
        """
        self._address = address
        self._tls = tls
        self._version = version
        self._beat = beat
        self._on_joined = on_joined
        self._on_summons = on_summons
        self._on_change = on_change
        self._due = threading.Event()
        self._stop = threading.Event()
        self._interval_s = FIRST_BEAT_S
        self._channel: grpc.Channel | None = None
        self._thread = threading.Thread(target=self._run, name="attendance", daemon=True)
        self.attending = False
        self.refusal: RemoteError | None = None
        """Set once, when the coordinator has refused us for good."""

    def start(self) -> None:
        """Attend in the background; returns at once."""
        self._thread.start()

    def beat_now(self) -> None:
        """Say how we are without waiting for the next beat: something has changed."""
        self._due.set()

    def stop(self) -> None:
        """Leave."""
        self._stop.set()
        self._due.set()
        if self._channel is not None:
            self._channel.close()
        self._thread.join()

    def _run(self) -> None:
        pause_s = FIRST_PAUSE_S
        while not self._stop.is_set() and self.refusal is None:
            began = time.monotonic()
            try:
                # A channel of its own each time: certificates may have been renewed.
                self._channel = dial(self._address, self._tls)
                with remote_errors():
                    self._attend(self._channel)
            except RemoteError as error:
                if error.error_id in _HOPELESS:
                    self.refusal = error
                self._lost(str(error))
            except grpc.RpcError as error:
                own = fault_of(self._tls.ca, self._tls.certificate, self._tls.key)
                self._lost(f"the coordinator was not reached: {own or reason(error.details())}")
            except ValueError:  # the channel was closed by stop()
                self._lost("stopping")
            finally:
                self.attending = False
                self._on_change()
                if self._channel is not None:
                    self._channel.close()
            if time.monotonic() - began > HEALTHY_S:
                pause_s = FIRST_PAUSE_S
            # Spread: a thousand of us may have lost the same coordinator at the same moment.
            self._stop.wait(pause_s * random.SystemRandom().uniform(0.5, 1.5))
            pause_s = min(LONGEST_PAUSE_S, pause_s * 2)

    def _attend(self, channel: grpc.Channel) -> None:
        fleet = fleet_pb2_grpc.FleetStub(channel)
        joined = fleet.Join(pb.JoinRequest(software_version=self._version), timeout=JOIN_S)
        self._on_joined(joined.engine_address)
        over = threading.Event()
        try:
            for summons in fleet.Attend(self._beats(over)):
                if not self.attending:
                    self.attending = True
                    self._on_change()
                self._interval_s = float(summons.beat_interval_s or FIRST_BEAT_S)
                self._on_summons(summons)
        finally:
            over.set()
            self._due.set()

    def _beats(self, over: threading.Event) -> Iterator[pb.Beat]:
        while not over.is_set() and not self._stop.is_set():
            self._due.clear()
            yield self._beat()
            self._due.wait(self._interval_s)

    def _lost(self, words: str) -> None:
        if not self._stop.is_set():
            _LOG.warning("%s; attending again soon", words)
