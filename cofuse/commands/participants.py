"""`cofuse participant`: what an institution does."""

from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from cofuse.commands.audit import egress
from cofuse.commands.connection import answer, fail, say, tell
from cofuse.commands.pages import page
from cofuse.output import App

if TYPE_CHECKING:
    from participant.config import ParticipantConfig

app = App(no_args_is_help=True, help="Run an institution's participant.")
app.command()(egress)
app.command()(page)
Home = Annotated[Path, typer.Argument(help="The participant's folder.")]
Until = Annotated[
    str,
    typer.Option(help="When it ends by itself: 08:00, 2027-01-31T08:00, 90m, 8h or 2d."),
]
_TOLD: Final = ("loss", "reward", "cut", "failed", "alike")
"""Of a stage's newest step."""


@app.command()
def fsck(home: Home) -> None:
    """Check that the budget knows of everything that left, and that nothing lies open to be sent.

    Exit status 0: both hold. 1: something is broken; each line says what to do.
    """
    from dataclasses import asdict

    from participant.config import load_config
    from participant.policy import PolicyRefusalError
    from participant.promises import CHECKED, check
    from protos.config import ConfigError
    from trust.chain import AuditError

    try:
        found = check(load_config(home / "participant.toml").data_dir)
    except ConfigError as error:
        fail(error, 2)
    except PolicyRefusalError as error:
        fail(error.here, code="not_as_promised")
    except (AuditError, OSError) as error:
        fail(f"{error}; which record it is tells: cofuse audit verify {home}", code="audit_broken")
    broken = {one.invariant for one in found}
    for name, promise in CHECKED.items():
        tell(f"{name} {'broken' if name in broken else 'holds'}: {promise}")
    for one in found:
        tell(f"    {one.says}\n    -> {one.do}")
    rows = {"findings": [asdict(one) for one in found]}
    if found:
        words = f"{len(found)} findings: not everything holds"
        fail(words, code="not_as_promised", data=rows)
    answer(rows)


@app.command()
def init(
    home: Home,
    name: Annotated[str, typer.Option(help="As the operator knows you.")],
    coordinator: Annotated[str, typer.Option(help="host:port")],
    corpus: Annotated[Path, typer.Option(help='JSON lines of {"text": ...}; stays here.')],
) -> None:
    """Make the key (it never leaves), a signing request, participant.toml and policy.toml."""
    from cofuse.participant_home import first_settings, lay_out
    from participant.corpus import CorpusError, read_corpus
    from protos.config import ConfigError
    from trust.ca import IdentityError, new_identity
    from trust.identity import checked_name

    joined = (home / "certificate.pem").exists() and not (home / "participant.toml").exists()
    try:  # before the key is made: a folder half made would have to be removed by hand
        checked_name(name)
        settings = first_settings(home, name, coordinator, corpus)
        documents = read_corpus(corpus)
        if joined:  # with a token, before this: the key is there and certified
            _must_be(home, name)
        else:
            new_identity(home, "participant", name)
    except (ConfigError, CorpusError, IdentityError, FileExistsError) as error:
        fail(error, 2)
    lay_out(home, settings)
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


@app.command()
def stages(home: Home) -> None:
    """Tell what each stage after pre-training will read and skip, and what those done gave."""
    from participant.stages.review import figures, review

    config = _config(home)
    found, given = review(config), figures(config)
    for one in found:
        skipped = f", skips {one.skipped}" if one.skipped.counts else ""
        done = f", at step {one.last['step']:.0f} of {one.steps}" if one.last else ""
        tell(f"{one.name}: {one.usable} usable lines in {one.data.name}{skipped}{done}")
        told = [f"{key} {one.last[key]:.3f}" for key in _TOLD if key in one.last]
        if told:
            tell(f"    {', '.join(told)}")
        if one.problem:
            say(f"{one.name} cannot run: {one.problem}")
    for name, row in given.items():
        numbers = [f"{key} {value:.3f}" for key, value in row.items() if isinstance(value, float)]
        recited = row.get("canaries")
        if recited:
            ends = f"{recited['tpr_low']:.2f}-{recited['tpr_high']:.2f}"
            numbers.append(f"planted records recited {recited['tpr']:.2f} ({ends})")
        tell(f"after {name}: {', '.join(numbers)}")
    if not found:
        say("participant.toml has no [[stage]] after pre-training")
    rows = [
        {
            "name": one.name,
            "usable": one.usable,
            "skipped": dict(one.skipped.counts),
            "first_line": one.skipped.first_line,
            "problem": one.problem,
            "last": dict(one.last),
        }
        for one in found
    ]
    answer({"stages": rows, "evals": given})
    if any(one.problem for one in found):
        raise typer.Exit(1)


def _config(home: Path) -> "ParticipantConfig":
    from participant.config import load_config
    from protos.config import ConfigError

    try:
        return load_config(home / "participant.toml")
    except ConfigError as error:
        fail(error, 2)


def _data_dir(home: Path) -> Path:
    return _config(home).data_dir
