"""The command line. Data on stdout, talk on stderr; exit 0 done, 1 not as claimed, 2 misuse."""

import json
import signal
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from cofuse.commands import (
    approvals,
    audit,
    compliance,
    coordinators,
    fp8,
    fuse,
    members,
    participants,
    pivots,
    recurring,
    rounds,
)

app = typer.Typer(
    name="cofuse",
    help="Federated continual pre-training in FP8 and model fusion: the text stays where it is.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

Json = Annotated[bool, typer.Option("--json", help="One JSON object as the last line of stdout.")]


app.add_typer(rounds.app, name="round")
app.add_typer(recurring.app, name="recurring")
app.add_typer(pivots.app, name="pivot")
app.add_typer(coordinators.app, name="coordinator")
app.add_typer(participants.app, name="participant")
app.add_typer(fp8.app, name="fp8")
app.add_typer(audit.app, name="audit")
app.add_typer(compliance.app, name="compliance")
app.command()(fuse.fuse)
app.command()(members.join)
app.command()(members.renew)
app.command()(rounds.why)
app.command()(audit.egress)
app.command()(approvals.approve)


@app.command()
def identity(
    folder: Annotated[Path, typer.Argument(help="Where the key is made; it stays there.")],
    role: Annotated[str, typer.Option(help="researcher or operator.")],
    name: Annotated[str, typer.Option(help="Lower case, digits and dashes.")],
) -> None:
    """Make a key and a request for the operator to sign (`cofuse coordinator sign`)."""
    from trust.ca import IdentityError, new_identity

    known: Any = role
    try:
        new_identity(folder, known, name)
    except (IdentityError, FileExistsError) as error:
        _misuse(str(error))
    typer.echo(folder / "request.csr")


@app.command()
def demo(
    quick: Annotated[bool, typer.Option(help="One unified round only.")] = False,
    as_json: Json = False,
    seed: Annotated[int, typer.Option(min=0, max=2**31 - 1)] = 0,
    participants: Annotated[int, typer.Option(min=2, max=6, help="Hospitals.")] = 3,
    out: Annotated[Path, typer.Option(help="Folder for pivots and report.")] = Path("cofuse-demo"),
    rounds: Annotated[
        str, typer.Option(help="Comma-separated: logits-unified, logits-pairwise, weights.")
    ] = "logits-unified,logits-pairwise,weights",
) -> None:
    """Run a whole federation here: hospitals, rounds, fusion, evaluation, report."""
    from cofuse.demo.corpora import MissingSourceError
    from cofuse.demo.present import show_result, write_report
    from cofuse.demo.run import ROUNDS, DemoError, DemoPlan, FederationError, run_demo
    from cofuse.demo.screen import screen
    from cofuse.demo.settings import DEMO, QUICK
    from protos.spec import SpecError

    wanted = ("logits-unified",) if quick else tuple(rounds.split(","))
    if unknown := [name for name in wanted if name not in ROUNDS]:
        _misuse(f"--rounds: found {', '.join(unknown)!r}, wanted some of {', '.join(ROUNDS)}")
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    settings = QUICK if quick else DEMO
    plan = DemoPlan(
        out=out,
        settings=settings,
        hospitals=settings.hospitals[:participants],
        rounds=wanted,
        seed=seed,
    )
    try:
        with screen() as talk:
            talk.say(
                f"cofuse demo: {participants} hospitals, tiny models with tokenizers of their own, "
                f"FP8 emulated on CPU, rounds {', '.join(wanted)}"
            )
            result = run_demo(plan, talk)
    except (DemoError, FederationError, MissingSourceError, SpecError) as error:
        typer.echo(f"error: {error}", err=True)
        if as_json:
            typer.echo(json.dumps({"ok": False, "error": str(error)}))
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        typer.echo("stopped; nothing is left running", err=True)
        raise typer.Exit(130) from None
    report = write_report(plan, result)
    show_result(result, report, to_stderr=as_json)
    if as_json:
        typer.echo(json.dumps(result.as_json()))
    raise typer.Exit(0 if result.ok else 1)


def _misuse(text: str) -> NoReturn:
    typer.echo(f"error: {text}", err=True)
    raise typer.Exit(2)


if __name__ == "__main__":
    app()
