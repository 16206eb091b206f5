"""`cofuse approve`: a person of the institution looks at what would leave, and says yes or no."""

import getpass
import random
import sys
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from cofuse.commands.connection import answer, fail, say, tell

if TYPE_CHECKING:
    from participant.approvals import Approvals, Release

SAMPLES: Final = 10
"""Public texts that are shown of a release."""


def approve(
    what: Annotated[
        str, typer.Argument(help="A release or its round; alone: the folder whose releases wait.")
    ],
    folder: Annotated[Path | None, typer.Argument(help="The participant's folder.")] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Approve without being asked.")] = False,
    refuse: Annotated[
        str, typer.Option(metavar="WHY", help="Say no; the submitter is told why.")
    ] = "",
    by: Annotated[str, typer.Option(help="Who decides; default: whoever is logged in.")] = "",
    key: Annotated[
        Path | None, typer.Option(help="The approver's key; default: approver.pem in the folder.")
    ] = None,
) -> None:
    """Show a finished release that waits for approval, and approve or refuse it.

    `cofuse approve FOLDER` lists what waits. A release that nobody approves within 72 hours is
    refused. The daemon goes on by itself.
    """
    from participant.approvals import FOLDER, ApprovalError, Approvals

    if yes and refuse:
        fail("found --yes and --refuse, wanted one of them", 2)
    home = folder if folder is not None else Path(what)
    data = _data_dir(home)
    desk = Approvals(data / FOLDER, key=key)
    try:
        if folder is None:
            _list(desk, home)
            return
        release = desk.find(what)
        for line in _shown(release, data):
            tell(line)
        if not (yes or refuse):
            if not sys.stdin.isatty():
                say("nothing is decided; decide with --yes or --refuse WHY")
                return
            yes = typer.confirm("let it leave?")
            refuse = "" if yes else typer.prompt("why not? (the submitter is told)")
        who = by or getpass.getuser()
        decision = desk.decide(release, approved=yes, by=who, why=refuse)
    except ApprovalError as error:
        fail(error)
    tell("approved" if decision.approved else "refused")
    answer({"release": release.release_id, "approved": yes, "by": who, "why": refuse})


def _list(desk: "Approvals", home: Path) -> None:
    """What waits, oldest first."""
    found = desk.waiting()
    for release in found:
        size = f"{release.size_bytes:,} bytes"
        who = f"{release.purpose} for {release.submitted_by}"
        until = f"until {_moment(release.expires_unix_ms)}"
        tell(f"{release.release_id:<24} {release.kind:<8} {size:>18}  {who}  {until}")
    if not found:
        say("nothing waits for approval")
    else:
        say(f"look at one with: cofuse approve {found[0].release_id} {home}")
    answer({"waiting": [{"release": one.release_id, **one.model_dump()} for one in found]})


def _shown(release: "Release", data: Path) -> Iterator[str]:
    """Everything that an approver should know."""
    from participant.approvals import public_texts
    from participant.budget import FILE, Ledger
    from participant.policy import PolicyRefusalError

    yield f"release    {release.release_id}"
    yield f"round      {release.round_id}, {release.purpose}, submitted by {release.submitted_by}"
    yield f"rule       {release.rule}"
    yield f"kind       {release.what}"
    if release.kind != "weights":
        yield f"positions  {release.positions:,}"
    yield f"bytes      {release.size_bytes:,}, sha256 {release.sha256}"
    yield f"canaries   {release.gates or 'not measured: the gate is off in policy.toml'}"
    try:
        after = Ledger(data / FILE).used()
    except PolicyRefusalError as error:
        fail(error.here, code="policy_refused")
    before = max(0, after - release.positions)
    yield f"budget     {before:,} positions of 30 days before, {after:,} with it"
    yield f"decide     until {_moment(release.expires_unix_ms)}"
    yield from _samples(public_texts(data, release.round_id))


def _samples(texts: Sequence[str]) -> Iterator[str]:
    """Some of the public texts, the same ones at each look."""
    if texts:
        yield f"texts      {min(SAMPLES, len(texts))} of {len(texts)}:"
        for number in sorted(random.Random(0).sample(range(len(texts)), min(SAMPLES, len(texts)))):  # noqa: S311 - a sample, no secret
            yield f"  {number + 1:>6}  {texts[number][:200]!r}"


def _moment(unix_ms: int) -> str:
    return datetime.fromtimestamp(unix_ms / 1000, UTC).strftime("%Y-%m-%d %H:%M UTC")


def _data_dir(home: Path) -> Path:
    from participant.config import load_config
    from protos.config import ConfigError

    try:
        return load_config(home / "participant.toml").data_dir
    except ConfigError as error:
        fail(error, 2)
