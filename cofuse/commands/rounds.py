"""`cofuse round`: what a researcher does, from a spec to a pivot."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from cofuse.commands.connection import (
    At,
    Identity,
    RoundId,
    Spec,
    answer,
    connected,
    fail,
    say,
    tell,
)
from cofuse.commands.round_check import check, lock
from cofuse.commands.round_evals import diff, evals
from cofuse.output import App, emit, wants_lines

if TYPE_CHECKING:
    from cofuse.sdk import Event, Round

app = App(no_args_is_help=True, help="Submit rounds and follow them.")
WaitS = Annotated[
    float | None, typer.Option("--timeout", min=0, help="Seconds to wait.  [until it ends]")
]
Jsonl = Annotated[
    bool, typer.Option("--jsonl", help="One JSON object a line as it happens; then as --json.")
]
_FIRST: Final[tuple[Callable[..., None], ...]] = (check, lock)
for _command in _FIRST:
    app.command()(_command)


@app.command()
def init(
    at: At,
    identity: Identity,
    kind: Annotated[
        str, typer.Option(help="What participants ship: logits, weights or pairs.")
    ] = "logits",
    name: Annotated[str, typer.Option(help="For people; lower case, digits, dashes.")] = "my-round",
    online: Annotated[
        bool, typer.Option("--online", help="Ask the coordinator for the newest pivot and members.")
    ] = False,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="File to write; must not be there.")
    ] = None,
) -> None:
    """Print a commented round spec to start from: `cofuse round init > round.yaml`."""
    from cofuse.round_start import starting_spec
    from trust.identity import checked_name

    if kind not in ("logits", "weights", "pairs"):
        fail(f"--kind: found {kind!r}, wanted logits, weights or pairs", 2)
    known: Any = kind
    pivot, members = "pivot-0", ["st-mary", "north", "lakeside"]
    if online:
        with connected(at, identity) as coordinator:
            pivots, members = coordinator.pivots(), sorted(coordinator.participants()) or members
            pivot = pivots[-1].name if pivots else pivot
    text = starting_spec(known, name=checked_name(name), pivot=pivot, participants=members)
    if out is None:
        tell(text.rstrip("\n"))
    else:
        with out.open("x", encoding="utf-8") as file:
            file.write(text)
        say(f"edit {out}, then: cofuse round check {out}")
    answer({"spec": text, "file": str(out) if out else None})


@app.command()
def submit(
    spec: Spec,
    at: At,
    identity: Identity,
    wait: Annotated[bool, typer.Option("--wait", help="Then as `round watch` does.")] = False,
    timeout: WaitS = None,
    request_id: Annotated[
        str, typer.Option("--idempotency-key", help="The same key twice is the same round.")
    ] = "",
    jsonl: Jsonl = False,
) -> None:
    """Upload the spec's files, submit it, print the round's id. Ctrl-C ends waiting, not it."""
    from cofuse.round_lock import load_round

    found = load_round(spec)
    with connected(at, identity) as coordinator:
        found.require_pivot(coordinator)
        round_id = coordinator.submit(found.spec, folder=found.folder, request_id=request_id)
        tell(round_id)
        if wait:
            final = _follow(coordinator, round_id, timeout)
    if wait:
        _end(final)
    answer({"round_id": round_id})


@app.command()
def watch(
    round_id: RoundId,
    at: At,
    identity: Identity,
    timeout: WaitS = None,
    jsonl: Jsonl = False,
) -> None:
    """Print a round's events until it ends; exit 1 unless it was published."""
    with connected(at, identity) as coordinator:
        final = _follow(coordinator, round_id, timeout)
    _end(final)


@app.command()
def show(round_id: RoundId, at: At, identity: Identity) -> None:
    """Show a round, who has answered, why it ended, and whose words the public text contradicts."""
    with connected(at, identity) as coordinator:
        found = coordinator.round(round_id)
        made = coordinator.pivot(found.pivot_name) if found.state == "PUBLISHED" else None
    credit = made.evals.get("credit", {}) if made is not None else {}
    tell(f"{found.round_id} {found.spec.name}: {found.state} {found.detail}".rstrip())
    for part in found.contributions:
        size = f"{part.size_bytes:,} bytes" if part.size_bytes else ""
        tell(f"  {part.participant:<20} {part.status:<10} {size} {part.detail}".rstrip())
    if found.pivot_name:
        tell(f"pivot: {found.pivot_name}")
    for line in _judged(credit):
        tell(line)
    answer({**as_json(found), "suspicion": credit.get("suspicion", {})})


@app.command()
def log(
    round_id: RoundId,
    at: At,
    identity: Identity,
    participant: Annotated[str, typer.Option(help="Only what concerns this one.")] = "",
    follow: Annotated[bool, typer.Option("--follow", help="Go on until it ends.")] = False,
    jsonl: Jsonl = False,
) -> None:
    """Print what has happened to a round, with the times."""
    told = []
    with connected(at, identity) as coordinator:
        events = coordinator.watch(round_id) if follow else coordinator.events(round_id)
        for event in events:
            if not participant or participant in event.body.values():
                _tell(event, f"{_moment(event.time_unix_ms)} {_words(event)}")
                told.append(asdict(event))
    answer({"round_id": round_id} if wants_lines() else {"round_id": round_id, "events": told})


@app.command(name="ls")
def list_rounds(at: At, identity: Identity) -> None:
    """List all rounds, oldest first."""
    with connected(at, identity) as coordinator:
        rounds = coordinator.rounds()
    for row in rounds:
        tell(f"{row.round_id:<8} {row.state:<11} {row.spec.name}")
    answer({"rounds": [as_json(row) for row in rounds]})


@app.command()
def approve(round_id: RoundId, at: At, identity: Identity) -> None:
    """Let a submitted round run (operators)."""
    with connected(at, identity) as coordinator:
        found = coordinator.approve(round_id)
    tell(found.state)
    answer(as_json(found))


@app.command()
def cancel(round_id: RoundId, at: At, identity: Identity) -> None:
    """End a round in whatever state it is."""
    with connected(at, identity) as coordinator:
        found = coordinator.cancel(round_id)
    tell(found.state)
    answer(as_json(found))


_LAST: Final[tuple[Callable[..., None], ...]] = (evals, diff)
for _command in _LAST:
    app.command()(_command)


def why(
    name: Annotated[
        str, typer.Argument(help="Of a round, a participant, a pivot or a recurring spec.")
    ],
    at: At,
    identity: Identity,
) -> None:
    """Say why something is as it is, what it waits for, and what helps."""
    with connected(at, identity) as coordinator:
        findings = coordinator.why(name)
    for found in findings:
        tell(found.says + (f"\n    -> {found.do}" if found.do else ""))
    answer({"name": name, "findings": [asdict(found) for found in findings]})


def as_json(found: "Round") -> dict[str, Any]:
    """A round, for a program."""
    return {
        "round_id": found.round_id,
        "name": found.spec.name,
        "state": found.state,
        "detail": found.detail,
        "pivot": found.pivot_name,
        "contributions": [
            {
                "participant": p.participant,
                "status": p.status,
                "bytes": p.size_bytes,
                "detail": p.detail,
            }
            for p in found.contributions
        ],
    }


def _follow(coordinator: Any, round_id: str, timeout_s: float | None) -> "Round":
    """Tell the events until the round is final; return it. Raises: WaitTimedOutError."""
    for event in coordinator.watch(round_id, timeout_s=timeout_s):
        _tell(event, _words(event))
    final: Round = coordinator.round(round_id)
    return final


def _judged(credit: Mapping[str, Any]) -> Iterator[str]:
    """What the round found against each source, and what rounds before it had found."""
    for name, signs in credit.get("suspicion", {}).items():
        past = credit.get("standing", {}).get(name, {})
        now = "left out: its words are not the text's" if signs["excluded"] else "listened to"
        told = ", ".join(f"{key} {signs[key]:.3g}" for key in ("false_nats", "lies", "worst_lie"))
        line = f"  {name:<20} {now} ({told})"
        if past.get("left_out"):
            times = f"{past['left_out']:.0f} of its {past['judged']:.0f} rounds before"
            line += f"; left out of {times}, so with weight {past['weight']:g}"
        yield line


def _end(final: "Round") -> None:
    """Answer; what did not end in a pivot ends the command with status 1."""
    if final.state != "PUBLISHED":
        words = f"{final.round_id} ended {final.state}: {final.detail}".rstrip(": ")
        fail(words, code="not_published", data=as_json(final))
    answer(as_json(final))


def _tell(event: "Event", words: str) -> None:
    """An event as it happens: a line for whoever listens, people or a program."""
    if wants_lines():
        emit(asdict(event))
    else:
        tell(words)


def _words(event: "Event") -> str:
    told = (f"{key}={_short(value)}" for key, value in event.body.items() if value != "")
    return " ".join((event.kind, *told))


def _short(value: Any) -> Any:
    return f"{value:.4g}" if isinstance(value, float) else value


def _moment(unix_ms: int) -> str:
    return datetime.fromtimestamp(unix_ms / 1000, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
