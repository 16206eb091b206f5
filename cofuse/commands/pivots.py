"""`cofuse pivot`: the shared model, version by version."""

import json
from pathlib import Path
from typing import Annotated

import typer

from cofuse.commands.connection import At, Identity, Json, connected, fail

app = typer.Typer(no_args_is_help=True, help="List, pull and push pivots.")
PivotName = Annotated[str, typer.Argument(help='"pivot-0", "pivot-1", ...')]


@app.command(name="ls")
def list_pivots(at: At, identity: Identity, as_json: Json = False) -> None:
    """List all pivots, oldest first."""
    with connected(at, identity) as coordinator:
        pivots = coordinator.pivots()
    for pivot in pivots:
        origin = f"from {pivot.parent} in {pivot.round_id}" if pivot.parent else "imported"
        typer.echo(f"{pivot.name:<10} {origin}", err=as_json)
    if as_json:
        rows = [{"name": p.name, "parent": p.parent, "round": p.round_id} for p in pivots]
        typer.echo(json.dumps({"pivots": rows}))


@app.command()
def pull(
    name: PivotName,
    at: At,
    identity: Identity,
    out: Annotated[Path | None, typer.Option(help="Folder; default: the pivot's name.")] = None,
) -> None:
    """Download a pivot directory, checking every digest; print the folder."""
    with connected(at, identity) as coordinator:
        typer.echo(coordinator.download_pivot(name, out or Path(name)))


@app.command()
def evals(name: PivotName, at: At, identity: Identity) -> None:
    """Print a pivot's evaluations as JSON."""
    with connected(at, identity) as coordinator:
        typer.echo(json.dumps(coordinator.pivot(name).evals))


@app.command()
def push(
    name: PivotName,
    folder: Annotated[Path, typer.Argument(help="A Hugging Face model directory.")],
    at: At,
    identity: Identity,
) -> None:
    """Import a model directory as the first pivot of a lineage (operators)."""
    if not (folder / "model.safetensors").exists():
        fail(f"{folder}: found no model.safetensors, wanted a Hugging Face model directory", 2)
    with connected(at, identity) as coordinator:
        typer.echo(coordinator.import_pivot(name, folder).name)
