"""One of the participant's three processes: behind its wall first, then its program.

`python -m participant.child ROLE participant.toml SOCKET`, started by participant.daemon. Nothing
heavy is imported before the wall: a library's threads would stay outside of it.
"""

import fcntl
import importlib
import logging
import os
import signal
import socket
import sys
from pathlib import Path
from typing import Final, Protocol

from participant.config import ParticipantConfig, load_config
from participant.corpus import CorpusError
from participant.policy import load_policy
from participant.sandbox import (
    ROLES,
    Role,
    courier_certificate,
    make_folders,
    scratch,
    wall_of,
)
from participant.stages import StageError
from protos import logs
from protos.config import ConfigError
from protos.errors import RemoteError
from protos.process import die_with_parent, on_stop_signal
from trust.chain import AuditError
from trust.keys import KeyFileError
from trust.walls import enter

BAD_CONFIG: Final = 2
"""Exit status: nothing helps but another configuration."""
HOPELESS: Final = 3
"""Exit status: a person must look; the words are on stderr, and no new start would help."""
PROGRAMS: Final = {
    "trainer": "participant.trainer",
    "guard": "participant.loop",
    "courier": "participant.courier",
}
_LOG = logging.getLogger(__name__)


class Program(Protocol):
    """What runs behind a wall."""

    def run(self) -> None:
        """Work until stopped."""

    def stop(self) -> None:
        """Ask it to end; from any thread."""


def main(argv: list[str]) -> int:
    """Go behind the wall and run the program of a role."""
    role = next(role for role in ROLES if role == argv[0])
    logs.configure(f"participant.{role}")
    try:
        config = load_config(Path(argv[1]))
        load_policy(config.policy)  # said now rather than at the first round
    except ConfigError as error:
        if role == "guard":  # for all three
            sys.stderr.write(f"error: {error}\n")
        return BAD_CONFIG
    try:
        make_folders(config)
        with (config.data_dir / f"{role}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # one that was killed may still be on its way out
            return _behind_the_wall(role, config, socket.socket(fileno=int(argv[2])))
    except OSError as error:
        sys.stderr.write(f"error: {error}\n")
        return HOPELESS


def _behind_the_wall(role: Role, config: ParticipantConfig, end: socket.socket) -> int:
    if role == "courier":
        courier_certificate(config)
    os.environ.update(scratch(role, config))
    held = enter(wall_of(role, config))
    if held.missing and config.walls == "required":
        sys.stderr.write(f'{"; ".join(held.missing)}: participant.toml says walls = "required"\n')
        return HOPELESS
    die_with_parent(signal.SIGKILL)  # after the wall: a new user namespace may forget it
    for words in held.missing:
        _LOG.warning("%s; cofuse doctor tells what that means", words)
    program: Program = importlib.import_module(PROGRAMS[role]).Program(config, end)
    on_stop_signal(program.stop)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the supervisor hears it, and ends us in order
    try:
        program.run()
    except (AuditError, KeyFileError, CorpusError, StageError, RemoteError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        return HOPELESS
    return 0


if __name__ == "__main__":
    status = main(sys.argv[1:])
    logging.shutdown()
    sys.stdout.flush()
    os._exit(status)  # all is on disk; taking torch apart would cost another second
