"""`cofuse round`: what a researcher does."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from cofuse.commands.connection import At, Identity, Json, connected, fail
from cofuse.sdk import Round
from protos.public_sets import PublicSetError
from protos.spec import SpecError, load_spec

app = typer.Typer(no_args_is_help=True, help="Submit rounds and follow them.")
Spec = Annotated[Path, typer.Argument(help="Round spec (YAML); see examples/.")]
RoundId = Annotated[str, typer.Argument(help="As `cofuse round ls` shows it.")]


@app.command()
def check(spec: Spec) -> None:
    """Read a spec and its files without sending anything."""
    from protos.public_sets import read_evals, read_prompts

    try:
        found = load_spec(spec)
        if found.prompts and not found.prompts.startswith("sha256:"):
            prompts = read_prompts(spec.parent / found.prompts)
            size = sum(len(text.encode()) for text in prompts)
            typer.echo(f"prompts: {len(prompts)} documents, {size:,} bytes")
        if found.evals and not found.evals.startswith("sha256:"):
            domains = read_evals(spec.parent / found.evals).domains
            typer.echo(f"evals: {', '.join(domains)}")
    except (SpecError, PublicSetError, OSError) as error:
        fail(error, 2)
    typer.echo(f"{spec}: a valid {found.kind} round, {found.method}, for {found.participants}")


@app.command()
def submit(spec: Spec, at: At, identity: Identity) -> None:
    """Upload the spec's files, submit it, print the round's id."""
    try:
        found = load_spec(spec)
        with connected(at, identity) as coordinator:
            typer.echo(coordinator.submit(found, folder=spec.parent))
    except (SpecError, PublicSetError, OSError) as error:
        fail(error, 2)


@app.command()
def watch(round_id: RoundId, at: At, identity: Identity, as_json: Json = False) -> None:
    """Print a round's events until it ends; exit 1 unless it was published."""
    with connected(at, identity) as coordinator:
        for event in coordinator.watch(round_id):
            words = " ".join(f"{key}={value}" for key, value in event.body.items())
            typer.echo(f"{event.kind} {words}", err=as_json)
        final = coordinator.round(round_id)
    if as_json:
        typer.echo(json.dumps(_as_json(final)))
    if final.state != "PUBLISHED":
        raise typer.Exit(1)


@app.command()
def show(round_id: RoundId, at: At, identity: Identity, as_json: Json = False) -> None:
    """Show a round, who has answered, and why it ended."""
    with connected(at, identity) as coordinator:
        found = coordinator.round(round_id)
    if as_json:
        typer.echo(json.dumps(_as_json(found)))
        return
    typer.echo(f"{found.round_id} {found.spec.name}: {found.state} {found.detail}".rstrip())
    for part in found.contributions:
        size = f"{part.size_bytes:,} bytes" if part.size_bytes else ""
        typer.echo(f"  {part.participant:<20} {part.status:<10} {size} {part.detail}".rstrip())
    if found.pivot_name:
        typer.echo(f"pivot: {found.pivot_name}")


@app.command(name="ls")
def list_rounds(at: At, identity: Identity, as_json: Json = False) -> None:
    """List all rounds, oldest first."""
    with connected(at, identity) as coordinator:
        rounds = coordinator.rounds()
    for row in rounds:
        typer.echo(f"{row.round_id:<8} {row.state:<11} {row.spec.name}", err=as_json)
    if as_json:
        typer.echo(json.dumps({"rounds": [_as_json(row) for row in rounds]}))


@app.command()
def approve(round_id: RoundId, at: At, identity: Identity) -> None:
    """Let a submitted round run (operators)."""
    with connected(at, identity) as coordinator:
        typer.echo(coordinator.approve(round_id).state)


@app.command()
def cancel(round_id: RoundId, at: At, identity: Identity) -> None:
    """End a round in whatever state it is."""
    with connected(at, identity) as coordinator:
        typer.echo(coordinator.cancel(round_id).state)


def why(
    name: Annotated[
        str, typer.Argument(help="Of a round, a participant, a pivot or a recurring spec.")
    ],
    at: At,
    identity: Identity,
    as_json: Json = False,
) -> None:
    """Say why something is as it is, what it waits for, and what helps."""
    with connected(at, identity) as coordinator:
        findings = coordinator.why(name)
    for found in findings:
        typer.echo(found.says + (f"\n    -> {found.do}" if found.do else ""), err=as_json)
    if as_json:
        typer.echo(json.dumps({"name": name, "findings": [asdict(found) for found in findings]}))


def _as_json(found: Round) -> dict[str, Any]:
    return {
        "round_id": found.round_id,
        "name": found.spec.name,
        "state": found.state,
        "detail": found.detail,
        "pivot": found.pivot_name,
        "contributions": [
            {"participant": p.participant, "status": p.status, "bytes": p.size_bytes}
            for p in found.contributions
        ],
    }
