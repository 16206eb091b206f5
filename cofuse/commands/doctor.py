"""`cofuse doctor` tries to break the walls between the processes of a participant."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cofuse.commands.connection import answer, fail, say, tell

if TYPE_CHECKING:
    from trust.attempts import Checkup


def doctor(home: Annotated[Path, typer.Argument(help="The participant's folder.")]) -> None:
    """Try what must not be possible: dial from trainer and guard, read the corpus as the courier.

    Each attempt is made behind the wall that the daemon uses. Exit status 1: something got through
    that should have been stopped, or a wall is missing that participant.toml requires. The outcome
    becomes a record on the audit chain.
    """
    from participant.checkup import check, record
    from participant.config import load_config
    from protos.config import ConfigError
    from trust.chain import AuditError
    from trust.keys import KeyFileError

    try:
        config = load_config(home / "participant.toml")
        found = check(home / "participant.toml", config)
        record(config, found)
    except ConfigError as error:
        fail(error, 2)
    except (AuditError, KeyFileError, OSError, RuntimeError) as error:
        fail(error)
    show(found)
    if found.broken:
        fail(
            f"{len(found.broken)} got through: let this participant serve no round. A corpus that "
            "lies below a folder of programs (/usr, /etc, a Python environment) moves elsewhere",
            code="wall_broken",
            data=asdict(found),
        )
    if found.missing and config.walls == "required":
        words = "; ".join(found.missing)
        fail(f'walls = "required", and: {words}', code="wall_broken", data=asdict(found))
    answer(asdict(found))


def show(found: "Checkup") -> None:
    """Each attempt with its outcome on stdout, what the platform lacks on stderr."""
    for one in found.findings:
        words = one.stopped_by and f"({one.stopped_by})"
        tell(f"{one.verdict:<20} {one.role:<13} {one.says} {words}".rstrip())
    for words in found.missing:
        say(f"not on this machine: {words}")
