"""`cofuse coordinator user`: who may sign in to the console."""

import getpass
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cofuse.commands.connection import Home, answer, fail, say, tell
from cofuse.output import App

if TYPE_CHECKING:
    from coordinator.console.users import Users

app = App(no_args_is_help=True, help="Let people sign in to the console.")
Name = Annotated[str, typer.Argument(help="Lower case, digits and dashes.")]


@app.command()
def add(
    home: Home,
    name: Name,
    role: Annotated[str, typer.Option(help="researcher or operator.")] = "researcher",
    sso: Annotated[
        str,
        typer.Option(
            help="What [console.oidc] calls them: they sign in there, without a password."
        ),
    ] = "",
) -> None:
    """Let somebody in, or give them another password; it is asked for, or read from stdin.

    What they do in the console is recorded under ROLE/NAME, as with a certificate of that name.
    """
    from coordinator.console.users import UserError
    from trust.identity import IdentityError

    if role not in ("researcher", "operator"):
        fail(f"--role: found {role!r}, wanted researcher or operator", 2)
    known: Any = role
    users = _users(home)
    try:
        users.add(name, known, "" if sso else _password(), sso=sso)
    except (UserError, IdentityError, OSError) as error:
        fail(error, 2)
    say(f"{role}/{name} may sign in")
    answer({"name": name, "role": role})


@app.command()
def remove(home: Home, name: Name) -> None:
    """Let somebody in no more; their sessions end at once."""
    from coordinator.console.users import UserError

    try:
        _users(home).remove(name)
    except (UserError, OSError) as error:
        fail(error, 2)
    say(f"{name} may sign in no more")
    answer({"name": name})


@app.command("ls")
def ls(home: Home) -> None:
    """List who may sign in."""
    users = _users(home).all()
    for user in users:
        tell(f"{user.name:<40} {user.role}")
    answer({"users": [{"name": user.name, "role": user.role} for user in users]})


def _users(home: Path) -> "Users":
    from coordinator.config import load_config
    from coordinator.console.users import Users
    from protos.config import ConfigError

    try:
        config = load_config(home / "coordinator.toml")
    except ConfigError as error:
        fail(error, 2)
    if config.console is None:
        say(
            f"note: {home / 'coordinator.toml'} has no [console] yet; add: "
            '[console] listen = "127.0.0.1:8080"'
        )
    return Users(config.data_dir)


def _password() -> str:
    if not sys.stdin.isatty():
        return sys.stdin.readline().rstrip("\r\n")
    password = getpass.getpass("password: ")
    if getpass.getpass("once more: ") != password:
        fail("found two different passwords, wanted the same twice", 2)
    return password
