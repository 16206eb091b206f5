"""A participant's three programs in threads of this process, without their walls.

What the walls do is for tests/participant/test_checkup.py; that the programs work behind them, for
the demo and the kills. Here they can be looked into and patched, and start in no time.
"""

import selectors
import socket
import threading
from pathlib import Path
from typing import Any

from participant import courier, loop, trainer
from participant.config import load_config
from participant.sandbox import courier_certificate, make_folders
from participant.switchboard import Switchboard


class Household:
    """Runs the three until stopped, and keeps what the guard tells."""

    def __init__(self, home: Path) -> None:
        config = load_config(home / "participant.toml")
        make_folders(config)
        courier_certificate(config)
        self.told: list[tuple[str, dict[str, Any]]] = []
        self._selector = selectors.DefaultSelector()
        self._board = Switchboard(self._selector)
        ends: dict[str, socket.socket] = {}
        for role in ("guard", "trainer", "courier"):
            ours, ends[role] = socket.socketpair()
            self._board.plug(role, ours)
        self.guard = loop.Program(
            config, ends["guard"], lambda kind, body: self.told.append((kind, body))
        )
        self.trainer = trainer.Program(config, ends["trainer"])
        self.courier = courier.Program(config, ends["courier"])
        programs = (self.guard, self.trainer, self.courier)
        self._threads = [threading.Thread(target=one.run, daemon=True) for one in programs]
        self._carrier = threading.Thread(target=self._carry, daemon=True)

    def start(self) -> None:
        """Start all; returns at once."""
        self._carrier.start()
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Stop all, the courier last, and wait."""
        guard, trains, courier_ = self._threads
        self.guard.stop()
        self.trainer.stop()
        guard.join(20)
        trains.join(20)
        self.courier.stop()
        courier_.join(20)
        self._carrier.join(20)
        assert not any(thread.is_alive() for thread in [*self._threads, self._carrier])

    def _carry(self) -> None:
        while self._selector.get_map():
            for key, events in self._selector.select():
                if not self._board.turn(key.data, events):
                    self._board.pull(key.data)
