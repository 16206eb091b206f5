"""`cofuse participant page`: the institution's own page, on this machine only."""

import getpass
from pathlib import Path
from typing import Annotated

import typer

from cofuse.commands.connection import fail


def page(
    home: Annotated[Path, typer.Argument(help="The participant's folder.")],
    listen: Annotated[str, typer.Option(help="Loopback only; port 0 picks one.")] = "127.0.0.1:0",
    by: Annotated[str, typer.Option(help="Who decides; default: whoever is logged in.")] = "",
    browse: Annotated[bool, typer.Option("--open", help="Open it in the browser.")] = False,
) -> None:
    """Serve a page with health, releases to approve, what left, and pause, until Ctrl-C.

    It prints a link that only you should open: whoever has it decides what leaves.
    """
    from participant.config import load_config
    from participant.page.app import Desk, build
    from protos.config import ConfigError
    from protos.process import on_stop_signal
    from web.server import WebServer

    if listen.rpartition(":")[0] not in ("127.0.0.1", "localhost"):
        fail(f"--listen: found {listen!r}, wanted 127.0.0.1:port: it is for this machine alone", 2)
    try:
        desk = Desk(load_config(home / "participant.toml"), by or getpass.getuser())
        server = WebServer(build(desk), listen)
    except (ConfigError, OSError, ValueError) as error:
        fail(error, 2)
    on_stop_signal(server.end)
    server.start()
    link = f"{server.url}/?key={desk.key}"
    typer.echo(link)
    if browse:
        typer.launch(link)
    server.wait()
