"""How a command reaches the coordinator, what several take, and how each says what went wrong."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cofuse.output import answer, fail, say, tell
from cofuse.profile import remembered

if TYPE_CHECKING:
    from cofuse.sdk import Coordinator

__all__ = [
    "At", "Home", "Identity", "Json", "RoundId", "Spec",
    "answer", "connected", "fail", "say", "tell",
]  # fmt: skip


def _identity() -> Path:
    return Path(remembered("identity") or ".")


At = Annotated[
    str,
    typer.Option(
        "--at",
        envvar="COFUSE_AT",
        default_factory=lambda: remembered("at"),
        show_default=False,
        help="host:port of the coordinator; default: as `cofuse login` said.",
    ),
]
Identity = Annotated[
    Path,
    typer.Option(
        "--identity",
        envvar="COFUSE_IDENTITY",
        default_factory=_identity,
        show_default=False,
        help="Folder with ca.pem, pivot-signer.pem, certificate.pem and key.pem; likewise.",
    ),
]
Home = Annotated[Path, typer.Argument(help="The coordinator's folder.")]
RoundId = Annotated[str, typer.Argument(help="As `cofuse round ls` shows it.")]
Spec = Annotated[Path, typer.Argument(help="Round spec or round.lock.yaml; see examples/.")]
Json = Annotated[bool, typer.Option("--json", help="One JSON object as the last line of stdout.")]
"""For commands that do more with it than `tell` and `answer`; all others have it by themselves."""


@contextlib.contextmanager
def connected(at: str, identity: Path) -> Iterator["Coordinator"]:
    """The SDK under the identity in a folder; its errors become words and an exit status."""
    import grpc

    from cofuse.sdk import Coordinator
    from protos.config import checked_address
    from protos.errors import CofuseError
    from protos.tls import reason
    from trust.certificate_check import fault_of

    if not at:
        fail("found no --at, no COFUSE_AT and no login, wanted the coordinator's host:port",
             code="no_connection")  # fmt: skip
    try:
        checked_address(at)
    except ValueError as error:
        fail(f"--at: {error}", code="no_connection")
    files = {name: identity / f"{name}.pem" for name in ("ca", "certificate", "key")}
    missing = [str(path) for path in files.values() if not path.exists()]
    if missing:
        fail(
            f"{', '.join(missing)}: no such file; give the identity's folder with --identity",
            code="no_connection",
        )
    try:
        with Coordinator(at, **files) as coordinator:
            yield coordinator
    except grpc.RpcError as error:
        own = fault_of(files["ca"], files["certificate"], files["key"])
        fail(CofuseError("unreachable", f"{at} not reached: {own or reason(error.details())}"))
