"""When a recurring spec makes its next round. Pure: the time and the situation are given.

One that is due waits for what it asks for, and however many of its times have passed meanwhile,
it makes one round. It never makes the next while the last is still open.
"""

from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass, replace
from datetime import datetime
from enum import StrEnum
from zoneinfo import ZoneInfo

from protos.recurring import RecurringSpec


class Standing(StrEnum):
    """Whether a recurring spec still makes rounds."""

    ACTIVE = "ACTIVE"
    STOPPED = "STOPPED"


@dataclass(frozen=True, slots=True, kw_only=True)
class Recurring:
    """One recurring spec as stored."""

    recurring_id: str
    submitted_by: str
    spec_json: str
    state: Standing
    due_unix_ms: int
    """The time that its next round is for."""
    last_round_id: str
    """Empty before the first."""
    detail: str
    """What it waits for; empty while its time has not come."""
    order_json: str = ""
    """The submitter's signed order."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Situation:
    """What the coordinator knows when it is asked."""

    last_is_open: bool
    """Whether the last round has not ended."""
    changed_unix_ms: Mapping[str, int]
    """By participant: since when its expert is as it is."""
    fused_unix_ms: Mapping[str, int]
    """By participant: its last contribution that a pivot has learned from."""


def next_due(spec: RecurringSpec, after_unix_ms: int) -> int:
    """The first time of its calendar after a moment, in unix ms."""
    from croniter import croniter  # here: no program starts later for it

    after = datetime.fromtimestamp(after_unix_ms / 1000, ZoneInfo(spec.timezone))
    return int(croniter(spec.every, after).get_next(float) * 1000)


def decide(recurring: Recurring, situation: Situation, now_unix_ms: int) -> tuple[Recurring, bool]:
    """Return it as it is now to be stored, and whether a round is to be made with that."""
    if recurring.state is Standing.STOPPED or now_unix_ms < recurring.due_unix_ms:
        return recurring, False
    spec = RecurringSpec.model_validate_json(recurring.spec_json)
    if situation.last_is_open:
        return replace(recurring, detail=f"waits until {recurring.last_round_id} has ended"), False
    newer = newer_experts(spec.round.participants, situation)
    if len(newer) < spec.newer_experts:
        found = f"{len(newer)} ({', '.join(newer)})" if newer else "none"
        words = f"waits for newer experts: found {found}, wanted {spec.newer_experts}"
        return replace(recurring, detail=words), False
    return replace(recurring, detail="", due_unix_ms=next_due(spec, now_unix_ms)), True


def newer_experts(participants: Iterable[str], situation: Situation) -> list[str]:
    """Those whose expert has changed since a pivot last learned from it."""
    changed, fused = situation.changed_unix_ms, situation.fused_unix_ms
    return [name for name in participants if changed.get(name, 0) > fused.get(name, 0)]


def newest_pivot(start: str, parents: Mapping[str, str], waiting: Set[str] = frozenset()) -> str:
    """The newest pivot that has come of `start` and may be used; `start` itself when none has.

    Args: parents: every pivot's parent, oldest pivot first. waiting: those that operators have not
        promoted; what has come of them counts.
    """
    line = {start}
    newest = start
    for name, parent in parents.items():
        if parent in line:
            line.add(name)
            newest = newest if name in waiting else name
    return newest
