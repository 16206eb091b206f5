"""`cofuse recurring`: rounds by the calendar."""

from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer

from cofuse.commands.connection import At, Identity, answer, connected, tell
from cofuse.output import App

app = App(no_args_is_help=True, help="Make rounds by the calendar.")


@app.command()
def start(
    spec: Annotated[Path, typer.Argument(help="Recurring spec (YAML); see examples/.")],
    at: At,
    identity: Identity,
) -> None:
    """Upload the spec's files, start it, print its id (operators: its rounds are approved)."""
    from protos.recurring import load_recurring

    found = load_recurring(spec)
    with connected(at, identity) as coordinator:
        made = coordinator.start_recurring(found, folder=spec.parent)
    tell(made)
    answer({"recurring_id": made})


@app.command(name="ls")
def list_recurring(at: At, identity: Identity) -> None:
    """List all of them: when the next round is due, and what it waits for."""
    with connected(at, identity) as coordinator:
        rows = coordinator.recurring()
    for row in rows:
        due = datetime.fromtimestamp(row.due_unix_ms / 1000, UTC).strftime("%Y-%m-%d %H:%M UTC")
        when = f"next {due}" if row.state == "ACTIVE" else ""
        words = [f"{row.recurring_id:<8} {row.state:<8} {row.spec.name:<20}", when]
        words += [f"last {row.last_round_id}" if row.last_round_id else "", row.detail]
        tell("  ".join(filter(None, words)))
    told = [
        {
            "recurring_id": row.recurring_id,
            "name": row.spec.name,
            "state": row.state,
            "due_unix_ms": row.due_unix_ms,
            "last_round": row.last_round_id,
            "detail": row.detail,
        }
        for row in rows
    ]
    answer({"recurring": told})


@app.command()
def stop(
    recurring_id: Annotated[str, typer.Argument(help="As `cofuse recurring ls` shows it.")],
    at: At,
    identity: Identity,
) -> None:
    """Make no more rounds of it; one that is open goes on (operators)."""
    with connected(at, identity) as coordinator:
        state = coordinator.stop_recurring(recurring_id).state
    tell(state)
    answer({"recurring_id": recurring_id, "state": state})
