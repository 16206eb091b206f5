"""The federation engine: small messages to participants, and their answers.

Flower's SuperLink does it (superlink.py, flower_run.py: the only coordinator modules that know
flwr). Importing Flower takes seconds of a core, so it comes up in a thread while participants are
served already: its port listens from the start, and who calls meanwhile waits.
"""

import socket
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from trust.identity import Leaf

if TYPE_CHECKING:
    from coordinator.superlink import SuperLink

MAX_PAYLOAD_BYTES: Final = 65_536
UP_S: Final = 60.0
"""It is up within seconds, or something is wrong."""
_BACKLOG: Final = 1024
"""Who dials while it comes up."""


class EngineError(RuntimeError):
    """Flower cannot do what was asked; the caller tries again or tells the operator."""


@dataclass(frozen=True, slots=True)
class Reply:
    """A participant's answer: its JSON text, or the reason why there is none."""

    payload: str | None
    error: str | None = None
    lost: bool = False
    """The message or its answer went missing on the way; the participant said nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """Where the engine keeps its state, where it listens, and who it is."""

    state_dir: Path
    """Folder of Flower's SQLite file; it is made when missing."""
    public_host: str = "127.0.0.1"
    public_port: int = 0
    """0 picks a free port; a coordinator that restarts names the one that participants know."""
    ca: Path
    """Certificate of the authority that signs participants (PEM)."""
    certificate: Path
    key: Path
    refusal: Callable[[Leaf], object] = lambda _leaf: None
    """Why a participant's certificate counts no more, if so."""


def listen(config: EngineConfig) -> socket.socket:
    """Listen at the public port. Raises: OSError."""
    return socket.create_server((config.public_host, config.public_port), backlog=_BACKLOG)


def address_of(config: EngineConfig, listener: socket.socket) -> str:
    """host:port that participants dial."""
    return f"{config.public_host}:{listener.getsockname()[1]}"


class Engine:
    """Carries small JSON messages to participants and their replies back (superlink.SuperLink)."""

    def __init__(self, config: EngineConfig) -> None:
        self._config = config
        self._listener: socket.socket | None = None
        self._superlink: Future[SuperLink] = Future()
        self._thread = threading.Thread(target=self._come_up, name="engine-start", daemon=True)
        self.public_address = ""
        """host:port that participants dial."""

    def listen(self) -> None:
        """Take the public port, and make the folder of the state. Raises: OSError."""
        self._config.state_dir.mkdir(parents=True, exist_ok=True)
        self._listener = listen(self._config)
        self.public_address = address_of(self._config, self._listener)

    def start(self, *, on_failure: Callable[[BaseException], object]) -> None:
        """Come up, in a thread. Args: on_failure: told, in that thread, why that was impossible."""
        self._thread.start()
        self._superlink.add_done_callback(
            lambda up: on_failure(error) if (error := up.exception()) else None
        )

    def stop(self) -> None:
        """Close the public port. Flower's state stays on disk."""
        if self._thread.is_alive():
            self._thread.join(UP_S)
        if self._superlink.done() and self._superlink.exception() is None:
            self._superlink.result().stop()
        elif self._listener is not None:
            self._listener.close()

    def register(self, participant: str, public_key: bytes) -> int:
        """As SuperLink.register."""
        return self._up().register(participant, public_key)

    def deliver(
        self,
        assignments: Mapping[int, str | bytes],
        *,
        on_reply: Callable[[int, Reply], None],
        stop: threading.Event,
        deadline_s: float,
        idle_s: Callable[[int], float] = lambda _node: 0.0,
    ) -> None:
        """As SuperLink.deliver."""
        self._up().deliver(
            assignments, on_reply=on_reply, stop=stop, deadline_s=deadline_s, idle_s=idle_s
        )

    def _come_up(self) -> None:
        try:
            # Here, and not above: this import is what takes the seconds.
            from coordinator.superlink import SuperLink

            superlink = SuperLink(self._config)
            superlink.start(self._listener)
        except BaseException as error:  # noqa: BLE001 - whoever waits for it raises it
            self._superlink.set_exception(error)
        else:
            self._superlink.set_result(superlink)

    def _up(self) -> "SuperLink":
        """The SuperLink, once it is up. Raises: EngineError."""
        try:
            return self._superlink.result(UP_S)
        except Exception as error:
            raise EngineError(f"the engine is not up: {error!r}") from error
