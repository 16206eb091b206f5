"""The command line. Data on stdout, talk on stderr; exit statuses are in cofuse/failures.py.

Nothing heavy is loaded before a command needs it: `--help` is to be there at once.
"""

import signal
from pathlib import Path
from typing import Annotated, Any

import typer

from cofuse.commands import (
    approvals,
    audit,
    compliance,
    coordinators,
    daily,
    doctor,
    fp8,
    fuse,
    medical,
    members,
    participants,
    pivots,
    recurring,
    reference,
    rounds,
    upkeep,
    withdrawals,
)
from cofuse.commands.connection import answer, fail, tell
from cofuse.output import App, is_quiet, wants_json

app = App(
    name="cofuse",
    help="Federated continual pre-training in FP8 and model fusion: the text stays where it is.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


@app.command()
def demo(
    quick: Annotated[bool, typer.Option(help="One unified round only.")] = False,
    seed: Annotated[int, typer.Option(min=0, max=2**31 - 1)] = 0,
    participants: Annotated[int, typer.Option(min=2, max=6, help="Hospitals.")] = 3,
    out: Annotated[Path, typer.Option(help="Folder for pivots and report.")] = Path("cofuse-demo"),
    rounds: Annotated[
        str, typer.Option(help="Comma-separated: logits-unified, logits-pairwise, weights.")
    ] = "logits-unified,logits-pairwise,weights",
) -> None:
    """Run a whole federation here: hospitals, rounds, fusion, evaluation, report."""
    from cofuse.demo.corpora import MissingSourceError
    from cofuse.demo.federation import FederationError
    from cofuse.demo.present import show_result, write_report
    from cofuse.demo.result import DemoPlan
    from cofuse.demo.run import ROUNDS, DemoError, run_demo
    from cofuse.demo.screen import screen
    from cofuse.demo.settings import DEMO, QUICK
    from protos.spec import SpecError

    wanted = ("logits-unified",) if quick else tuple(rounds.split(","))
    if unknown := [name for name in wanted if name not in ROUNDS]:
        fail(f"--rounds: found {', '.join(unknown)!r}, wanted some of {', '.join(ROUNDS)}", 2)
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
        with screen(quiet=is_quiet()) as talk:
            talk.say(
                f"cofuse demo: {participants} hospitals, tiny models with tokenizers of their own, "
                f"FP8 emulated on CPU, rounds {', '.join(wanted)}"
            )
            result = run_demo(plan, talk)
    except (DemoError, FederationError, MissingSourceError, SpecError) as error:
        fail(error, 1)
    except KeyboardInterrupt:
        fail("stopped; nothing is left running", code="stopped")
    report = write_report(plan, result)
    show_result(result, report, to_stderr=wants_json())
    answer(result.as_json(), bare=True)
    raise typer.Exit(0 if result.ok else 1)


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
        fail(error, 2)
    tell(folder / "request.csr")
    answer({"request": str(folder / "request.csr")})


for _command in (
    fuse.fuse,
    members.invite,
    members.join,
    members.renew,
    members.revoke,
    daily.login,
    daily.logout,
    daily.ps,
    daily.up,
    daily.status,
    daily.pause,
    daily.resume,
    daily.leave,
    rounds.why,
    audit.egress,
    approvals.approve,
    withdrawals.withdraw,
    doctor.doctor,
    upkeep.backup,
    reference.schema,
    reference.config,
    medical.medical_evals,
):
    app.command()(_command)
for _name, _group in (
    ("round", rounds.app),
    ("recurring", recurring.app),
    ("pivot", pivots.app),
    ("coordinator", coordinators.app),
    ("participant", participants.app),
    ("fp8", fp8.app),
    ("audit", audit.app),
    ("compliance", compliance.app),
):
    app.add_typer(_group, name=_name)


if __name__ == "__main__":
    app()
