"""`cofuse coordinator`: what a consortium operator does."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from cofuse.commands import members, upkeep, users
from cofuse.commands.connection import Home, answer, fail, say, tell
from cofuse.commands.doctor import show
from cofuse.output import App

app = App(no_args_is_help=True, help="Run the consortium's coordinator.")
for command in (members.invite, members.revoke, upkeep.fsck, upkeep.backup, upkeep.restore):
    app.command()(command)
app.add_typer(users.app, name="user")


@app.command()
def init(
    home: Home,
    host: Annotated[list[str], typer.Option(help="Name or address participants dial.")] = [  # noqa: B006
        "localhost",
        "127.0.0.1",
    ],
    listen: str = "127.0.0.1:7443",
    engine_listen: str = "127.0.0.1:9443",
    enroll_listen: Annotated[
        str, typer.Option(help="Where join tokens are redeemed; empty: nowhere.")
    ] = "",
    ops_listen: Annotated[str, typer.Option(help="Monitoring; loopback only.")] = "127.0.0.1:7442",
) -> None:
    """Make the authority, the keys that sign pivots and open contributions, coordinator.toml."""
    from coordinator.config import CoordinatorConfig
    from coordinator.sealed import ensure_worker_key, worker_folder
    from coordinator.signing import ensure_key
    from protos.config import ConfigError, checked, toml_text
    from trust.ca import (
        IdentityError,
        checked_hosts,
        create_authority,
        fingerprint,
        new_identity,
        sign_request,
    )
    from trust.keys import kid, load_private
    from trust.seal_keys import RECIPIENT_FILE

    settings = {
        "listen": listen,
        "engine_listen": engine_listen,
        "ops_listen": ops_listen,
        **({"enroll_listen": enroll_listen} if enroll_listen else {}),
        "authority": "ca",
        "data_dir": "data",
        "approval": "operator",
        "tls": {"ca": "ca/ca.pem", "certificate": "tls/certificate.pem", "key": "tls/key.pem"},
    }
    try:  # before anything is made: a folder half made would have to be removed by hand
        hosts = checked_hosts(host)
        checked(home / "coordinator.toml", settings, CoordinatorConfig)
        create_authority(home / "ca", "cofuse")
        request = new_identity(home / "tls", "coordinator", "coordinator")
    except FileExistsError as error:
        fail(f"{error}; this folder has an authority already, choose another", 2)
    except (ConfigError, IdentityError) as error:
        fail(error, 2)
    certificate = sign_request(
        home / "ca", request, role="coordinator", name="coordinator", hosts=hosts
    )
    (home / "tls" / "certificate.pem").write_bytes(certificate)
    (home / "coordinator.toml").write_text(toml_text(settings), encoding="utf-8")
    signing_key = ensure_key(home / "tls" / "key.pem", home / "ca" / "ca.pem")
    authority = fingerprint((home / "ca" / "ca.pem").read_bytes())
    signer = kid(load_private(signing_key).public_key())
    worker = worker_folder(home / "tls" / "key.pem")
    recipient = ensure_worker_key(worker, home / "ca" / RECIPIENT_FILE)
    tell(f"authority {authority}")
    tell(f"pivot signer {signer}")
    tell(f"fusion worker {recipient}")
    say(f"start it with: cofuse coordinator up {home}")
    made = {"authority": authority, "pivot_signer": signer, "fusion_worker": recipient}
    answer({"folder": str(home), **made})


@app.command()
def sign(
    home: Home,
    request: Annotated[Path, typer.Argument(help="request.csr, as made by `cofuse identity`.")],
    role: Annotated[str, typer.Option(help="participant, researcher or operator.")],
    name: Annotated[str, typer.Option(help="The name you mean to admit.")],
    days: Annotated[int, typer.Option(min=1, max=3650)] = 365,
) -> None:
    """Issue the certificate of a request; print it. Send ca/*.pem along."""
    from trust.ca import IdentityError, sign_request

    known: Any = role
    try:
        pem = sign_request(home / "ca", request.read_bytes(), role=known, name=name, days=days)
    except (IdentityError, OSError) as error:
        fail(error, 2)
    tell(pem.decode("ascii").rstrip())
    answer({"identity": f"{role}/{name}", "certificate": pem.decode("ascii")})


@app.command()
def certify(
    home: Home,
    host: Annotated[
        list[str] | None,
        typer.Option(help="Name or address participants dial.  [those it has]"),
    ] = None,
    days: Annotated[int, typer.Option(min=1, max=3650)] = 365,
) -> None:
    """Replace the server's own certificate: before it ends, or for another name.

    Nobody else has to do anything. It counts from the coordinator's next start.
    """
    from coordinator.config import load_config
    from protos.config import ConfigError
    from trust.ca import IdentityError, checked_hosts, hosts_of, renew
    from trust.files import replace_with

    try:
        config = load_config(home / "coordinator.toml")
        certificate = config.tls.certificate
        hosts = checked_hosts(host) if host else None
        authority = config.authority or home / "ca"
        pem = renew(authority, certificate.read_bytes(), days, hosts)
        replace_with(certificate, pem, 0o644)
    except (ConfigError, OSError) as error:
        fail(error, 2)
    except IdentityError as error:
        fail(f"{certificate} stays as it is: {error}", 2)
    names = ", ".join(hosts_of(pem))
    say(f"{certificate}: {days} days, for {names}; start the coordinator again")
    answer({"certificate": str(certificate), "hosts": list(hosts_of(pem)), "days": days})


@app.command()
def rotate(
    home: Home,
    forget: Annotated[
        bool, typer.Option("--forget", help="Destroy the keys that were retired before instead.")
    ] = False,
) -> None:
    """Give the fusion worker a new key; what is sealed to the old one still opens.

    Send ca/fusion-worker.pem to every participant: it is used from the next release on. Once all
    have it and the rounds of before have ended, destroy the old key with --forget. A coordinator
    that serves need not be started again.
    """
    from coordinator.config import load_config
    from coordinator.sealed import forget_retired_keys, rotate_worker_key, worker_folder
    from protos.config import ConfigError
    from trust.keys import KeyFileError
    from trust.seal_keys import RECIPIENT_FILE

    try:
        tls = load_config(home / "coordinator.toml").tls
        worker, public = worker_folder(tls.key), tls.ca.with_name(RECIPIENT_FILE)
        if forget:
            forgotten = forget_retired_keys(worker)
            tell(f"{len(forgotten)} retired keys destroyed")
            answer({"forgotten": forgotten})
            return
        old, new = rotate_worker_key(worker, public)
    except (ConfigError, KeyFileError, OSError) as error:
        fail(error, 2)
    tell(f"fusion worker {new}")
    say(f"send {public} to every participant; {old[:16]} still opens")
    say(f"keep a copy of {worker} in the safe again: a backup holds no keys")
    answer({"fusion_worker": new, "retired": old, "file": str(public)})


@app.command()
def doctor(home: Home) -> None:
    """Try what must not be possible where contributions are opened: dial, read another key.

    Each attempt is made behind the wall of the opener and of the fusion worker, which hold the key
    that opens contributions. Exit status 1: something got through that should have been stopped.
    """
    from coordinator.checkup import check
    from coordinator.config import load_config
    from protos.config import ConfigError

    try:
        config = load_config(home / "coordinator.toml")
        found = check(home / "coordinator.toml", config)
    except ConfigError as error:
        fail(error, 2)
    except (OSError, RuntimeError) as error:
        fail(error)
    show(found)
    if found.broken:
        fail(
            f"{len(found.broken)} got through: accept no contribution. A folder of the hub that "
            "lies below one of programs (/usr, /etc, a Python environment) moves elsewhere",
            code="wall_broken",
            data=asdict(found),
        )
    answer(asdict(found))


@app.command()
def up(home: Home) -> None:
    """Serve until Ctrl-C."""
    from coordinator.main import main

    raise typer.Exit(main([str(home / "coordinator.toml")]))
