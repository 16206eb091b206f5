"""`cofuse doctor` tries to break the walls between the processes of a participant."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from cofuse.commands.connection import Json, fail


def doctor(
    home: Annotated[Path, typer.Argument(help="The participant's folder.")], as_json: Json = False
) -> None:
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
    for one in found.findings:
        words = one.stopped_by and f"({one.stopped_by})"
        typer.echo(f"{one.verdict:<20} {one.role:<8} {one.says} {words}".rstrip(), err=as_json)
    for words in found.missing:
        typer.echo(f"not on this machine: {words}", err=True)
    healthy = not found.broken and not (found.missing and config.walls == "required")
    if found.broken:
        typer.echo(
            f"{len(found.broken)} got through: let this participant serve no round. A corpus that "
            "lies below a folder of programs (/usr, /etc, a Python environment) moves elsewhere",
            err=True,
        )
    if as_json:
        typer.echo(json.dumps({**asdict(found), "ok": healthy}))
    raise typer.Exit(0 if healthy else 1)
