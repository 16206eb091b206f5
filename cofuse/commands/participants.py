"""`cofuse participant`: what an institution does."""

from datetime import datetime
from pathlib import Path
from typing import Annotated

import typer

from cofuse.commands.audit import egress
from cofuse.commands.connection import answer, fail, say, tell
from cofuse.commands.pages import page
from cofuse.output import App

app = App(no_args_is_help=True, help="Run an institution's participant.")
app.command()(egress)
app.command()(page)
Home = Annotated[Path, typer.Argument(help="The participant's folder.")]
Until = Annotated[
    str,
    typer.Option(help="When it ends by itself: 08:00, 2027-01-31T08:00, 90m, 8h or 2d."),
]


@app.command()
def init(
    home: Home,
    name: Annotated[str, typer.Option(help="As the operator knows you.")],
    coordinator: Annotated[str, typer.Option(help="host:port")],
    corpus: Annotated[Path, typer.Option(help='JSON lines of {"text": ...}; stays here.')],
) -> None:
    """Make the key (it never leaves), a signing request, participant.toml and policy.toml."""
    from cofuse.participant_home import lay_out
    from participant.corpus import CorpusError, read_corpus
    from trust.ca import IdentityError, new_identity

    joined = (home / "certificate.pem").exists() and not (home / "participant.toml").exists()
    try:
        documents = read_corpus(corpus)
        if joined:  # with a token, before this: the key is there and certified
            _must_be(home, name)
        else:
            new_identity(home, "participant", name)
    except (CorpusError, IdentityError, FileExistsError) as error:
        fail(error, 2)
    lay_out(home, name, coordinator, corpus)
    say(f"{len(documents)} documents found; none of them leaves")
    if not joined:
        say(
            f"join with the operator's token: cofuse join HOST:PORT TOKEN {home}; or send\n"
            f"{home / 'request.csr'} to the operator, and put what comes back here as\n"
            "certificate.pem, ca.pem, pivot-signer.pem and fusion-worker.pem"
        )
    say("read policy.toml: nothing leaves until you allow it")
    say(f"then start with: cofuse participant up {home}")
    answer({"folder": str(home), "documents": len(documents), "joined": joined})


def _must_be(home: Path, name: str) -> None:
    """Raise IdentityError unless the certificate in `home` is the participant's."""
    from trust.identity import Identity, IdentityError, leaf_of

    wanted = Identity("participant", name)
    if (found := leaf_of((home / "certificate.pem").read_bytes()).identity) != wanted:
        raise IdentityError(
            f"{home / 'certificate.pem'}: found {found.uri}, wanted {wanted.uri}: say the name "
            "that the token was for, or choose another folder"
        )


@app.command()
def up(home: Home) -> None:
    """Train and serve rounds until Ctrl-C. Started again, it goes on where it was."""
    from participant.daemon import main

    raise typer.Exit(main([str(home / "participant.toml")]))


@app.command()
def pause(home: Home, until: Until = "") -> None:
    """Let no work be begun, and what runs stop at its next step, until `resume` or the time."""
    from cofuse.moments import moment_of
    from participant import status

    try:
        end = moment_of(until, datetime.now().astimezone()) if until else None
    except ValueError as error:
        fail(f"--until: {error}", 2)
    status.pause(_data_dir(home), int(end.timestamp() * 1000) if end else 0)
    when = f" until {end:%Y-%m-%d %H:%M %Z}" if end else ""
    say(f"paused{when}; go on with: cofuse participant resume {home}")
    answer({"paused": True, "until": end.isoformat() if end else None})


@app.command()
def resume(home: Home) -> None:
    """Let work go on where `pause` stopped it."""
    from participant import status

    status.resume(_data_dir(home))
    say("resumed")
    answer({"paused": False})


@app.command()
def status(home: Home) -> None:
    """Tell what the daemon is doing, what it waits for, and how the expert is."""
    from participant.status import paused, read_status

    data = _data_dir(home)
    found = read_status(data)
    if found is None:
        rests = paused(data) is not None
        which = "; it is paused" if rests else ""
        words = f"no daemon runs on {home}{which}; start it with: cofuse participant up {home}"
        fail(words, code="not_running", data={"paused": rests})
    for key, value in found.items():
        if value not in ("", None, []):
            tell(f"{key:<16} {value}")
    answer(found)


def _data_dir(home: Path) -> Path:
    from participant.config import load_config
    from protos.config import ConfigError

    try:
        return load_config(home / "participant.toml").data_dir
    except ConfigError as error:
        fail(error, 2)
