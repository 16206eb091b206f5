"""What a round may become. The whole truth is the table; docs/rounds.md is drawn from it.

Pure: no clock, no database, no wire.
"""

from collections.abc import Mapping
from enum import StrEnum
from typing import Final


class State(StrEnum):
    """Where a round stands. Durable: written before anything is done about it."""

    SUBMITTED = "SUBMITTED"
    APPROVED = "APPROVED"
    COLLECTING = "COLLECTING"
    FUSING = "FUSING"
    EVALUATING = "EVALUATING"
    PUBLISHED = "PUBLISHED"
    REJECTED = "REJECTED"
    FAILED = "FAILED"
    CANCELLED = "CANCELLED"
    EXPIRED = "EXPIRED"


class Event(StrEnum):
    """What can happen to a round."""

    APPROVE = "approve"
    REJECT = "reject"
    ISSUE = "issue"
    """The assignments go out."""
    COLLECTED = "collected"
    """Every answer is in, or the deadline has passed with a quorum."""
    QUORUM_MISSED = "quorum_missed"
    """Every answer is in, without a quorum."""
    DEADLINE_PASSED = "deadline_passed"
    """The deadline has passed without a quorum."""
    FUSED = "fused"
    EVALUATED = "evaluated"
    FAIL = "fail"
    CANCEL = "cancel"


_S, _E = State, Event
TRANSITIONS: Final[Mapping[tuple[State, Event], State]] = {
    (_S.SUBMITTED, _E.APPROVE): _S.APPROVED,
    (_S.SUBMITTED, _E.REJECT): _S.REJECTED,
    (_S.SUBMITTED, _E.CANCEL): _S.CANCELLED,
    (_S.SUBMITTED, _E.DEADLINE_PASSED): _S.EXPIRED,
    (_S.APPROVED, _E.ISSUE): _S.COLLECTING,
    (_S.APPROVED, _E.CANCEL): _S.CANCELLED,
    (_S.APPROVED, _E.DEADLINE_PASSED): _S.EXPIRED,
    (_S.COLLECTING, _E.COLLECTED): _S.FUSING,
    (_S.COLLECTING, _E.QUORUM_MISSED): _S.FAILED,
    (_S.COLLECTING, _E.DEADLINE_PASSED): _S.EXPIRED,
    (_S.COLLECTING, _E.FAIL): _S.FAILED,
    (_S.COLLECTING, _E.CANCEL): _S.CANCELLED,
    (_S.FUSING, _E.FUSED): _S.EVALUATING,
    (_S.FUSING, _E.FAIL): _S.FAILED,
    (_S.FUSING, _E.CANCEL): _S.CANCELLED,
    (_S.EVALUATING, _E.EVALUATED): _S.PUBLISHED,
    (_S.EVALUATING, _E.FAIL): _S.FAILED,
    (_S.EVALUATING, _E.CANCEL): _S.CANCELLED,
}
FINAL: Final = frozenset(State) - {state for state, _ in TRANSITIONS}


class IllegalTransitionError(ValueError):
    """The event means nothing in this state."""


def advance(state: State, event: Event) -> State:
    """Return the state after `event`.

    Raises: IllegalTransitionError naming the events this state knows.
    """
    try:
        return TRANSITIONS[state, event]
    except KeyError:
        known = ", ".join(e for s, e in TRANSITIONS if s is state) or "none: it is final"
        raise IllegalTransitionError(
            f"a round in {state} does not take {event!r}; it takes: {known}"
        ) from None


def outcome(needed: int, committed: int, pending: int, *, deadline_passed: bool) -> Event | None:
    """What the collection amounts to, or None while it goes on.

    Args: counts of contributions; `pending` ones are neither committed, refused nor failed.
    """
    if pending and not deadline_passed:
        return None
    if committed >= needed:
        return Event.COLLECTED
    return Event.DEADLINE_PASSED if deadline_passed else Event.QUORUM_MISSED


def as_markdown() -> str:
    """The table and its diagram as docs/rounds.md shows them."""
    arrows = "\n".join(f"    {s} --> {t}: {e}" for (s, e), t in TRANSITIONS.items())
    rows = "\n".join(f"| {s} | {e} | {t} |" for (s, e), t in TRANSITIONS.items())
    return (
        "# Rounds\n\nDrawn from `coordinator/rounds.py` by `python -m coordinator.rounds`; "
        "a test fails when this page differs.\n\n"
        f"```mermaid\nstateDiagram-v2\n    [*] --> SUBMITTED\n{arrows}\n```\n\n"
        f"| state | event | next state |\n|---|---|---|\n{rows}\n\n"
        f"Final: {', '.join(sorted(FINAL))}.\n"
    )


if __name__ == "__main__":
    import sys

    sys.stdout.write(as_markdown())
