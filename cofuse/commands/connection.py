"""How a command reaches the coordinator, and how it says what went wrong."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, NoReturn

import grpc
import typer

from cofuse.sdk import Coordinator
from protos.errors import CofuseError, RemoteError

At = Annotated[str, typer.Option("--at", envvar="COFUSE_AT", help="host:port of the coordinator.")]
Identity = Annotated[
    Path,
    typer.Option(
        "--identity",
        envvar="COFUSE_IDENTITY",
        help="Folder with ca.pem, pivot-signer.pem, certificate.pem and key.pem.",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="One JSON object as the last line of stdout.")]


def fail(error: object, status: int = 1) -> NoReturn:
    """Say the error on stderr and end."""
    typer.echo(f"error: {error}", err=True)
    raise typer.Exit(status)


@contextlib.contextmanager
def connected(at: str, identity: Path) -> Iterator[Coordinator]:
    """The SDK under the identity in a folder; its errors become words and exit status 1."""
    files = {name: identity / f"{name}.pem" for name in ("ca", "certificate", "key")}
    missing = [str(path) for path in files.values() if not path.exists()]
    if missing:
        fail(f"{', '.join(missing)}: no such file; give the identity's folder with --identity", 2)
    try:
        with Coordinator(at, **files) as coordinator:
            yield coordinator
    except RemoteError as error:
        fail(f"{error} [{error.error_id}]")
    except grpc.RpcError as error:
        fail(CofuseError("unreachable", f"{at} not reached: {error.details()}"))
