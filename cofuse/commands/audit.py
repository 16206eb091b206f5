"""`cofuse audit verify | export`, `cofuse egress`: what was done, and whether that is the truth."""

import contextlib
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cofuse.commands.connection import answer, fail, say, tell
from cofuse.output import App

if TYPE_CHECKING:
    from trust.audit_files import Chain
    from trust.checkpoints import Verdict

app = App(no_args_is_help=True, help="Check and hand out the audit chain.")


@app.command()
def verify(
    path: Annotated[
        Path,
        typer.Argument(
            help="A participant's or coordinator's folder, an export, or one file of records."
        ),
    ],
    excerpt: Annotated[
        bool, typer.Option(help="It may begin with a later record than number 1.")
    ] = False,
) -> None:
    """Check every record against the one before it and what was signed; needs no network.

    Exit status 0: nothing was changed. 1: the first record that was edited, removed, moved or cut
    off is named.
    """
    with _chain(path) as chain:
        verdict = chain.verify(whole=not excerpt)
    _end(verdict)


@app.command()
def export(
    folder: Annotated[Path, typer.Argument(help="A participant's or coordinator's folder.")],
    out: Annotated[Path, typer.Argument(help="Folder that is made: records, signatures, key.")],
    begin: Annotated[
        str, typer.Option("--from", help="Number of a record, or UTC date or time; as 2026-11-22.")
    ] = "1",
    end: Annotated[str, typer.Option("--to", help="Likewise, and included.")] = "",
) -> None:
    """Write an excerpt that anybody can verify: one file of records, its checkpoints, the key."""
    from trust.audit_files import check

    with _chain(folder) as chain:
        chain.export(out, lambda record: _inside(record["seq"], record["ts"], begin, end))
        verdict = check(out, whole=False)
    say(f"verify it anywhere with: cofuse audit verify {out} --excerpt")
    _end(verdict)


@app.command()
def accept(
    folder: Annotated[Path, typer.Argument(help="A participant's or coordinator's folder.")],
    why: Annotated[str, typer.Option(help="What was found out; it becomes a record.")],
    name: Annotated[
        str, typer.Option(help="The participant whose chain went back, at a coordinator.")
    ] = "",
) -> None:
    """End the alarm that the other side's chain went back, once somebody has looked into it."""
    with _words():
        if (folder / "coordinator.toml").exists():
            done = _accept_participant(folder, name, why)
        else:
            from participant.config import load_config
            from participant.egress import EgressLog

            config = load_config(folder / "participant.toml")
            done = EgressLog(config.data_dir, config.name).accept(why)
    if not done:
        fail("there is no such alarm; nothing was written", code="failed")
    say("accepted, and written on the chain")


def egress(home: Annotated[Path, typer.Argument(help="The participant's folder.")]) -> None:
    """List everything that ever left, and what was refused: when, how much, by which rule."""
    from participant.config import load_config
    from participant.egress import releases
    from protos.config import ConfigError
    from trust.chain import AuditError

    try:
        found = list(releases(load_config(home / "participant.toml").data_dir))
    except ConfigError as error:
        fail(error, 2)
    except (AuditError, OSError) as error:
        fail(f"{error}; which record it is tells: cofuse audit verify {home}", code="audit_broken")
    row = "{:<24} {:<8} {:<8} {:>15} {:<16} {:<10} {}"
    head = ("time", "round", "kind", "bytes", "sha256", "approver", "rule")
    if found:
        tell(row.format(*head))
    for one in found:
        size = f"{one.size_bytes:,}" if one.allowed else "refused"
        cells = (one.time, one.round, one.what, size, one.sha256[:16], one.approver, one.rule)
        tell(row.format(*cells).rstrip())
    left = [one for one in found if one.allowed]
    total = sum(one.size_bytes for one in left)
    refused = len(found) - len(left)
    say(f"{total:,} bytes in all, {len(left)} releases; {refused} refused")
    answer({
        "total_bytes": total,
        "releases": [asdict(one) for one in left],
        "refusals": [asdict(one) for one in found if not one.allowed],
    })  # fmt: skip


def _inside(seq: int, ts: str, begin: str, end: str) -> bool:
    """Whether a record lies in a range; a date or time counts with all that it leaves open."""
    after = seq >= int(begin) if begin.isdecimal() else ts >= begin
    if not end:
        return after
    return after and (seq <= int(end) if end.isdecimal() else ts[: len(end)] <= end)


@contextlib.contextmanager
def _words() -> Iterator[None]:
    """What cannot be read becomes words, and exit status 2."""
    from coordinator.store_errors import StoreError
    from protos.config import ConfigError
    from protos.errors import CofuseError
    from trust.chain import AuditError
    from trust.keys import KeyFileError

    try:
        yield
    except (ConfigError, StoreError, CofuseError, AuditError, KeyFileError, OSError) as error:
        fail(error, 2)


@contextlib.contextmanager
def _chain(path: Path) -> Iterator["Chain"]:
    """The chain that a path means."""
    from trust.audit_files import open_chain

    with _words():
        if (path / "participant.toml").exists():
            from participant.config import load_config
            from participant.egress import FOLDER

            path = load_config(path / "participant.toml").data_dir / FOLDER
        if (path / "coordinator.toml").exists():
            with _coordinators(path) as chain:
                yield chain
        else:
            yield open_chain(path)


def _accept_participant(home: Path, name: str, why: str) -> bool:
    from coordinator.audit import accept_anchor
    from coordinator.config import load_config
    from coordinator.database import open_database

    database = open_database(load_config(home / "coordinator.toml").store_url())
    try:
        with database.write() as connection:
            return accept_anchor(connection, name, why)
    finally:
        database.close()


@contextlib.contextmanager
def _coordinators(home: Path) -> Iterator["Chain"]:
    """The chain in a coordinator's database, as it is at one moment."""
    from coordinator.audit import chain_of
    from coordinator.config import load_config
    from coordinator.database import open_database

    config = load_config(home / "coordinator.toml")
    database = open_database(config.store_url())
    try:
        with database.snapshot() as connection:
            yield chain_of(connection, config.data_dir)
    finally:
        database.close()


def _end(verdict: "Verdict") -> None:
    """Say what was found; a broken chain ends the command with status 1."""
    last = verdict.head
    if last.seq:
        signed = f"signed up to {verdict.signed}" if verdict.signed else "not signed"
        says = f"records {verdict.first} to {last.seq} follow from each other, {signed}"
        tell(f"{says}; the last has hash {last.h}")
    else:
        tell("no record")
    told = {
        "first": verdict.first,
        "last": last.seq,
        "head": last.h,
        "signed": verdict.signed,
        "broken": asdict(verdict.broken) if verdict.broken else None,
    }
    if verdict.broken is not None:
        words = f"BROKEN at record {verdict.broken.seq}: {verdict.broken.says}"
        fail(words, code="audit_broken", data=told)
    answer(told)
