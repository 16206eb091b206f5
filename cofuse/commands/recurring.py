"""`cofuse recurring`: rounds by the calendar."""

from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cofuse.commands.connection import At, Identity, answer, connected, tell
from cofuse.output import App

if TYPE_CHECKING:
    from cofuse.sdk_rows import Recurring

app = App(no_args_is_help=True, help="Make rounds by the calendar.")
RecurringId = Annotated[str, typer.Argument(help="As `cofuse recurring ls` shows it.")]


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
        words = [f"{row.recurring_id:<8} {row.state:<8} {row.spec.name:<20}", _next(row)]
        words += [f"last {row.last_round_id}" if row.last_round_id else "", row.detail]
        tell("  ".join(filter(None, words)))
    answer({"recurring": [_as_json(row) for row in rows]})


@app.command()
def show(recurring_id: RecurringId, at: At, identity: Identity) -> None:
    """Show one: its calendar, what it waits for, and the round that it makes."""
    from protos.errors import CofuseError

    with connected(at, identity) as coordinator:
        rows = {row.recurring_id: row for row in coordinator.recurring()}
    if recurring_id not in rows:
        raise CofuseError("unknown_recurring", f"there is no recurring spec {recurring_id[:60]!r}")
    row = rows[recurring_id]
    made = row.spec.round
    tell(f"{row.recurring_id} {row.spec.name}: {row.state} {row.detail}".rstrip())
    lines = {
        "every": f"{row.spec.every} ({row.spec.timezone})",
        "next": _next(row).removeprefix("next "),
        "newer experts": str(row.spec.newer_experts or ""),
        "last round": row.last_round_id,
        "round": f"{made.name}: {made.kind}, {made.method}, from {made.pivot}",
        "participants": f"{', '.join(made.participants)} (quorum {made.quorum or 'all'})",
        "deadline": f"{made.deadline_minutes:g} minutes after it is made",
    }
    for name, words in lines.items():
        if words:
            tell(f"  {name:<14} {words}")
    answer({**_as_json(row), "spec": row.spec.model_dump(mode="json")})


@app.command()
def stop(recurring_id: RecurringId, at: At, identity: Identity) -> None:
    """Make no more rounds of it; one that is open goes on (operators)."""
    with connected(at, identity) as coordinator:
        state = coordinator.stop_recurring(recurring_id).state
    tell(state)
    answer({"recurring_id": recurring_id, "state": state})


def _next(row: "Recurring") -> str:
    """When its next round is due; empty when there will be none."""
    if row.state != "ACTIVE":
        return ""
    due = datetime.fromtimestamp(row.due_unix_ms / 1000, UTC)
    return f"next {due.strftime('%Y-%m-%d %H:%M UTC')}"


def _as_json(row: "Recurring") -> dict[str, Any]:
    return {
        "recurring_id": row.recurring_id,
        "name": row.spec.name,
        "state": row.state,
        "due_unix_ms": row.due_unix_ms,
        "last_round": row.last_round_id,
        "detail": row.detail,
    }
