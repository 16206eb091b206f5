"""`cofuse compliance export`: what an auditor gets."""

from pathlib import Path
from typing import Annotated

import typer

from cofuse.commands.connection import answer, fail, say, tell
from cofuse.output import App

app = App(no_args_is_help=True, help="Hand out what an auditor asks for.")


@app.callback()
def main() -> None:
    """Hand out what an auditor asks for."""


@app.command()
def export(
    folder: Annotated[Path, typer.Argument(help="The participant's folder.")],
    out: Annotated[Path, typer.Argument(help="Folder that is made.")] = Path("compliance"),
) -> None:
    """Write audit chain, policy, what left, and the control map, with how to check each.

    Nothing of the corpus, of models or of keys is in it. The chain gets a record of the export.
    """
    from cofuse.compliance import export as write
    from participant.config import load_config
    from protos.config import ConfigError
    from trust.chain import AuditError
    from trust.keys import KeyFileError

    if (folder / "coordinator.toml").exists():
        fail(f"{folder} is a coordinator's: use cofuse audit export {folder} OUT", 2)
    try:
        found = write(load_config(folder / "participant.toml"), out)
    except FileExistsError:
        fail(f"{out} is there already: name another folder", 2)
    except (ConfigError, AuditError, KeyFileError, OSError) as error:
        fail(error, 2)
    say(f"check it anywhere with: cofuse audit verify {out / 'audit'}")
    tell(out)
    answer({"folder": str(out), "files": found})
