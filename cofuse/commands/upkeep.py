"""`cofuse coordinator fsck | backup | restore`: for the operator, on the coordinator's machine."""

import contextlib
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cofuse.commands.connection import Home, answer, fail, say, tell

if TYPE_CHECKING:
    from coordinator.config import CoordinatorConfig
    from coordinator.fsck import Verdict


def fsck(
    home: Home,
    hashes: Annotated[bool, typer.Option(help="Read every file whole; else only sizes.")] = True,
) -> None:
    """Check that every promise still holds. Reads only; the coordinator may serve meanwhile.

    Exit status 0: all hold. 1: something is broken; each line says what to do.
    """
    from coordinator.artifacts import open_artifacts
    from coordinator.audit import audit_key
    from coordinator.clock import now_unix_ms
    from coordinator.database import open_database
    from coordinator.fsck import fsck as check
    from trust.keys import load_public
    from trust.pivot_manifest import SIGNER_FILE

    with _config(home) as config:
        database = open_database(config.store_url())
        try:
            artifacts = open_artifacts(config.data_dir, config.artifacts)
            signer = config.tls.ca.with_name(SIGNER_FILE)
            verdict = check(
                database,
                artifacts,
                now_unix_ms(),
                hashes=hashes,
                audit_key=audit_key(config.data_dir),
                pivot_signer=load_public(signer) if signer.exists() else None,
            )
        finally:
            database.close()
    _tell(verdict)
    if verdict.findings:
        words = f"{len(verdict.findings)} findings: not everything holds"
        fail(words, code="not_as_promised", data=asdict(verdict))
    answer(asdict(verdict))


def backup(
    home: Home,
    to: Annotated[Path, typer.Argument(help="Backup folder; several backups share it.")],
) -> None:
    """Save the database and every file it names, while the coordinator serves.

    A second backup into the same folder copies only what is new. Keys are not copied: keep ca/
    and tls/ in a safe.
    """
    from coordinator.artifacts import open_artifacts
    from coordinator.backup import back_up
    from coordinator.database import open_database

    with _config(home) as config:
        database = open_database(config.store_url())
        try:
            made = back_up(database, open_artifacts(config.data_dir, config.artifacts), to)
        finally:
            database.close()
    say(f"{made.contents}: {made.objects} files, {made.copied_bytes} bytes of them new")
    say(f"keep {home}/ca and {home}/tls in a safe: they are not in it")
    say(f"and the key of the audit chain: {config.data_dir}/audit")
    tell(made.contents)
    answer({"contents": str(made.contents), "copied_bytes": made.copied_bytes})


def restore(
    home: Home,
    source: Annotated[
        Path,
        typer.Argument(help="Backup folder (newest is taken), a TIME.json, or a .sqlite copy."),
    ],
) -> None:
    """Fill the empty data folder and database of HOME from a backup, then check all of it.

    Nothing is ever overwritten: move an old database away first. Ends with what fsck says.
    """
    from coordinator.backup import restore as bring_back

    with _config(home) as config:
        verdict = bring_back(source, config.store_url(), config.data_dir, config.artifacts)
    _tell(verdict)
    if verdict.lasting:
        words = "restored, but not everything holds; see above, or take another backup"
        fail(words, code="not_as_promised", data=asdict(verdict))
    say(f"restored; start it with: cofuse coordinator up {home}")
    answer(asdict(verdict))


@contextlib.contextmanager
def _config(home: Path) -> Iterator["CoordinatorConfig"]:
    """The coordinator's configuration; errors of it and of its database become words."""
    from coordinator.config import load_config
    from coordinator.store_errors import StoreError
    from protos.config import ConfigError
    from protos.errors import CofuseError

    try:
        yield load_config(home / "coordinator.toml")
    except (ConfigError, StoreError, CofuseError, OSError) as error:
        fail(error, 2)


def _tell(verdict: "Verdict") -> None:
    """A line for each invariant, one for each finding with its remedy, and what is not checked."""
    from coordinator.fsck import CHECKED, UNCHECKED

    broken = {finding.invariant for finding in verdict.findings}
    for name, means in CHECKED.items():
        tell(f"{name} {'BROKEN' if name in broken else 'holds '}  {means}")
        for finding in verdict.findings:
            if finding.invariant == name:
                tell(f"          {finding.says}\n          do: {finding.do}")
    for name, why in UNCHECKED.items():
        tell(f"{name} not checked  {why}")
    tell(
        f"{verdict.rounds} rounds, {verdict.pivots} pivots, {verdict.files} files, "
        f"{verdict.size_bytes} bytes"
    )
